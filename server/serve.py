"""Models of a registry that are served: read into memory, and read again where an alias is at another version."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from propolis.secure.errors import PropolisError, UsageError
from propolis.server.model_files import FLOAT32_FILE, INT8_FILE
from propolis.server.registry import Registry
from propolis.server.registry_records import Version
from propolis.serving.model import Model, load_model

CHAMPION = "champion"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A model to serve, and which version of it: an alias or a number."""

    model: str
    version: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """What NAME or NAME@VERSION says; raises UsageError."""
        model, at, version = text.partition("@")
        if not model or (at and not version):
            raise UsageError(f"--model '{text}': expected NAME, or NAME@ALIAS, or NAME@NUMBER")
        return cls(model, version or CHAMPION)


class RegistryModels:
    """The models of one registry that a server serves.

    Args:
        registry: that they are in.
        wanted: which.
        prefers_int8: take the model in int8 where a version has one.
        threads: that each computes with.
    """

    def __init__(self, registry: Registry, wanted: Sequence[Wanted], prefers_int8: bool = False, threads: int = 1):
        self._registry, self._wanted, self._threads = registry, wanted, threads
        self._files = (INT8_FILE, FLOAT32_FILE) if prefers_int8 else (FLOAT32_FILE, INT8_FILE)
        self._served: dict[Wanted, int] = {}

    def load(self) -> list[Model]:
        """All of them; none lies on a disk in clear.

        Raises:
            UsageError: there is no such model or version, or it has no file to serve.
            StorageError: the registry cannot be reached.
        """
        return [model for wanted in self._wanted if (model := self._newer(wanted)) is not None]

    def newer(self) -> list[Model]:
        """Those whose alias is at another version than the one that was returned last.

        Raises:
            UsageError, StorageError: as `load`, when there is none; one that fails keeps no other from being returned.
        """
        found, failure = list[Model](), None
        for wanted in self._wanted:
            try:
                model = self._newer(wanted)
            except PropolisError as error:
                failure = failure or error
            else:
                found += [] if model is None else [model]
        if failure is not None and not found:
            raise failure
        return found

    def _newer(self, wanted: Wanted) -> Model | None:
        version = self._registry.version(wanted.model, wanted.version)
        if version.version == self._served.get(wanted):
            return None
        model = self._load(version)
        self._served[wanted] = version.version
        return model

    def _load(self, version: Version) -> Model:
        attached = {each.name for each in version.artifacts}
        file = next((name for name in self._files if name in attached), None)
        if file is None:
            asked = f"propolis models convert {version.model} {version.version}"
            raise UsageError(f"{version} has no file to serve: {asked} makes one")
        data = self._registry.artifact(version, file)
        try:
            return load_model(data, version.model, str(version.version), self._threads)
        except UsageError as error:
            raise UsageError(f"{file} of {version}: {error}") from None
