"""The files of a release become a model that runs: int8 where this processor computes what was recorded, else float32.

What is tried before an installation is what is served after it, so a device never serves a file that it has not tried.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from propolis.client.install import Installer
from propolis.client.keyholder import Keyholder
from propolis.client.probe import Probe
from propolis.secure.errors import UsageError
from propolis.secure.manifest import Kind, Manifest, PackagedFile
from propolis.serving.golden import Golden
from propolis.serving.model import Model, load_model, require_self_contained

_RUNTIME = "onnxruntime"
_PREFERRED = (Kind.INT8, Kind.ONNX)
T = TypeVar("T")
_log = logging.getLogger("propolis.client")


@dataclass(frozen=True, slots=True)
class Choice:
    """The file of a release that runs on this device.

    Attributes:
        manifest: what was released.
        file: its name.
        kind: INT8 or ONNX.
        model: loaded from it, under the release's name and version.
        difference: largest, from the outputs that were recorded; 0 where none were.
    """

    manifest: Manifest
    file: str
    kind: Kind
    model: Model
    difference: float

    @property
    def is_near(self) -> bool:
        """Whether the difference is one that the manifest allows; NaN never is."""
        return self.difference <= self.manifest.trial.largest_difference


@dataclass(frozen=True, slots=True)
class Installed:
    """An installed model, ready to run.

    Attributes:
        choice: what runs.
        fell_back: it is the release before, for the current one cannot be used.
    """

    choice: Choice
    fell_back: bool

    @property
    def words(self) -> str:
        """Which one it is, for people."""
        manifest = self.choice.manifest
        return f"release {manifest.sequence} of {manifest.name}, {self.choice.file}"


def choose(manifest: Manifest, files: Mapping[str, bytes], threads: int = 1) -> Choice | None:
    """The first file, int8 before float32, whose outputs on the golden batch are near enough to the recorded ones.

    Args:
        manifest: of the release.
        files: its content, by name.
        threads: that one run may use.

    Returns:
        That one; the nearest where none is near enough; None where the release has no ONNX file.

    Raises:
        UsageError: one of the files is broken or has data elsewhere, or there is no runtime.
        InferenceError: a model does not take the golden batch, or fails on it.
    """
    found = [file for kind in _PREFERRED for file in manifest.files if file.kind == kind]
    for file in found:  # also those that are not run: the owner may leave them to other programs
        _named(file.name, partial(require_self_contained, files[file.name]))
    golden = [
        _named(f.name, partial(Golden.from_bytes, files[f.name])) for f in manifest.files if f.kind == Kind.GOLDEN
    ]
    nearest: Choice | None = None
    for choice in _tried(manifest, files, found, golden, threads):
        if choice.is_near:
            return choice
        if nearest is None or _distance(choice) < _distance(nearest):
            nearest = choice
    return nearest


def onnx_probe(
    manifest: Manifest,
    files: Mapping[str, bytes],
    *,
    threads: int = 1,
    tell: Callable[[Choice], None] = lambda _: None,
) -> float:
    """A `Probe`: the difference of what `choose` takes, 0 where there is nothing to run; `tell` hears what it was."""
    choice = choose(manifest, files, threads)
    if choice is None:
        return 0.0
    tell(choice)
    return choice.difference


def probe_of_this_device(threads: int = 1, tell: Callable[[Choice], None] = lambda _: None) -> Probe | None:
    """What tries packages here; None, and a line in the log, where no ONNX Runtime is installed."""
    if find_spec(_RUNTIME) is None:
        _log.warning("packages are installed without being tried: pip install 'propolis[serve]'")
        return None
    return partial(onnx_probe, threads=threads, tell=tell)


def open_installed(folder: Path, device: Keyholder, name: str | None = None, threads: int = 1) -> Installed:
    """A device's installed model, checked and tried again, and ready to run; its plain files are in memory only.

    Args:
        folder: the device's.
        device: that opens it.
        name: of the model; None where there is only one.
        threads: that one run may use.

    Raises:
        UsageError: there is no such model, none of its slots can be used, it has no ONNX file, or there is no runtime.
    """
    if find_spec(_RUNTIME) is None:  # else it would seem to be the slots that cannot be used
        raise UsageError("inference needs ONNX Runtime: pip install 'propolis[serve]'")
    tried = list[Choice]()
    probe = partial(onnx_probe, threads=threads, tell=tried.append)
    opened = Installer(folder, device, probe).open(name)
    choice = next((choice for choice in tried if choice.manifest is opened.manifest), None)
    if choice is None:
        raise UsageError(f"release {opened.manifest.sequence} of {opened.manifest.name} has no ONNX file to run")
    return Installed(choice, opened.fell_back)


def _tried(
    manifest: Manifest, files: Mapping[str, bytes], found: list[PackagedFile], golden: list[Golden], threads: int
) -> Iterator[Choice]:
    version = str(manifest.model_version or manifest.sequence)
    for file in found:
        load = partial(load_model, files[file.name], manifest.name, version, threads)
        model = _named(file.name, load)
        differences = [batch.difference(model, file.name) for batch in golden]
        largest = max(differences, key=_or_infinite, default=0.0)
        yield Choice(manifest, file.name, Kind(file.kind), model, largest)


def _named(file: str, act: Callable[[], T]) -> T:
    """Say of which file it is that something is wrong."""
    try:
        return act()
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None


def _distance(choice: Choice) -> float:
    return _or_infinite(choice.difference)


def _or_infinite(difference: float) -> float:
    """NaN compares with nothing; it is as far as can be."""
    return math.inf if math.isnan(difference) else difference
