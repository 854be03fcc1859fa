"""The commands that lead a version of a registry to devices. What is heavy loads inside of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from propolis.secure.errors import UsageError
from propolis.server.export_cli import (
    CALIBRATION_EXAMPLES,
    CalibrateFlag,
    DataFlag,
    Int8Flag,
    SevenBitsFlag,
    require_int8,
)
from propolis.server.model_files import FLOAT32_FILE, INT8_FILE, figures_of, is_converted, require_exporter
from propolis.server.models_cli import JsonFlag, NameArgument, RegistryFlag, VersionArgument, open_named, say_version
from propolis.server.package_cli import FederationFlag, left_out_in_words

if TYPE_CHECKING:
    from propolis.secure.manifest import Manifest
    from propolis.server.convert import Quantization
    from propolis.server.registry import Registry
    from propolis.server.registry_records import Version

TaskFlag = Annotated[
    str | None, typer.Option("--task", help="Built-in task, or MODULE:CLASS; the one that the run solved by default.")
]


def convert_command(
    name: NameArgument,
    version: VersionArgument,
    int8: Int8Flag = False,
    seven_bits: SevenBitsFlag = False,
    calibrate: CalibrateFlag = CALIBRATION_EXAMPLES,
    data: DataFlag = None,
    task: TaskFlag = None,
    registry: RegistryFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Make ONNX files of a version, compared with torch, and keep them with it."""
    require_int8(int8, seven_bits)
    opened = open_named(registry)
    wanted = opened.version(name, version)
    if is_converted(wanted):
        _require_same(wanted, int8)
        say_version(f"{wanted} has its files already: {_names(wanted)}", wanted, as_json)
        return
    converted, said = _convert(opened, wanted, task, data, (calibrate, seven_bits) if int8 else None)
    say_version(f"{said}\nkept with {converted}: {_names(converted)}", converted, as_json)


def publish_command(
    name: NameArgument,
    version: VersionArgument,
    federation: FederationFlag,
    release_key: Annotated[
        Path, typer.Option("--release-key", metavar="FILE", help="From propolis federation release-key.")
    ],
    valid_days: Annotated[
        int, typer.Option("--valid-days", help="Days that it may be installed.", min=1, max=3650)
    ] = 90,
    percent: Annotated[
        float, typer.Option("--percent", help="Of the devices that get it at first.", min=0, max=100)
    ] = 100,
    largest_difference: Annotated[
        float, typer.Option("--largest-difference", help="Of outputs on the golden batch.", min=0)
    ] = 1e-3,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Also keep the package, and its keys in FILE.keys.")
    ] = None,
    rollout: Annotated[
        bool, typer.Option("--rollout/--no-rollout", help="Hand it to the server; without, only write --out.")
    ] = True,
    int8: Int8Flag = False,
    post_quantum: Annotated[
        bool, typer.Option("--post-quantum", help="Seal to the devices' hybrid keys, ML-KEM-768 and X25519.")
    ] = False,
    sequence_at_least: Annotated[
        int, typer.Option("--sequence-at-least", help="Its number, where the registry has forgotten some.", min=1)
    ] = 1,
    task: TaskFlag = None,
    data: DataFlag = None,
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", help="File with the passphrase of the release key.")
    ] = None,
    registry: RegistryFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Release a version to the devices: seal its files, note the release, and hand it to the server."""
    _require_rollout(rollout, out, percent)
    opened = open_named(registry)
    wanted = opened.version(name, version)

    from propolis.link.keys import passphrase_of
    from propolis.secure.manifest import Trial
    from propolis.server.registry_releases import Demand
    from propolis.server.release import Publisher, Terms, release_version
    from propolis.server.release_key import load_release_key
    from propolis.server.rollout import newest_sequence

    key = load_release_key(release_key, passphrase_of(passphrase_file))
    Publisher.of(federation, key, name)  # before a conversion, which takes its time
    wanted = _converted(opened, wanted, task, data, int8)
    publisher = Publisher.of(federation, key, name)  # somebody may have been revoked, or have enrolled
    demand = Demand(sequence_at_least, newest_sequence(federation, name))
    with _package(out) as package:
        terms = Terms(valid_days, Trial(largest_difference), post_quantum)
        manifest = release_version(opened, wanted, publisher, terms, package, wanted=version, demand=demand)
        if rollout:
            _start_rollout(federation, package, percent)
    left_out = publisher.left_out if post_quantum else []
    devices = len(publisher.recipients) - len(left_out)
    if as_json:
        typer.echo(json.dumps(_as_json(manifest, devices) | {"left_out": left_out}))
        return
    said = f"{wanted} is release {manifest.sequence} of {name}, for {devices} devices"
    typer.echo(f"{said}{f': {out}' if out else ''}")
    if left_out:
        typer.echo(left_out_in_words(left_out))


def _require_rollout(rollout: bool, out: Path | None, percent: float) -> None:
    if rollout:
        return
    if out is None:
        raise UsageError("--no-rollout only writes the package: say where to, with --out")
    if percent != 100:
        raise UsageError("--percent is of a rollout: leave it out with --no-rollout, and give it to the rollout")


def _converted(registry: Registry, version: Version, task: str | None, data: Path | None, int8: bool) -> Version:
    """The version with its files, which are made where it has none."""
    if is_converted(version):
        _require_same(version, int8)
        return version
    made, said = _convert(registry, version, task, data, (CALIBRATION_EXAMPLES, False) if int8 else None)
    typer.echo(said, err=True)
    return made


def _convert(
    registry: Registry, version: Version, task: str | None, data: Path | None, quantization: tuple[int, bool] | None
) -> tuple[Version, str]:
    """Convert a version, and say what came of it."""
    require_exporter()

    from propolis.server.convert import Quantization
    from propolis.server.convert_version import convert_version

    how: Quantization | None = Quantization(*quantization) if quantization else None
    made, converted = convert_version(registry, version, task, data, how)
    figures: dict[str, dict[str, Any]] = {
        file: {"file": file, "bytes": len(content), **converted.metrics[file]}
        for file, content in converted.files.items()
    }
    return made, figures_of(figures, converted.difference)


def _require_same(version: Version, int8: bool) -> None:
    if int8 and all(each.name != INT8_FILE for each in version.artifacts):
        raise UsageError(
            f"{version} has {FLOAT32_FILE} without {INT8_FILE}, and what a version has is never changed: "
            "register its weights once more, as a version of its own"
        )


def _names(version: Version) -> str:
    return ", ".join(each.name for each in version.artifacts)


@contextmanager
def _package(out: Path | None) -> Iterator[Path]:
    """Where the package goes: a folder that is gone afterwards, unless it is to be kept."""
    if out is not None:
        yield out
        return
    with TemporaryDirectory(prefix="propolis-release-") as folder:
        yield Path(folder) / "package"


def _start_rollout(federation: Path, package: Path, percent: float) -> None:
    """Hand a package over for delivery; raises UsageError where the server's folder takes none."""
    from propolis.server.rollout import start_rollout

    start_rollout(federation, package, percent)


def _as_json(manifest: Manifest, devices: int) -> dict[str, Any]:
    from propolis.server.package_cli import manifest_as_json

    return manifest_as_json(manifest) | {"devices": devices}
