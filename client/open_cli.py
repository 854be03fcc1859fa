"""A device's command for a model that was trained encrypted. What is heavy loads inside of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from propolis.logs import one_line
from propolis.model_files import figures_of, require_exporter
from propolis.secure.errors import PropolisError, UsageError

if TYPE_CHECKING:
    from propolis.client.config import ClientConfig
    from propolis.client.encrypted_sums import OpenedModel
    from propolis.convert import Quantization

WEIGHTS_FILE, SAYS_FILE = "model.safetensors", "model.json"
_CALIBRATION_EXAMPLES = 512


def open_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="An encrypted model: a run's model.encrypted.")],
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="The device's folder, with its key.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="Where the files go, in clear.")],
    task: Annotated[
        str | None, typer.Option("--task", help="The task that it solves: built-in, or MODULE:CLASS.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="The device's own data, to evaluate it on; the task's by default.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Also a model in int8.")] = False,
    calibrate: Annotated[
        int, typer.Option("--calibrate", help="With --int8: examples that set its ranges.", min=1)
    ] = _CALIBRATION_EXAMPLES,
    seven_bits: Annotated[
        bool, typer.Option("--seven-bits", help="With --int8: smaller weights, for processors without VNNI.")
    ] = False,
    name: Annotated[str, typer.Option("--name", help="Name that it is served under; the task's by default.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", help="File with the passphrase of the device's keys.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Open a model that was trained encrypted, with this device's key, and export it to ONNX."""
    from propolis.client.config import config_in

    require_exporter()
    if seven_bits and not int8:
        raise UsageError("--seven-bits is of the model in int8: give --int8 too")
    told = config_in(folder, {"task": task, "data": data})
    if told.task is None:
        raise UsageError("which task does it solve? give --task")
    _require_free(out, force)
    opened = _opened(folder, model, told, passphrase_file)

    from propolis.convert import Quantization

    said = _export(opened, told, out, name, Quantization(calibrate, seven_bits) if int8 else None)
    typer.echo(json.dumps(said) if as_json else _in_words(said, out))


def _opened(folder: Path, model: Path, told: ClientConfig, passphrase_file: Path | None) -> OpenedModel:
    """The model; raises UsageError whatever keeps it from being opened."""
    from propolis.client.encrypted_sums import open_model_file
    from propolis.client.seal import Seal
    from propolis.client.state import STATE_FILE, FileStore, policy_of
    from propolis.link.keys import passphrase_of

    if not (folder / STATE_FILE).is_file():
        raise UsageError(f"{folder} holds no enrolled device")
    passphrase = passphrase_of(passphrase_file)
    store = FileStore(folder, policy_of(told.node), None if passphrase is None else Seal(passphrase))
    try:
        return open_model_file(store, model)
    except UsageError:
        raise
    except PropolisError as error:
        raise UsageError(f"{model} cannot be opened: {error}") from None


def _export(
    opened: OpenedModel, told: ClientConfig, out: Path, name: str, quantization: Quantization | None
) -> dict[str, Any]:
    """Write the files, and return what there is to say about them."""
    from propolis.client.own_export import Weights, convert_opened, sets_of
    from propolis.export import Origin
    from propolis.storage import write_atomically
    from propolis.task import load_task

    reference = str(told.task)
    task = load_task(reference)
    origin = Origin(name or reference.rpartition(":")[2], "1", reference, "", opened.round)
    weights, converted = convert_opened(
        task, sets_of(task, told.data), Weights(opened.arrays, opened.frozen), origin, quantization
    )
    figures = {
        file: {"file": str(out / file), "bytes": len(content), **converted.metrics[file]}
        for file, content in converted.files.items()
    }
    said = {
        "round": opened.round,
        "devices": opened.devices,
        "weight": opened.weight,
        "saturated": opened.saturated,
        "metrics": {key: value if math.isfinite(value) else None for key, value in opened.metrics.items()},
        "task": reference,
        "max_difference": converted.difference,
        "models": figures,
    }
    files = {WEIGHTS_FILE: weights, **converted.files, SAYS_FILE: json.dumps(said, indent=2).encode() + b"\n"}
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    for file, content in files.items():
        write_atomically(out / file, content, mode=0o600)
    return said


def _require_free(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: --out names a folder")
    from propolis.model_files import FLOAT32_FILE, INT8_FILE

    taken = [file for file in (WEIGHTS_FILE, FLOAT32_FILE, INT8_FILE, SAYS_FILE) if (out / file).exists()]
    if taken and not force:
        raise UsageError(f"{out / taken[0]} is there already: name another folder, or give --force")


def _in_words(said: dict[str, Any], out: Path) -> str:
    cut = f"{said['saturated']} values were cut off" if said["saturated"] else "no value was cut off"
    metrics = ", ".join(
        f"{one_line(key)} {value:.4f}" for key, value in sorted(said["metrics"].items()) if value is not None
    )
    return "\n".join(
        [
            f"opened: round {said['round']}, the sum of {said['devices']} devices, weight {said['weight']:g}, {cut}",
            f"they say: {metrics or 'nothing'}",
            figures_of(said["models"], said["max_difference"]),
            f"in {out}, in clear and for you alone",
        ]
    )
