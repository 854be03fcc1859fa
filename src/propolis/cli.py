"""The command line. Heavy imports wait until a command needs them, so that ``--help`` answers at once."""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from propolis.client.cli import APP_THREAD, client_app
from propolis.client.models_cli import predict_command
from propolis.logs import configure_logging, one_line
from propolis.secure.errors import PropolisError, UsageError
from propolis.server.cli import federation_app
from propolis.server.config import SIMULATED_ONLY, ServerConfig, load_served
from propolis.server.convert_cli import convert_command
from propolis.server.export_cli import export_command
from propolis.server.models_cli import models_app
from propolis.server.package_cli import package_app
from propolis.server.release_cli import publish_command
from propolis.server.rollout_cli import rollout_app
from propolis.server.serve_cli import serve_command
from propolis.settings import Settings, load_settings

EXIT_FAILURE, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="propolis",
    help="A secure federated edge-cloud framework on Flower.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Side-by-side benchmarks against peers.", no_args_is_help=True)
app.add_typer(federation_app, name="federation")
app.add_typer(client_app, name="client")
app.add_typer(models_app, name="models")
app.add_typer(package_app, name="package")
app.add_typer(rollout_app, name="rollout")
app.add_typer(bench_app, name="bench")
app.command("serve")(serve_command)
app.command("predict")(predict_command)
app.command("export")(export_command)
models_app.command("convert")(convert_command)
models_app.command("publish")(publish_command)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]


