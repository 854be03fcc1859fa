"""Models of a registry that are served: read into memory, and read again where an alias is at another version."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from propolis.model_files import FLOAT32_FILE, INT8_FILE
from propolis.secure.errors import UsageError
from propolis.server.registry import Registry
from propolis.server.registry_records import Version
from propolis.server.release import LARGEST_DIFFERENCE
from propolis.serving.attempts import Attempts
from propolis.serving.faults import InferenceError
from propolis.serving.golden import GOLDEN_FILE, Golden
from propolis.serving.model import Model, load_model

CHAMPION = "champion"
_log = logging.getLogger("propolis.server")


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

    A version with a golden batch is tried before it is served, as devices do; the file in int8 may compute something
    else on this processor, and then that in float32 takes its place.

    Args:
        registry: that they are in.
        wanted: which.
        prefers_int8: take the model in int8 where a version has one.
        threads: that each computes with.
    """

    def __init__(self, registry: Registry, wanted: Sequence[Wanted], prefers_int8: bool = False, threads: int = 1):
        self._registry, self._wanted, self._threads = registry, wanted, threads
        self._prefers_int8 = prefers_int8
        self._served: dict[Wanted, int] = {}
        self._attempts = Attempts()

    def load(self) -> list[Model]:
        """All of them; none lies on a disk in clear.

        Raises:
            UsageError: there is no such model or version, or it has no file that can be served.
            StorageError: the registry cannot be reached.
        """
        found = []
        for wanted in self._wanted:
            version = self._registry.version(wanted.model, wanted.version)
            found.append(self._load(version))
            self._served[wanted] = version.version
        return found

    def newer(self) -> Iterator[Model]:
        """Those whose alias is at another version than the one that is served, one after the other.

        One counts as served once the next one, or the end, is asked for. One that fails keeps no other from being
        given. It is tried again after more and more looks, but not while what it is made of is the same and wrong.

        Raises:
            UsageError, StorageError: as `load`, in the end.
        """
        failure: Exception | None = None
        for wanted in self._wanted:
            try:
                version = self._registry.version(wanted.model, wanted.version)
                if version.version == self._served.get(wanted):
                    continue
                model = self._attempt(wanted, version)
            except Exception as error:  # of whatever the registry's files lie in
                failure = failure or error
            else:
                yield model
                self._served[wanted] = version.version
        if failure is not None:
            raise failure

    def _attempt(self, wanted: Wanted, version: Version) -> Model:
        what = (version.version, version.artifacts)
        self._attempts.require_due(wanted, what)
        try:
            model = self._load(version)
        except _UnusableError as error:
            raise self._attempts.failed(wanted, what, error, lasting=True) from None
        except Exception as error:
            raise self._attempts.failed(wanted, what, error) from None
        self._attempts.succeeded(wanted)
        return model

    def _load(self, version: Version) -> Model:
        """The first of its files that computes what it must; raises _UnusableError."""
        try:
            version.require_readable("to serve it")
        except UsageError as error:
            raise _UnusableError(str(error)) from None
        attached = {each.name for each in version.artifacts}
        files = [file for file in (INT8_FILE, FLOAT32_FILE) if file in attached]
        if not files:
            asked = f"propolis models convert {version.model} {version.version}"
            raise _UnusableError(f"{version} has no file to serve: {asked} makes one")
        golden = self._registry.artifact(version, GOLDEN_FILE) if GOLDEN_FILE in attached else None
        faults = list[str]()
        for file in files if self._prefers_int8 else files[-1:]:
            try:
                model = self._try(version, file, golden)
            except _UnusableError as error:
                faults.append(str(error))
            else:
                if faults:
                    _log.warning("%s is served instead: %s", file, faults[0])
                return model
        raise _UnusableError("; ".join(faults))

    def _try(self, version: Version, file: str, golden: bytes | None) -> Model:
        data = self._registry.artifact(version, file)
        try:
            model = load_model(data, version.model, str(version.version), self._threads)
            difference = 0.0 if golden is None else Golden.from_bytes(golden).difference(model, file)
        except (UsageError, InferenceError) as error:
            raise _UnusableError(f"{file} of {version}: {error}") from None
        if not difference <= LARGEST_DIFFERENCE:  # NaN never is
            limit = f"differ by {difference:g}, {LARGEST_DIFFERENCE:g} at most"
            raise _UnusableError(f"{file} of {version}: outputs on the golden batch {limit}")
        return model


class _UnusableError(UsageError):
    """A version's files are whole, and cannot be served."""
