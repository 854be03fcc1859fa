"""A device's commands for its models: install, serve, predict. What is heavy loads inside of them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from propolis.secure.errors import UsageError
from propolis.serving import cli as serving

if TYPE_CHECKING:
    import numpy as np

    from propolis.client.infer import Installed
    from propolis.client.slots import Record

DirFlag = Annotated[Path, typer.Option("--dir", metavar="DIR", help="The device's folder, from its enrolment.")]
PassphraseFlag = Annotated[
    Path | None, typer.Option("--passphrase-file", help="File with the passphrase of the device's keys.")
]
TaskFlag = Annotated[
    str | None,
    typer.Option("--task", help="Of an encrypted model, the task that it solves: built-in, or MODULE:CLASS."),
]
DataFlag = Annotated[
    str | None, typer.Option("--data", help="The device's own data, to try it on; the task's by default.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
_REFRESH_S = 2.0


def install_command(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help="A sealed package.")],
    key: Annotated[Path, typer.Argument(metavar="KEY", help="Its keys, or the one for this device.")],
    folder: DirFlag,
    name: Annotated[str | None, typer.Option("--model", metavar="NAME", help="The model that it must be.")] = None,
    store_plain: Annotated[
        bool, typer.Option("--store-plain", help="Leave the files unencrypted on the disk, for other programs.")
    ] = False,
    largest: Annotated[int, typer.Option("--largest-model", help="Largest model to take, in MiB.", min=1)] = 1024,
    task: TaskFlag = None,
    data: DataFlag = None,
    passphrase_file: PassphraseFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Install a model from a file, as if it had come over the link."""
    from propolis.client.config import config_in
    from propolis.client.infer import Choice, probe_of_this_device
    from propolis.client.install import Installer
    from propolis.client.keyholder import Keyholder
    from propolis.client.opening import Opening
    from propolis.client.seal import Seal
    from propolis.link.keys import passphrase_of
    from propolis.package import read_key

    passphrase = passphrase_of(passphrase_file)
    seal = None if passphrase is None else Seal(passphrase)
    device = Keyholder.under(folder, seal)
    tried = list[Choice]()
    probe = probe_of_this_device(tell=tried.append)
    exporter = Opening.told(config_in(folder, {"task": task, "data": data})).exporter(folder, seal)
    installer = Installer(folder, device, probe, largest=largest * 2**20, exporter=exporter)
    manifest = installer.install(package, read_key(key, device.index), time.time(), name=name, store_plain=store_plain)
    if as_json:
        trial = {"tried": tried[0].file, "difference": tried[0].difference} if tried else {"tried": None}
        typer.echo(json.dumps({"name": manifest.name, "sequence": manifest.sequence, **trial}))
        return
    without = "not tried" if probe is None else "nothing in it to try"
    how = f"tried: {tried[0].kind.name.lower()}, differs by {tried[0].difference:g}" if tried else without
    typer.echo(f"installed: release {manifest.sequence} of {manifest.name}; {how}")


def installed_command(
    folder: DirFlag,
    as_json: JsonFlag = False,
) -> None:
    """List the models that are installed."""
    from propolis.client.slots import records

    found = [_installed(name, record) for name, record in records(folder).items()]
    if as_json:
        typer.echo(json.dumps(found))
        return
    for model in found:
        before = f", before it {model['before']}" if model["before"] else ""
        typer.echo(f"{model['name']}: release {model['sequence']} in slot {model['slot']}{before}")
    if not found:
        typer.echo(f"no model is installed in {folder}")


def _installed(name: str, record: Record) -> dict[str, Any]:
    current, *before = record.slots
    return {
        "name": name,
        "sequence": current.release.sequence,
        "model_version": current.model_version,
        "manifest": current.release.manifest.hex(),
        "slot": current.letter,
        "before": before[0].release.sequence if before else None,
        "newest_trusted": record.newest.sequence,
    }