def with_settings(
    *models: type[BaseModel], without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag for every field of these models, in place of its ``**flags``."""

    def give(command: Callable[..., None]) -> Callable[..., None]:
        parameters = inspect.signature(command, eval_str=True).parameters.values()
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in parameters if p.kind is not p.VAR_KEYWORD]
        fields = {name: field for model in models for name, field in model.model_fields.items() if name not in without}
        flags = [_flag(name, field) for name, field in fields.items()]
        command.__signature__ = inspect.Signature([*flags, *own])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*flags, *own]}
        return command

    return give


def _flag(name: str, field: FieldInfo) -> inspect.Parameter:
    option = typer.Option(f"--{name.replace('_', '-')}", help=_help(field), show_default=False)
    kind: Any = field.annotation
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _help(field: FieldInfo) -> str:
    return f"{field.description}" + ("" if field.default is None else f" [default: {field.default}]")


def _print_version(asked: bool) -> None:
    if asked:
        from propolis import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """A secure federated edge-cloud framework on Flower."""


@app.command("simulate")
@with_settings(Settings)
def simulate_command(
    config: Annotated[Path | None, typer.Option("--config", help="TOML file with settings.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the results; a new one by default.")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="Folder of a run to go on with.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace another run in the folder.")] = False,
    registry: Annotated[
        str | None, typer.Option("--registry", help="Folder or PostgreSQL URL of the registry that the model goes to.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Its name in the registry; the task's by default.")
    ] = None,
    deliver: Annotated[
        bool, typer.Option("--deliver", help="Then release the model, and deliver it to devices over a real link.")
    ] = False,
    as_json: JsonFlag = False,
    **flags: Any,
) -> None:
    """Train a task over many simulated devices on this machine."""
    if resume is not None and (out is not None or config is not None or force):
        raise UsageError("--resume takes folder and settings from the run: leave out --out, --config and --force")
    settings = None if resume else load_settings(config, flags)  # before the seconds that torch takes to load

    from rich.console import Console

    from propolis.model_files import require_exporter
    from propolis.server.job import RunOptions, settings_to_resume
    from propolis.server.registration import Registration
    from propolis.simulations.run import simulate

    console = None if as_json else Console()
    settings = settings or settings_to_resume(Path(resume or ""), flags)
    folder = resume or out or Path("runs") / f"{settings.task.replace(':', '.')}-{time.strftime('%Y%m%d-%H%M%S')}"
    if deliver:
        require_exporter()
        registry = registry or str(folder / "registry")
    registration = Registration.asked(registry, model, settings.task)
    try:
        result = simulate(settings, RunOptions(folder, resume is not None, force, console, registration=registration))
    except KeyboardInterrupt:
        _stop(f"interrupted; go on with: propolis simulate --resume {folder}", EXIT_INTERRUPTED)
    if not as_json:
        typer.echo(_summary(result))
        typer.echo(f"{_files_of(result)} are in {folder}")
        _say_registered(result)
    if deliver:
        result |= _deliver(folder, str(registry), result["registered"], settings, as_json)
    if as_json:
        typer.echo(json.dumps(result))


def _deliver(
    out: Path, registry: str, registered: Mapping[str, Any], settings: Settings, as_json: bool
) -> dict[str, Any]:
    """Release what was registered and deliver it; what came of it."""
    from propolis.server.opening import open_registry
    from propolis.simulations.deliver import deliver
    from propolis.simulations.federation import recalled_federation
    from propolis.simulations.run import DEVICES
    from propolis.size import format_bytes

    opened = open_registry(registry)
    version = opened.version(registered["model"], registered["version"])
    federation = recalled_federation(out / DEVICES, settings.clients) if settings.is_encrypted else None
    done = deliver(opened, version, settings.task, settings.data, settings.clients, federation)
    figures = {
        "sequence": done.manifest.sequence,
        "package_bytes": done.package_bytes,
        "installed": done.installed,
        "seconds": done.seconds,
        "device_metrics": done.device_metrics,
    }
    if not as_json:
        release = f"release {done.manifest.sequence} of {done.manifest.name}"
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in done.device_metrics.items())
        typer.echo(f"sealed     {release}: one package of {format_bytes(done.package_bytes)}, a key for each device")
        typer.echo(f"delivered  to {done.installed} of {done.devices} devices in {done.seconds:.1f} s, over mutual TLS")
        how = "opened, exported, tried" if settings.is_encrypted else "tried on the golden batch,"
        typer.echo(f"verified   by each of them, {how} and installed")
        typer.echo(f"predicted  on device 0 with what it has installed, the test set: {metrics}")
    return {"delivered": figures}


def _say_registered(result: dict[str, Any]) -> None:
    if version := result.get("registered"):
        typer.echo(f"registered as {version['model']} {version['version']} in {version['registry']}")


def _files_of(result: dict[str, Any]) -> str:
    """What a simulation leaves."""
    if result["protection"].startswith("he"):
        return "result.json, model.encrypted, the devices that can open it and config.toml"
    return "result.json, model.safetensors, curves.png and config.toml"


def _summary(result: dict[str, Any]) -> str:
    """A result in one line."""
    from propolis.size import format_bytes

    figures = [f"{name} {result[name]:.4f}" for name in ("accuracy", "loss") if result[name] is not None]
    said = ", ".join(figures) or "trained encrypted"  # nobody here knows how well
    return (
        f"{said} after {len(result['history'])} rounds in {result['seconds']:.1f} s; "
        f"{format_bytes(result['uplink_bytes'])} up, {format_bytes(result['downlink_bytes'])} down"
    )


@app.command("server")
@with_settings(Settings, ServerConfig, without=SIMULATED_ONLY)
def server_command(
    config: Annotated[Path | None, typer.Option("--config", help="TOML file with settings and [server].")] = None,
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", help="File with the passphrase of the server's keys.")
    ] = None,
    as_json: JsonFlag = False,
    **flags: Any,
) -> None:
    """Train a task over the devices that connect; started again, it goes on where it was.

    Meanwhile, and with --stay also afterwards, devices enrol and fetch the models that are released.
    """
    served = load_served(config, flags)

    from rich.console import Console

    from propolis.link.keys import passphrase_of
    from propolis.server.process import serve, stay

    told, passphrase = served.config, passphrase_of(passphrase_file)
    configure_logging(told.log_format)
    as_rows = not as_json and told.log_format == "text" and sys.stdout.isatty()
    try:
        result = serve(served, passphrase, Console() if as_rows else None) if not told.idle else None
    except KeyboardInterrupt:
        _stop(f"stopped; start it again and it goes on with the run in {told.out}", EXIT_INTERRUPTED)
    _say_result(result, told.out, as_json)
    if told.stay or told.idle:
        sys.stdout.flush()
        stay(served, passphrase)


def _say_result(result: dict[str, Any] | None, out: str, as_json: bool) -> None:
    if result is not None and as_json:
        typer.echo(json.dumps(result))
    elif result is not None:
        typer.echo(_summary(result))
        model = "model.encrypted" if result["protection"] == "he" else "model.safetensors"
        typer.echo(f"result.json, {model} and config.toml are in {out}")
        _say_registered(result)


@bench_app.command("simulate")
def bench_simulate(
    as_json: JsonFlag = False,
    out: Annotated[Path | None, typer.Option("--out", help="File for the figures as JSON.")] = None,
) -> None:
    """The same job on the local grid and on Flower's simulation engine on Ray."""
    from propolis.simulations.bench.simulate import run_benchmark

    run_benchmark(out or Path("runs") / "bench-simulate.json", as_json)


@bench_app.command("secagg")
def bench_secagg(
    as_json: JsonFlag = False,
    out: Annotated[Path | None, typer.Option("--out", help="File for the figures as JSON.")] = None,
    dimension: Annotated[int, typer.Option("--dimension", help="Parameters of the largest model.", min=1)] = 1_000_000,
) -> None:
    """The same secure sum by Propolis and by Flower's SecAgg+, and the server's memory with 1000 devices."""
    from propolis.simulations.bench.secagg import jobs, run_benchmark

    run_benchmark(out or Path("runs") / "bench-secagg.json", as_json, jobs(dimension))


@bench_app.command("codec")
def bench_codec(
    as_json: JsonFlag = False,
    out: Annotated[Path | None, typer.Option("--out", help="File for the figures as JSON; a chart beside it.")] = None,
    parts: Annotated[
        list[str] | None,
        typer.Option("--part", help="Only this: speed, messages, flower, or job a, b or c; may be repeated."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Seeds of job a's runs.", min=1, max=100)] = 3,
    rounds: Annotated[
        int, typer.Option("--rounds", help="Rounds of job a's reference; the others' follow.", min=2)
    ] = 80,
    data: Annotated[Path | None, typer.Option("--data", help="Folder with the data of Fashion-MNIST.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out the runs that --out has already.")] = False,
) -> None:
    """Accuracy against bytes for every codec, beside plain FedAvg and Flower's SecAgg+ (about half an hour)."""
    from propolis.simulations.bench.codec import published_work, run_benchmark

    figures = out or Path("runs") / "bench-codec.json"
    try:
        run_benchmark(figures, as_json, published_work(parts or (), seeds, rounds, data), resume)
    except KeyboardInterrupt:
        _stop(
            f"interrupted; what has ended is in {figures}: go on with the same command and --resume", EXIT_INTERRUPTED
        )


@bench_app.command("link")
def bench_link(
    as_json: JsonFlag = False,
    out: Annotated[Path | None, typer.Option("--out", help="File for the figures as JSON.")] = None,
    parts: Annotated[
        list[str] | None,
        typer.Option("--part", help="Only this: empty, model, crowd, large or slow; may be repeated."),
    ] = None,
) -> None:
    """The link beside Flower's, with a thousand devices, large messages and a slow line (about five minutes)."""
    from propolis.simulations.bench.link import parts_named, run_benchmark

    run_benchmark(out or Path("runs") / "bench-link.json", as_json, parts_named(parts or ()))


@bench_app.command("edge")
def bench_edge(
    as_json: JsonFlag = False,
    out: Annotated[Path | None, typer.Option("--out", help="File for the figures as JSON.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Folder with the data of Fashion-MNIST.")] = None,
) -> None:
    """A trained model in torch, ONNX Runtime and int8 on one thread, and served to many (some minutes)."""
    from propolis.simulations.bench.edge import PACKAGES, Effort, parts
    from propolis.simulations.bench.link import run_benchmark

    run_benchmark(out or Path("runs") / "bench-edge.json", as_json, parts(Effort(), data), PACKAGES)


@bench_app.command("delivery")
def bench_delivery(
    as_json: JsonFlag = False,
    out: Annotated[Path | None, typer.Option("--out", help="File for the figures as JSON.")] = None,
) -> None:
    """Sealing for 10,000 devices, and 200 devices that fetch 50 MiB at once (some minutes)."""
    from propolis.simulations.bench.delivery import PACKAGES, Effort, parts
    from propolis.simulations.bench.link import run_benchmark

    run_benchmark(out or Path("runs") / "bench-delivery.json", as_json, parts(Effort()), PACKAGES)


@bench_app.command("he")
def bench_he(
    as_json: JsonFlag = False,
    out: Annotated[Path | None, typer.Option("--out", help="File for the figures as JSON.")] = None,
    chosen: Annotated[
        list[str] | None, typer.Option("--part", help="Only this: costs, masks, noise or memory; may be repeated.")
    ] = None,
) -> None:
    """Homomorphic encryption beside CKKS, its noise, and the server's memory (some minutes)."""
    from propolis.simulations.bench.he import PACKAGES, Effort, parts
    from propolis.simulations.bench.link import parts_named, run_benchmark

    run_benchmark(out or Path("runs") / "bench-he.json", as_json, parts_named(chosen or (), parts(Effort())), PACKAGES)


def main() -> None:
    """Entry point: one line and exit code 2 for a user's mistake, 1 for a failed run, 130 for Ctrl-C."""
    try:
        _dispatch()
    except SystemExit as end:
        if any(thread.name == APP_THREAD for thread in threading.enumerate()):  # it may be in the middle of training
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else EXIT_FAILURE)
        raise


def _dispatch() -> NoReturn:
    """Run the command, and end with its exit code."""
    import click

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a service manager's stop is as clean as Ctrl-C
    try:
        code = app(prog_name="propolis", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except click.ClickException as error:
        _stop(error.format_message(), EXIT_USAGE)
    except UsageError as error:
        _stop(str(error), EXIT_USAGE)
    except PropolisError as error:
        _stop(str(error), EXIT_FAILURE)
    except OSError as error:
        _stop(f"{error.filename or 'input or output'}: {error.strerror or error}", EXIT_USAGE)
    except (KeyboardInterrupt, click.Abort):
        code = EXIT_INTERRUPTED
    sys.exit(code or 0)


def _stop(message: str, code: int) -> NoReturn:
    print(f"propolis: {one_line(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(code)
