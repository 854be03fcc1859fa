"""Versions of a registry as text for people and as JSON for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from propolis.server.registry_records import Version
from propolis.size import format_bytes

_HEAD = ("model", "version", "created", "size", "format", "round", "accuracy", "loss", "aliases")


def as_dict(version: Version) -> dict[str, Any]:
    """A version as JSON has it; times are in ISO 8601, UTC."""
    said = asdict(version)
    said["created_at"] = _time(version.created_at)
    for evaluation in said["evaluations"]:
        evaluation["evaluated_at"] = _time(evaluation["evaluated_at"])
    for record in (said, *said["artifacts"]):
        del record["code"]  # of no use without the registry's key
    for release in said["releases"]:
        release |= {key: _time(release[key]) for key in ("created_at", "expires_at")}
    return said


def table_of(versions: Sequence[Version]) -> str:
    """A line for each version, below a head."""
    rows = [_HEAD, *(_cells(version) for version in versions)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def sheet_of(version: Version) -> str:
    """All that is known of a version, a line for each thing."""
    lineage = version.lineage
    lines = {
        "version": str(version),
        "created": _time(version.created_at),
        "sha256": version.digest,
        "size": format_bytes(version.size),
        "format": version.format,
        "aliases": ", ".join(version.aliases),
        "tags": ", ".join(f"{key}={value}" for key, value in version.tags.items()),
        "parent": lineage.parent,
        "federation": lineage.federation,
        "run": lineage.run_id,
        "round": lineage.round,
        "survivors": lineage.survivors,
        "up": None if lineage.uplink_bytes is None else format_bytes(lineage.uplink_bytes),
        "down": None if lineage.downlink_bytes is None else format_bytes(lineage.downlink_bytes),
        "metrics": figures(lineage.metrics),
        "settings": ", ".join(f"{key}={value}" for key, value in lineage.configuration.items()),
    }
    said = [f"{name:<11}{value}" for name, value in lines.items() if value not in (None, "")]
    evaluated = [f"on {each}, {_time(each.evaluated_at)}: {figures(each.metrics)}" for each in version.evaluations]
    attached = [f"{each.name}: {format_bytes(each.size)}, sha256 {each.digest}" for each in version.artifacts]
    released = [
        f"release {each.sequence}, {_time(each.created_at)}, to be installed until {_time(each.expires_at)}"
        for each in version.releases
    ]
    return "\n".join([*said, *evaluated, *attached, *released])


def figures(metrics: Mapping[str, float | None]) -> str:
    """``accuracy 0.9666, loss 0.1127``."""
    return ", ".join(f"{name} {_figure(value)}" for name, value in metrics.items())


def _cells(version: Version) -> tuple[str, ...]:
    lineage = version.lineage
    return (
        version.model,
        str(version.version),
        _time(version.created_at),
        format_bytes(version.size),
        version.format.value,
        "-" if lineage.round is None else str(lineage.round),
        _figure(lineage.metrics.get("accuracy")),
        _figure(lineage.metrics.get("loss")),
        ", ".join(version.aliases),
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
