"""The commands of whoever hands releases to the devices. What is heavy loads inside of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from propolis.server.rollout import Progress, Rollout

rollout_app = typer.Typer(help="Releases on their way to the devices.", no_args_is_help=True)

FederationFlag = Annotated[
    Path, typer.Option("--federation", metavar="DIR", help="The server's folder: roster and enrolled devices.")
]
PercentFlag = Annotated[float, typer.Option("--percent", help="Of the devices, chosen by hash.", min=0, max=100)]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The model's name.")]
SequenceFlag = Annotated[
    int | None, typer.Option("--sequence", help="Of the release; the newest that was not stopped by default.", min=1)
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]


@rollout_app.command("start")
def start(
    package: Annotated[Path, typer.Argument(metavar="PACKAGE", help="A sealed package, its keys beside it.")],
    federation: FederationFlag,
    percent: PercentFlag = 100,
    as_json: JsonFlag = False,
) -> None:
    """Hand a package to the server, which offers it to devices; one that runs notices by itself."""
    from propolis.server.rollout import start_rollout

    _say(start_rollout(federation, package, percent), as_json)


@rollout_app.command("set")
def set_percent(
    name: NameArgument,
    federation: FederationFlag,
    percent: PercentFlag,
    sequence: SequenceFlag = None,
    as_json: JsonFlag = False,
) -> None:
    """Let the newest release of a model reach more devices; those that have it keep it."""
    _change(name, federation, as_json, sequence, percent=percent)


@rollout_app.command("pause")
def pause(
    name: NameArgument, federation: FederationFlag, sequence: SequenceFlag = None, as_json: JsonFlag = False
) -> None:
    """Let no device begin with the newest release; those that have begun go on."""
    from propolis.server.rollout import Progress

    _change(name, federation, as_json, sequence, progress=Progress.PAUSED)


@rollout_app.command("resume")
def resume(
    name: NameArgument, federation: FederationFlag, sequence: SequenceFlag = None, as_json: JsonFlag = False
) -> None:
    """Go on with what was paused."""
    from propolis.server.rollout import Progress

    _change(name, federation, as_json, sequence, progress=Progress.RUNNING)


@rollout_app.command("stop")
def stop(
    name: NameArgument, federation: FederationFlag, sequence: SequenceFlag = None, as_json: JsonFlag = False
) -> None:
    """Withdraw the newest release, for good, and cut off who fetches it; who has installed it keeps it."""
    from propolis.server.rollout import Progress

    _change(name, federation, as_json, sequence, progress=Progress.STOPPED)


@rollout_app.command("show")
def show(
    federation: FederationFlag,
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Only this model, device by device.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Show the releases, and what devices say of them."""
    from propolis.server.reports import Reports
    from propolis.server.rollout import Rollouts

    rollouts, reports = Rollouts(federation), Reports(federation)
    shown = rollouts.all() if name is None else rollouts.all_of(name)
    said = {each.manifest: reports.of(each.release) for each in shown}
    if as_json:
        typer.echo(json.dumps([_as_json(each) | {"devices": _reports(said[each.manifest])} for each in shown]))
        return
    for each in shown:
        counts = _counts(said[each.manifest])
        typer.echo(f"{each.release}: {each.progress}, for {each.percent:g} % of the devices; {counts}")
        for report in said[each.manifest] if name is not None else ():
            outcome = report.outcome.name.lower().replace("_", " ")
            typer.echo(f"  device {report.device}: {outcome}{f' ({report.reason})' if report.reason else ''}")
    if not shown:
        typer.echo(f"no release has been handed over in {federation}")


def _change(
    name: str,
    federation: Path,
    as_json: bool,
    sequence: int | None,
    percent: float | None = None,
    progress: Progress | None = None,
) -> None:
    from propolis.server.rollout import Rollouts

    _say(Rollouts(federation).change(name, percent, progress, sequence), as_json)


def _say(rollout: Rollout, as_json: bool) -> None:
    text = f"{rollout.release}: {rollout.progress}, for {rollout.percent:g} % of the devices"
    typer.echo(json.dumps(_as_json(rollout)) if as_json else text)


def _as_json(rollout: Rollout) -> dict[str, Any]:
    return rollout.model_dump(mode="json")


def _reports(reports: list[Any]) -> list[dict[str, Any]]:
    return [
        {"device": each.device, "outcome": each.outcome.name.lower(), "reason": each.reason, "at": each.at}
        for each in reports
    ]


def _counts(reports: list[Any]) -> str:
    from collections import Counter

    counts = Counter(report.outcome for report in reports)
    if not counts:
        return "no device has said anything yet"
    return ", ".join(f"{count} {outcome.name.lower().replace('_', ' ')}" for outcome, count in sorted(counts.items()))
