"""The command that leads a version of a registry to devices. What is heavy loads inside of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from propolis.secure.errors import UsageError
from propolis.server.convert_cli import (
    Conversion,
    GoldenFlag,
    GoldenFromTestSetFlag,
    NoGoldenFlag,
    TaskFlag,
    converted,
)
from propolis.server.export_cli import CALIBRATION_EXAMPLES, DataFlag, Int8Flag, SevenBitsFlag, require_int8
from propolis.server.models_cli import JsonFlag, NameArgument, RegistryFlag, VersionArgument, open_named
from propolis.server.package_cli import FederationFlag, left_out_in_words

if TYPE_CHECKING:
    from propolis.secure.manifest import Manifest


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
    seven_bits: SevenBitsFlag = False,
    golden: GoldenFlag = None,
    no_golden: NoGoldenFlag = False,
    golden_from_test_set: GoldenFromTestSetFlag = False,
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
    require_int8(int8, seven_bits)
    how = Conversion(task, data, int8, seven_bits, CALIBRATION_EXAMPLES, golden, no_golden, golden_from_test_set)
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
    wanted = converted(opened, wanted, how)
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
