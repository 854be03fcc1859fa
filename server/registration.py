"""What becomes of the model of a run that is complete: a version of a registry, with where it comes from."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from propolis.secure.errors import UsageError
from propolis.server.opening import open_or_make, open_registry
from propolis.server.registry_records import Lineage, Version, finite, require_name
from propolis.server.report import CONFIG, ENCRYPTED_MODEL, MODEL, RESULT
from propolis.settings import load_settings
from propolis.storage import write_once

if TYPE_CHECKING:
    from propolis.server.registry import Registry

# Names a run for good, so that one which is registered again is known.
RUN = "run.json"


@dataclass(frozen=True, slots=True)
class Registration:
    """Where the model of a run goes when it is complete.

    Attributes:
        registry: a folder, or a URL of PostgreSQL.
        model: name of the model that it becomes a version of.
    """

    registry: str
    model: str

    @classmethod
    def asked(cls, registry: str | None, model: str | None, task: str) -> Self | None:
        """What the flags ask for: None without a registry; the model has the task's name unless it has its own.

        Raises:
            UsageError: the name is not usable, or there is one without a registry.
        """
        if registry is None:
            if model is not None:
                raise UsageError("model: say in which registry, with --registry")
            return None
        return cls(registry, require_name(model or re.sub(r"[^A-Za-z0-9._-]", ".", task)))

    def prepare(self) -> str | None:
        """Make the registry where there is none, before a run spends hours; returns what its owner must know then.

        Raises:
            UsageError: it is not usable.
        """
        return open_or_make(self.registry)[1]

    def register(self, out: Path, federation: bytes | None) -> dict[str, Any]:
        """Register the run that is complete in `out`.

        Args:
            out: its folder.
            federation: fingerprint of the federation's root, where there is one.

        Returns:
            The registry, the model and the version, under the key ``registered``.

        Raises:
            UsageError: it could not be registered; the folder holds the run.
        """
        registry = open_registry(self.registry)
        version = register_run(registry, self.model, out, federation)
        return {"registered": {"registry": registry.name, "model": version.model, "version": version.version}}


def register_run(
    registry: Registry, model: str, out: Path, federation: bytes | None = None, parent: int | None = None
) -> Version:
    """Register the model of a complete run, encrypted where that is what it left; again, it is the version that it was.

    Args:
        registry: where to.
        model: name of the model that it becomes a version of.
        out: folder of the run.
        federation: fingerprint of the federation's root, where it is known.
        parent: version that the run began with.

    Raises:
        UsageError: the folder holds no run that is complete.
        StorageError: it could not be registered.
    """
    result = _result_of(out)
    identity = _identity_of(out, federation)
    last = result["history"][-1]
    settings = load_settings(out / CONFIG)
    figures = {"accuracy": last["accuracy"], "loss": last["loss"], **last["metrics"]}
    lineage = Lineage(
        federation=identity["federation"],
        run_id=identity["run_id"],
        round=last["round"],
        parent=parent,
        configuration=settings.model_dump(exclude_none=True),
        metrics=finite({name: value for name, value in figures.items() if value is not None}),
        uplink_bytes=result["uplink_bytes"],
        downlink_bytes=result["downlink_bytes"],
        survivors=last["survivors"],
    )
    return registry.register(model, out / (ENCRYPTED_MODEL if settings.is_encrypted else MODEL), lineage)


def _result_of(out: Path) -> Mapping[str, Any]:
    result = _read(out / RESULT)
    if result.get("status") != "completed" or not result.get("history"):
        raise UsageError(f"the run in {out} is not complete: only complete ones are registered")
    return result


def _identity_of(out: Path, federation: bytes | None) -> Mapping[str, Any]:
    """The run's own name, drawn when it is registered first."""
    if (out / RUN).exists():
        return _read(out / RUN)
    identity = {"run_id": secrets.token_hex(16), "federation": federation.hex() if federation else None}
    write_once(out / RUN, json.dumps(identity).encode() + b"\n")  # the first of two who register it at once
    return _read(out / RUN)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path.parent} holds no run: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} is damaged: expected an object")
    return content