def serve_command(
    models: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME", help="An installed model, or NAME=FILE.onnx; may be repeated."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="The device's folder: serve what is installed there.")
    ] = None,
    refresh: Annotated[
        float | None,
        typer.Option(
            "--refresh",
            help=f"With --dir: seconds between looks for a newer release, 0 for none; {_REFRESH_S:g} by default.",
            min=0,
            max=86_400,
        ),
    ] = None,
    listen: serving.ListenFlag = serving.LISTEN,
    metrics: serving.MetricsFlag = serving.METRICS,
    max_batch: serving.MaxBatchFlag = 32,
    max_delay_ms: serving.MaxDelayFlag = 0,
    queue: serving.QueueFlag = 256,
    threads: serving.ThreadsFlag = 1,
    largest_message: serving.LargestMessageFlag = 4,
    tls: serving.TlsFlag = None,
    require_certificate: serving.RequireCertificateFlag = False,
    passphrase_file: Annotated[
        Path | None,
        typer.Option("--passphrase-file", help="File with the passphrase of the keys in --dir, and in --tls."),
    ] = None,
    log_format: serving.LogFormatFlag = "text",
) -> None:
    """Answer requests for inference with the models that are installed, and with newer ones once they are."""
    names, files = _asked_for(models or (), folder)
    flags = serving.ServingFlags(
        listen, metrics, max_batch, max_delay_ms, queue, largest_message, tls, require_certificate,
        passphrase_file if tls or folder is None else None,
    )  # fmt: skip
    if folder is None and refresh is not None:
        raise UsageError("--refresh is for installed models: give --dir too")
    every_s = _REFRESH_S if refresh is None else refresh
    serving.require_number("--refresh", every_s)
    flags.begin(log_format)
    loaded = serving.load_files(files, threads)
    if folder is None:
        flags.run(loaded)
        return

    from propolis.client.installed import InstalledModels
    from propolis.client.keyholder import Keyholder
    from propolis.link.keys import passphrase_of
    from propolis.serving.refresh import Refresh

    device = partial(Keyholder.load, folder, passphrase_of(passphrase_file))
    installed = InstalledModels(folder, device, names, threads)
    loaded = [*installed.open(), *loaded]
    flags.run(loaded, Refresh(installed.newer, every_s) if every_s > 0 else None)


def _asked_for(models: Sequence[str], folder: Path | None) -> tuple[list[str], list[tuple[str, Path]]]:
    """The names of installed models, and the names and files of others."""
    names = [text for text in models if "=" not in text]
    if folder is None and names:
        raise UsageError(f"--model '{names[0]}': expected NAME=FILE.onnx, or --dir for a model that is installed")
    if folder is None and not models:
        raise UsageError("nothing to serve: give --dir for what is installed, or --model NAME=FILE.onnx")
    return names, [serving.name_and_file(text) for text in models if "=" in text]


def predict_command(
    inputs: Annotated[
        Path, typer.Option("--input", metavar="FILE", help="Its inputs: .npy, or .json by name or as nested lists.")
    ],
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="FILE", help="The ONNX file; with --dir the name of an installed model."),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="A device's folder: use the model installed there.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the outputs there: .npy or .json.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", help="Threads to compute with.", min=1, max=1024)] = 1,
    passphrase_file: Annotated[
        Path | None,
        typer.Option("--passphrase-file", help="With --dir: file with the passphrase of the device's keys."),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Compute a model's outputs for the inputs in a file: of an ONNX file, or of a device's installed model."""
    from propolis.serving.model import load_model_file
    from propolis.serving.predict import as_lists, predict, require_ending, write_outputs

    if output is not None:
        require_ending(output, "--output")
    installed = _open(folder, model, threads, passphrase_file)
    found = installed.choice.model if installed else load_model_file(Path(model or ""), threads=threads)
    outputs = predict(found, inputs)
    if output is not None:
        write_outputs(outputs, output)
    if as_json:
        lists = as_lists(outputs)
        typer.echo(json.dumps(lists if installed is None else {**_release(installed), "outputs": lists}))
        return
    if installed is not None:
        typer.echo(installed.words)
    _show(outputs, output)


def _open(folder: Path | None, model: str | None, threads: int, passphrase_file: Path | None) -> Installed | None:
    """The installed model that is asked for; None where it is a file."""
    if folder is None:
        if model is None:
            raise UsageError("which model? give --model FILE.onnx, or --dir for one that is installed")
        if passphrase_file is not None:
            raise UsageError("--passphrase-file is for a device's keys: give --dir too")
        return None
    if model is not None and Path(model).suffix == ".onnx":
        raise UsageError(f"--model {model} is a file and --dir says an installed model: leave one of them out")

    from propolis.client.infer import open_installed
    from propolis.client.keyholder import Keyholder
    from propolis.link.keys import passphrase_of

    return open_installed(folder, Keyholder.load(folder, passphrase_of(passphrase_file)), model, threads)


def _release(installed: Installed) -> dict[str, Any]:
    choice = installed.choice
    release = {"name": choice.manifest.name, "sequence": choice.manifest.sequence, "file": choice.file}
    return {**release, "fell_back": installed.fell_back}


def _show(outputs: dict[str, np.ndarray], output: Path | None) -> None:
    for name, array in outputs.items():
        typer.echo(f"{name}: {array.dtype} {list(array.shape)}\n{array}")
    if output is not None:
        typer.echo(f"outputs in {output}")
