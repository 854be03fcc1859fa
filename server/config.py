"""What a server process is told besides the settings of its run: the table ``[server]`` of its TOML file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from propolis.secure.errors import UsageError
from propolis.settings import Settings, build, given, read_toml

# Settings that describe simulated devices: real ones are as they are.
SIMULATED_ONLY = frozenset({"clients", "partition", "dropout", "backend", "workers", "ray_cpus"})
NOWHERE = "none"
_LARGEST_MB = 2**30


class ServerConfig(BaseModel):
    """A server process. Frozen; unknown keys are refused; a description is the flag's help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    federation: str = Field(
        "federation/server", description="Folder with the roster and the server's certificate and key."
    )
    listen: str = Field("0.0.0.0:7441", description="HOST:PORT that devices connect to, with their certificates.")
    enroll: str = Field("0.0.0.0:7442", description="HOST:PORT that new devices enrol at; none to enrol nobody.")
    out: str = Field("runs/server", description="Folder for checkpoints and results; a run there is gone on with.")
    wait_for: int | None = Field(
        None, ge=1, description="Devices that must be connected before the first round; min_clients by default."
    )
    wait_seconds: float = Field(3600.0, gt=0, description="How long the server waits for them.")
    app: str | None = Field(None, description="MODULE:NAME of a Flower ServerApp to run in place of the ready one.")
    heartbeat: int = Field(10, ge=1, le=3600, description="Seconds in which each side of a connection is heard.")
    largest_message: int = Field(4096, ge=1, le=_LARGEST_MB, description="Largest reply of a device, in MiB.")
    registry: str | None = Field(
        None, description="Folder or PostgreSQL URL of the registry that the model goes to when the run is complete."
    )
    model: str | None = Field(None, description="Its name in the registry; the task's by default.")
    serve: list[str] = Field(
        [], description="NAME or NAME@VERSION of the registry, to answer inference with; may be repeated."
    )
    serve_listen: str = Field(
        "127.0.0.1:8001",
        description="HOST:PORT of inference; on another host than this one, for the federation's devices alone.",
    )
    serve_metrics: str = Field("127.0.0.1:8002", description="HOST:PORT of inference's /metrics; none for none.")
    delivery_rate: int = Field(
        0, ge=0, le=_LARGEST_MB, description="KiB per second that all devices together fetch models with; 0: no bound."
    )
    he_key: str | None = Field(
        None, description="Folder with he.public and he.keys, for protection he; he in the federation's by default."
    )
    stay: bool = Field(False, description="Stay when the run is over: for enrolment, and to deliver models.")
    idle: bool = Field(False, description="Run no job: only let devices enrol and fetch models.")
    log_format: Literal["text", "json"] = Field("text", description="How the log is written to standard error.")


@dataclass(frozen=True, slots=True)
class Served:
    """All that a server process is told.

    Attributes:
        settings: of the run.
        config: of the process.
        run_config: for the apps of Flower that run in place of the ready ones.
    """

    settings: Settings
    config: ServerConfig
    run_config: dict[str, Any]


def load_served(path: Path | None, flags: Mapping[str, Any]) -> Served:
    """What a TOML file says, with flags on top: settings at the top level, ``[server]`` and ``[run-config]`` below.

    Raises:
        UsageError: as `load_settings` does.
    """
    values = read_toml(path) if path else {}
    source = str(path) if path else "settings"
    server, run_config = (_table(values.pop(name, {}), f"{source}: {name}") for name in ("server", "run_config"))
    for name, value in given(flags).items():
        (server if name in ServerConfig.model_fields else values)[name] = value
    config = build(ServerConfig, server, f"{source}, table [server]")
    if unfit := sorted(SIMULATED_ONLY & values.keys()):
        raise UsageError(f"{source}: {unfit[0]} is for simulated devices; the server takes those that connect")
    devices = config.wait_for or max(values.get("min_clients") or 0, _fewest(values))
    fewest = {"min_clients": min(devices, 2)}
    settings = build(Settings, {**fewest, **values, "clients": devices, "backend": "link"}, source)
    if odd := [name for name, value in run_config.items() if not isinstance(value, (bool, int, float, str))]:
        raise UsageError(f"{source}, table [run-config]: {odd[0]} must be a number, true, false or a text")
    return Served(settings, config, run_config)


def _fewest(values: Mapping[str, Any]) -> int:
    """Devices that a round takes at least: three in a secure sum."""
    return 3 if values.get("protection", "none") != "none" else 2


def _table(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UsageError(f"{source}: expected a table, got {value!r}")
    return value
