"""The commands of the model registry. What is heavy loads inside of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from propolis.secure.errors import UsageError

if TYPE_CHECKING:
    from propolis.server.registry import Registry
    from propolis.server.registry_records import Version

models_app = typer.Typer(help="The model registry: versions, aliases, where they come from.", no_args_is_help=True)

REGISTRY_VARIABLE = "PROPOLIS_REGISTRY"
HOUR_S = 3600

RegistryFlag = Annotated[
    str | None,
    typer.Option("--registry", envvar=REGISTRY_VARIABLE, help="Folder of the registry, or a URL of PostgreSQL."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The model's name.")]
VersionArgument = Annotated[str, typer.Argument(metavar="VERSION", help="A version's number, or an alias.")]
AliasFlag = Annotated[str, typer.Option("--alias", help="Which alias.")]


@models_app.command("init")
def init(
    registry: RegistryFlag = None,
    blobs: Annotated[
        str | None, typer.Option("--blobs", help="Folder or fsspec URL for the models; in the registry's folder.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a registry, and its key."""
    from propolis.server.opening import open_or_make

    made, notice = open_or_make(_location(registry), blobs)
    _say(notice or f"there is a registry in {made.name}", {"registry": made.name, "new": notice is not None}, as_json)


@models_app.command("list")
def list_versions(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only this model.")] = None,
    registry: RegistryFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """List the versions."""
    from propolis.server.models_text import as_dict, table_of

    versions = open_named(registry).versions(name)
    _say(table_of(versions), [as_dict(version) for version in versions], as_json)


@models_app.command("show")
def show(
    name: NameArgument, version: VersionArgument, registry: RegistryFlag = None, as_json: JsonFlag = False
) -> None:
    """Show all that is known of a version."""
    _say_sheet(open_named(registry).version(name, version), as_json)


@models_app.command("register")
def register(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Safetensors, model.encrypted, or the folder of a complete run.")
    ],
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="The model that it is a version of.")],
    parent: Annotated[int | None, typer.Option("--parent", help="The version that it was made from.", min=1)] = None,
    registry: RegistryFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a file the next version of a model.

    A run's folder also says where the model comes from.
    """
    from propolis.server.opening import open_or_make
    from propolis.server.registry_records import Lineage

    opened, notice = open_or_make(_location(registry))
    if notice:
        typer.echo(notice, err=True)
    if file.is_dir():
        from propolis.server.registration import register_run

        version = register_run(opened, model, file, parent=parent)
    else:
        version = opened.register(model, file, Lineage(parent=parent))
    say_version(f"registered as {version} in {opened.name}", version, as_json)


@models_app.command("promote")
def promote(
    name: NameArgument,
    version: VersionArgument,
    alias: AliasFlag = "champion",
    registry: RegistryFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Set an alias to a version."""
    promoted = open_named(registry).promote(name, version, alias)
    say_version(f"{alias} of {name} is version {promoted.version}", promoted, as_json)


@models_app.command("rollback")
def rollback(
    name: NameArgument, alias: AliasFlag = "champion", registry: RegistryFlag = None, as_json: JsonFlag = False
) -> None:
    """Set an alias back to the version it had before."""
    back = open_named(registry).rollback(name, alias)
    say_version(f"{alias} of {name} is version {back.version} again", back, as_json)


