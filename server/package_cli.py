"""The commands of whoever releases models. What is heavy loads inside of them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from propolis.secure.errors import UsageError

if TYPE_CHECKING:
    from propolis.secure.manifest import Manifest

package_app = typer.Typer(help="Sealed packages: models on their way to the devices.", no_args_is_help=True)

DAY_S = 24 * 3600

PackageArgument = Annotated[Path, typer.Argument(metavar="PACKAGE", help="The package's file.")]
FederationFlag = Annotated[
    Path, typer.Option("--federation", metavar="DIR", help="The server's folder: roster and enrolled devices.")
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]


def _files(flag: str, what: str) -> Any:
    return typer.Option(flag, metavar="FILE", help=f"{what}; may be repeated.")


@package_app.command("seal")
def seal(
    federation: FederationFlag,
    release_key: Annotated[
        Path, typer.Option("--release-key", metavar="FILE", help="From propolis federation release-key.")
    ],
    name: Annotated[str, typer.Option("--name", help="The model's name.")],
    sequence: Annotated[
        int, typer.Option("--sequence", help="Number of the release; higher than any before, also to go back.", min=1)
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The package; its keys go to FILE.keys.")],
    onnx: Annotated[list[Path] | None, _files("--onnx", "A model in ONNX")] = None,
    int8: Annotated[list[Path] | None, _files("--int8", "A model in ONNX with int8 weights")] = None,
    golden: Annotated[list[Path] | None, _files("--golden", "Inputs and the outputs they must give")] = None,
    encrypted: Annotated[
        Path | None,
        typer.Option("--encrypted", metavar="FILE", help="A model that was trained encrypted; devices export it."),
    ] = None,
    other: Annotated[list[Path] | None, _files("--file", "Anything else that belongs to the model")] = None,
    valid_days: Annotated[
        int, typer.Option("--valid-days", help="Days that it may be installed.", min=1, max=3650)
    ] = 90,
    model_version: Annotated[int, typer.Option("--model-version", help="In the registry.", min=0)] = 0,
    parent: Annotated[int, typer.Option("--parent", help="The release before; 0 is none.", min=0)] = 0,
    run_id: Annotated[str, typer.Option("--run-id", metavar="HEX", help="The run that it comes from.")] = "",
    round_number: Annotated[int, typer.Option("--round", help="The round of that run.", min=0)] = 0,
    epsilon: Annotated[float, typer.Option("--epsilon", help="Privacy spent; 0 claims none.", min=0)] = 0.0,
    delta: Annotated[float, typer.Option("--delta", help="Privacy spent.", min=0, max=1)] = 0.0,
    measures: Annotated[
        list[str] | None, typer.Option("--measure", metavar="NAME=NUMBER", help="An evaluation; may be repeated.")
    ] = None,
    largest_difference: Annotated[
        float, typer.Option("--largest-difference", help="Of outputs on the golden batch.", min=0)
    ] = 1e-3,
    probe_seconds: Annotated[
        float, typer.Option("--probe-seconds", help="To load the model and run that batch.", min=0.001, max=3600)
    ] = 60.0,
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", help="File with the passphrase of the release key.")
    ] = None,
    post_quantum: Annotated[
        bool, typer.Option("--post-quantum", help="Seal to the devices' ML-KEM keys; who has none is left out.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Sign a model, and encrypt it for the devices that have enrolled."""
    from propolis.link.keys import passphrase_of
    from propolis.secure.manifest import Kind, Trial, Trust
    from propolis.server.membership import Membership
    from propolis.server.plaintext import PlainFile
    from propolis.server.publish import Facts, recipients_of, seal_package
    from propolis.server.release_key import load_release_key

    under_key = None if encrypted is None else [_require_encrypted(encrypted)]
    given = {Kind.ENCRYPTED: under_key, Kind.ONNX: onnx, Kind.INT8: int8, Kind.GOLDEN: golden, Kind.OTHER: other}
    files = [PlainFile(path, kind) for kind, paths in given.items() for path in paths or ()]
    now = int(time.time())
    facts = Facts(
        name,
        sequence,
        created=now,
        expires=now + valid_days * DAY_S,
        model_version=model_version,
        parent=parent,
        run_id=_run_id(run_id),
        round=round_number,
        epsilon=epsilon,
        delta=delta,
        evaluation=_measures(measures or ()),
        trial=Trial(largest_difference, probe_seconds),
    )
    membership = Membership(federation)
    recipients = recipients_of(membership)
    trust = Trust(membership.root_key, membership.roster)
    key = load_release_key(release_key, passphrase_of(passphrase_file))
    sealed = seal_package(files, facts, key, recipients, trust, out, post_quantum=post_quantum)
    able = [one for one in recipients if not post_quantum or one.hybrid_key is not None]
    entries = membership.roster.roster.entries
    left_out = [entries[one.index].name for one in recipients if one not in able]
    if as_json:
        told = {"devices": [one.index for one in able], "left_out": left_out}
        typer.echo(json.dumps(manifest_as_json(sealed.manifest) | told))
        return
    typer.echo(f"release {sequence} of {name} for {len(able)} devices: {out} and {out}.keys")
    if left_out:
        typer.echo(left_out_in_words(left_out))


