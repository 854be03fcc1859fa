"""A release that carries an encrypted model: the device opens it with its key, and has its own files made of it.

The files are made in a process of its own: it takes torch, which the process that fetches need not load, changes what a
process has but once, such as the log and the random numbers that training draws, and it can be ended when it hangs.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from propolis.client.config import ClientConfig
from propolis.client.encrypted_sums import OpenedModel, open_model
from propolis.client.seal import Seal
from propolis.client.state import DeviceStore, FileStore, policy_of
from propolis.link.keys import PASSPHRASE_VARIABLE
from propolis.logs import one_line
from propolis.model_files import FLOAT32_FILE, require_exporter
from propolis.secure.errors import PeerError, PropolisError, Refusal, RefusedError
from propolis.secure.manifest import Kind, Manifest, PackagedFile
from propolis.secure.secagg.policy import Policy
from propolis.serving.golden import GOLDEN_FILE

EXPORT_S = 240.0  # torch takes some on a server's core; less than others wait for what an installation holds
_ARRAY, _GOLDEN = "array/", "golden"
_KINDS = {FLOAT32_FILE: Kind.ONNX, GOLDEN_FILE: Kind.GOLDEN}
Files = Mapping[str, bytes]


@dataclass(frozen=True, slots=True, repr=False)
class Work:
    """An opened model to make files of.

    Attributes:
        task: reference of the one that it solves.
        data: path of the device's own examples, which `Task.device_data` reads; None takes the task's.
        name, version: that it is served under.
        round: after which it was the global model.
        arrays: its weights by name.
        frozen: names of those that came in clear.
        golden: the golden batch that was released, of which the inputs are used; empty where none was.
    """

    task: str
    data: str | None
    name: str
    version: str
    round: int
    arrays: Mapping[str, np.ndarray]
    frozen: frozenset[str]
    golden: bytes = b""

    @property
    def words(self) -> str:
        """All but the arrays and the golden batch, as JSON."""
        said = {name: getattr(self, name) for name in ("task", "data", "name", "version", "round")}
        return json.dumps({**said, "frozen": sorted(self.frozen)})

    def to_bytes(self) -> bytes:
        """The arrays and the golden batch."""
        arrays = {_ARRAY + name: np.array(array, order="C") for name, array in self.arrays.items()}
        return save({**arrays, _GOLDEN: np.frombuffer(self.golden, np.uint8)})

    @classmethod
    def of(cls, words: str, data: bytes) -> Work:
        """From both parts."""
        found = load(data)
        golden, said = found.pop(_GOLDEN).tobytes(), json.loads(words)
        arrays = {name.removeprefix(_ARRAY): array for name, array in found.items()}
        return cls(**{**said, "frozen": frozenset(said["frozen"])}, arrays=arrays, golden=golden)


# Makes the files; raises PropolisError, and UsageError where the device lacks something.
Export = Callable[[Work], Files]


def export_apart(work: Work, seconds: float = EXPORT_S) -> Files:
    """`propolis.client.own_export.export_here` in a process of its own.

    Args:
        work: what is to be done.
        seconds: after which it is ended.

    Raises:
        PeerError: it failed, or took too long.
    """
    environment = {name: value for name, value in os.environ.items() if name != PASSPHRASE_VARIABLE}
    command = [sys.executable, "-m", "propolis.client.export_process", work.words]
    try:
        done = subprocess.run(
            command, input=work.to_bytes(), capture_output=True, timeout=seconds, env=environment, check=False
        )
    except subprocess.TimeoutExpired:
        raise PeerError(Refusal.EXPORT, f"the model was not exported in {seconds:g} s") from None
    except OSError as error:
        raise PeerError(Refusal.EXPORT, f"the model cannot be exported: {error.strerror}") from None
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise PeerError(Refusal.EXPORT, f"the model cannot be exported: {one_line(said[-1])[:500]}")
    return files_from(done.stdout)


def files_to(files: Files) -> bytes:
    """Files as one sequence of bytes."""
    return save({name: np.frombuffer(content, np.uint8) for name, content in files.items()})


def files_from(data: bytes) -> dict[str, bytes]:
    """What `files_to` was given; raises PeerError where it is something else."""
    try:
        return {name: array.tobytes() for name, array in load(data).items()}
    except SafetensorError:
        raise PeerError(Refusal.EXPORT, "the exported files are damaged") from None


@dataclass(frozen=True, slots=True)
class Opening:
    """How a device opens what is released encrypted.

    Attributes:
        task: reference of the task that the federation trains; None: the device was not told.
        data: path of the device's own examples; None takes those that the task brings.
        policy: what the device insists on; its floor is that of every sum it opens.
        export: makes the files of an opened model.
    """

    task: str | None = None
    data: str | None = None
    policy: Policy = field(default_factory=Policy)
    export: Export = export_apart

    @classmethod
    def told(cls, config: ClientConfig) -> Self:
        """As a device's configuration says; raises UsageError where a policy in it is none."""
        return cls(config.task, config.data, policy_of(config.node))

    def exporter(self, folder: Path, seal: Seal | None) -> Callable[[Manifest, bytes, bytes], Files] | None:
        """What an `Installer` opens encrypted models with, on the device in a folder; None without a task."""
        if self.task is None:
            return None
        return partial(self.files_of, FileStore(folder, self.policy, seal))

    def files_of(self, store: DeviceStore, manifest: Manifest, model: bytes, golden: bytes) -> Files:
        """The device's own files of an encrypted model.

        Args:
            store: the device's, with its key.
            manifest: of the release.
            model: bytes of the encrypted model.
            golden: of the golden batch; empty without one.

        Raises:
            PeerError, TrustError: the device cannot open it, or does not want to, or cannot export it.
        """
        try:
            require_exporter()
            opened = open_model(store, model)
            return self.export(self._work(manifest, opened, golden))
        except RefusedError:
            raise
        except PropolisError as error:  # what is not installed here, or not the task's
            raise PeerError(Refusal.EXPORT, str(error)) from None

    def _work(self, manifest: Manifest, opened: OpenedModel, golden: bytes) -> Work:
        version = str(manifest.model_version or manifest.sequence)
        return Work(
            self.task or "", self.data, manifest.name, version, opened.round, opened.arrays, opened.frozen, golden
        )


def encrypted_file(manifest: Manifest) -> str | None:
    """Name of the encrypted model of a release; None where it has none."""
    return next((file.name for file in manifest.files if file.kind == Kind.ENCRYPTED), None)


def golden_file(manifest: Manifest, files: Files) -> bytes:
    """The golden batch of a release; empty without one."""
    return next((files[file.name] for file in manifest.files if file.kind == Kind.GOLDEN), b"")


def as_exported(manifest: Manifest, files: Files, own: Files) -> tuple[Manifest, dict[str, bytes]]:
    """A release as it is served here: its other files, and in place of its model and golden batch the device's own.

    Args:
        manifest: of the release.
        files: its files.
        own: what the device has made of it.

    Returns:
        A manifest that lists these files and says what else was signed; and the files.
    """
    left = (Kind.ENCRYPTED, Kind.GOLDEN)
    kept = [file for file in manifest.files if file.kind not in left and file.name not in own]
    made = [
        PackagedFile(name, len(data), hashlib.sha256(data).digest(), _KINDS[name])
        for name, data in sorted(own.items())  # the same list whenever it is opened
    ]
    return replace(manifest, files=(*kept, *made)), {**{file.name: files[file.name] for file in kept}, **own}
