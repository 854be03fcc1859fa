"""The models of a device as a server has them: those that are installed now, and newer ones once they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from propolis.client.infer import Installed, open_installed
from propolis.client.keyholder import Keyholder
from propolis.client.slots import Trusted, model_names, record_of
from propolis.secure.errors import PropolisError, UsageError
from propolis.secure.manifest import Manifest
from propolis.serving.attempts import Attempts
from propolis.serving.model import Model

_log = logging.getLogger("propolis.client")


class InstalledModels:
    """What is installed on a device, as models that run; one thread at a time.

    Args:
        folder: the device's.
        device: gives the device as it is when a model is opened: it may have learnt of revocations since the last one.
        names: of the models; empty for all that there are, those that are installed later included.
        threads: that one run of a model may use.
    """

    def __init__(
        self, folder: Path, device: Callable[[], Keyholder], names: Sequence[str] = (), threads: int = 1
    ) -> None:
        self._folder, self._device, self._names, self._threads = folder, device, tuple(names), threads
        self._seen: dict[str, Trusted] = {}  # what was current when its model was taken over
        self._served: dict[str, Manifest] = {}
        self._said: dict[str, str] = {}
        self._attempts = Attempts()

    def open(self) -> list[Model]:
        """The models that are installed now.

        Raises:
            UsageError: there are none, one that was named cannot be opened, or none of all can.
        """
        names, models, faults = self._names or model_names(self._folder), list[Model](), list[str]()
        if not names:
            raise UsageError(f"no model is installed in {self._folder}")
        for name in names:
            try:
                current, installed = self._look(name), self._open(name)
                self._served[name] = installed.choice.manifest
                if current is not None:
                    self._seen[name] = current
                models.append(installed.choice.model)
            except PropolisError as error:
                if self._names or len(names) == 1:
                    raise
                _log.warning("%s is not served: %s", name, error)
                faults.append(str(error))
        if not models:
            raise UsageError(f"none of the models in {self._folder} can be used: {'; '.join(faults)}")
        return models

    def newer(self) -> Iterator[Model]:
        """Those of them that have been installed since, one after the other; one that cannot be opened stays as it is.

        One counts as served once the next one, or the end, is asked for; one that fails is tried again after more and
        more looks.
        """
        for name in self._names or model_names(self._folder):
            try:
                current = self._look(name)
                installed = None if current is None else self._attempt(name, current)
            except Exception as error:  # also no file or memory left: the others do not depend on it
                self._say_once(name, str(error))
                continue
            if current is None or installed is None:
                continue
            if installed.choice.manifest != self._served.get(name):
                yield installed.choice.model
                self._served[name] = installed.choice.manifest
            self._seen[name] = current

    def _say_once(self, name: str, fault: str) -> None:
        """Log why a model cannot be replaced, but not every few seconds."""
        if self._said.get(name) != fault:
            self._said[name] = fault
            _log.warning("%s stays as it is: %s", name, fault)

    def _look(self, name: str) -> Trusted | None:
        """The release that is current, where it is another one than was taken over."""
        record = record_of(self._folder, name)
        current = record.current.release if record is not None and record.current is not None else None
        return None if current == self._seen.get(name) else current

    def _attempt(self, name: str, current: Trusted) -> Installed:
        self._attempts.require_due(name, current)
        try:
            installed = self._open(name)
        except Exception as error:
            raise self._attempts.failed(name, current, error) from None
        self._attempts.succeeded(name)
        return installed

    def _open(self, name: str) -> Installed:
        installed = open_installed(self._folder, self._device(), name, self._threads)
        _log.info("opened", extra={"release": installed.words, "fell_back": installed.fell_back})
        return installed