def _require_encrypted(path: Path) -> Path:
    """The path again; raises UsageError unless it holds an encrypted model, as far as one sees without the key."""
    from propolis.secure.he.messages import is_encrypted_model

    try:
        if is_encrypted_model(path.read_bytes()):
            return path
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    raise UsageError(f"{path} is no encrypted model: --encrypted takes a run's model.encrypted")


@package_app.command("verify")
def verify(
    package: PackageArgument,
    federation: FederationFlag,
    name: Annotated[str | None, typer.Option("--name", help="The model that it must be.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check a package as devices do, as far as that goes without a key."""
    from propolis.package import verify_package
    from propolis.secure.manifest import LARGEST_PLAINTEXT, Expected, Trust
    from propolis.server.roster import load_root, load_roster_of

    root_key = load_root(federation)
    trust = Trust(root_key, load_roster_of(root_key, federation))
    accepted = verify_package(package, trust, Expected(time.time(), LARGEST_PLAINTEXT, name))
    if as_json:
        typer.echo(json.dumps(manifest_as_json(accepted.manifest) | {"release_key": accepted.serial}))
        return
    typer.echo(f"holds: release {accepted.manifest.sequence} of {accepted.manifest.name}, by key {accepted.serial}")


@package_app.command("show")
def show(package: PackageArgument, as_json: JsonFlag = False) -> None:
    """Print what a package says of itself, without checking it."""
    from propolis.package import Package
    from propolis.protos import model_pb2
    from propolis.secure.manifest import Manifest
    from propolis.secure.wire import decode

    with Package.open(package) as opened:
        manifest = decode(Manifest, opened.release.manifest.payload, model_pb2.Manifest)
    facts = manifest_as_json(manifest)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for key, value in facts.items():
        typer.echo(f"{key:<16}  {value if not isinstance(value, (list, dict)) else json.dumps(value)}")
    typer.echo("not checked: propolis package verify does that")


def left_out_in_words(names: Sequence[str]) -> str:
    """Which devices cannot be given a post-quantum package."""
    return f"left out, for they have announced no post-quantum key: {', '.join(names)}"


def manifest_as_json(manifest: Manifest) -> dict[str, Any]:
    """A manifest for machines: digests in hexadecimal, times in seconds since 1970."""
    return {
        "name": manifest.name,
        "sequence": manifest.sequence,
        "model_version": manifest.model_version,
        "parent": manifest.parent,
        "federation": manifest.federation.hex(),
        "plaintext_digest": manifest.plaintext_digest.hex(),
        "plaintext_size": manifest.plaintext_size,
        "ciphertext_size": manifest.ciphertext_size,
        "run_id": manifest.run_id.hex(),
        "round": manifest.round,
        "epsilon": manifest.epsilon,
        "delta": manifest.delta,
        "evaluation": {measure.name: measure.value for measure in manifest.evaluation},
        "kem": _kem(manifest.kem),
        "created": manifest.created,
        "expires": manifest.expires,
        "files": [{"name": file.name, "size": file.size, "kind": _kind(file.kind)} for file in manifest.files],
    }


def _kind(number: int) -> str:
    from propolis.secure.manifest import Kind

    return Kind(number).name.lower() if number in set(Kind) else str(number)


def _kem(number: int) -> str:
    from propolis.secure.kem import Kem

    return Kem(number).name.lower()


def _run_id(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise UsageError(f"--run-id is in hexadecimal, got {text!r}") from None


def _measures(given: Sequence[str]) -> dict[str, float]:
    measures = {}
    for text in given:
        name, _, number = text.partition("=")
        try:
            measures[name] = float(number)
        except ValueError:
            raise UsageError(f"--measure has the form NAME=NUMBER, got {text!r}") from None
        if not name or not math.isfinite(measures[name]):
            raise UsageError(f"--measure needs a name and a finite number, got {text!r}")
    return measures