@models_app.command("tag")
def tag(
    name: NameArgument,
    version: VersionArgument,
    tags: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Tags to set.")] = None,
    remove: Annotated[list[str] | None, typer.Option("--remove", metavar="KEY", help="Tag to remove.")] = None,
    registry: RegistryFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Set and remove tags of a version."""
    given = dict(_pair(each) for each in tags or ())
    if not given and not remove:
        raise UsageError("say which tag: KEY=VALUE, or --remove KEY")
    tagged = open_named(registry).tag(name, version, given, remove or ())
    say_version(f"tags of {tagged}: {' '.join(f'{k}={v}' for k, v in tagged.tags.items()) or 'none'}", tagged, as_json)


@models_app.command("evaluate")
def evaluate(
    name: NameArgument,
    version: VersionArgument,
    task: Annotated[str, typer.Option("--task", help="Built-in task, or MODULE:CLASS.")],
    data: Annotated[str | None, typer.Option("--data", help="Folder with the task's data, where it reads one.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    registry: RegistryFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Evaluate a version on a task's test set, and keep the result."""
    opened = open_named(registry)
    wanted = opened.version(name, version)  # before the seconds that torch takes to load

    from propolis.server.evaluation import evaluate_version
    from propolis.server.models_text import figures

    evaluated = evaluate_version(opened, wanted, task, data, device)
    last = evaluated.evaluations[-1]
    say_version(f"{evaluated} on {last.data}: {figures(last.metrics)}", evaluated, as_json)


@models_app.command("verify")
def verify(
    name: NameArgument, version: VersionArgument, registry: RegistryFlag = None, as_json: JsonFlag = False
) -> None:
    """Read a whole version, with its artifacts, and check that it is what was registered."""
    opened = open_named(registry)
    wanted = opened.version(name, version)
    opened.verify(wanted)
    also = f", and so are {', '.join(each.name for each in wanted.artifacts)}" if wanted.artifacts else ""
    said = f"{wanted} is what was registered: SHA-256 {wanted.digest}, {wanted.size} bytes{also}"
    say_version(said, wanted, as_json)


@models_app.command("export")
def export(
    name: NameArgument,
    version: VersionArgument,
    out: Annotated[Path, typer.Option("--out", help="File to write.")],
    file: Annotated[
        str | None,
        typer.Option("--file", metavar="FILE", help="An artifact, such as model.onnx, in place of the weights."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    registry: RegistryFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a version to a file of safetensors, or one of its artifacts, in clear.

    One that is encrypted stays encrypted.
    """
    if out.exists() and not force:
        raise UsageError(f"{out} is there already: name another file, or give --force")
    opened = open_named(registry)
    wanted = opened.version(name, version)
    opened.export(wanted, out, file)
    say_version(f"{f'{file} of ' if file else ''}{wanted} is in {out}", wanted, as_json)


@models_app.command("export-mlflow")
def export_mlflow(
    name: NameArgument,
    to: Annotated[str, typer.Option("--to", metavar="URI", help="Of MLflow, as sqlite:///mlflow.db or http://HOST.")],
    artifacts: Annotated[
        str | None, typer.Option("--artifacts", metavar="URI", help="Where MLflow keeps a new experiment's files.")
    ] = None,
    registry: RegistryFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Copy the versions of a model into a registry of MLflow, in clear."""
    opened = open_named(registry)

    from propolis.server.mlflow_export import export_to_mlflow

    numbers = export_to_mlflow(opened, name, to, artifacts)
    _say(f"{len(numbers)} versions of {name} are in MLflow", {"model": name, "versions": numbers}, as_json)


@models_app.command("sweep")
def sweep(
    grace_hours: Annotated[
        float,
        typer.Option("--grace-hours", help="Leave alone what is younger: an upload may be on its way.", min=0),
    ] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    registry: RegistryFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Remove what interrupted registrations left; never what a version needs."""
    swept = open_named(registry).sweep(grace_hours * HOUR_S, remove=not dry_run)
    what = "would be removed" if dry_run else "removed"
    _say("\n".join([*swept, f"{len(swept)} blobs {what}"]), {"swept": swept, "removed": not dry_run}, as_json)


def _location(registry: str | None) -> str:
    if not registry:
        raise UsageError(f"say which registry: --registry, or the variable {REGISTRY_VARIABLE}")
    return registry


def open_named(registry: str | None) -> Registry:
    """The registry that the flag, or its variable, names; raises UsageError."""
    from propolis.server.opening import open_registry

    return open_registry(_location(registry))


def _pair(tag: str) -> tuple[str, str]:
    key, separator, value = tag.partition("=")
    if not separator:
        raise UsageError(f"tag '{tag}': expected KEY=VALUE")
    return key, value


def _say(text: str, result: Any, as_json: bool) -> None:
    typer.echo(json.dumps(result) if as_json else text)


def say_version(text: str, version: Version, as_json: bool) -> None:
    """Print a line of a version, or all that is known of it as JSON."""
    from propolis.server.models_text import as_dict

    _say(text, as_dict(version), as_json)


def _say_sheet(version: Version, as_json: bool) -> None:
    from propolis.server.models_text import sheet_of

    say_version(sheet_of(version), version, as_json)
