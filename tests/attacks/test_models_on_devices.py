"""What a model, or whoever has a lost release key, can do to a device that tries it: nothing but be refused."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_models import PLACES, external, linear_proto
from releasing import NOW, Publisher, key_for
from runnable import FLOAT, INPUTS, INT8, Files, outputs_of, release

from propolis.client.infer import onnx_probe, open_installed
from propolis.client.install import Outcome, Status
from propolis.client.probe import Probe
from propolis.secure.errors import PeerError, Refusal, StorageError
from propolis.secure.manifest import Kind, Manifest, Trial


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    """Its device has release 1."""
    made = Publisher(tmp_path)
    package = made.seal(1, release(1.0))
    made.device(probe=onnx_probe).install(package, key_for(package), NOW)
    return made


def require_old(publisher: Publisher) -> None:
    """The device still computes with release 1, which is in the slot that it was in."""
    found = open_installed(publisher.folder / "device-0", publisher.keyholder())
    assert (found.choice.manifest.sequence, found.fell_back) == (1, False)
    assert np.array_equal(found.choice.model.run(INPUTS)["output"], outputs_of(1.0))


def refused(publisher: Publisher, files: Files, probe: Probe = onnx_probe, **facts: Any) -> str:
    package, steps = publisher.seal(2, files, **facts), list[Status]()
    with pytest.raises(PeerError) as caught:
        publisher.device(probe=probe, tell=steps.append).install(package, key_for(package), NOW)
    assert caught.value.refusal is Refusal.PROBE
    assert steps[-1] == Status(Outcome.FAILED, "probe")
    require_old(publisher)
    return str(caught.value)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(("file", "kind"), [(FLOAT, Kind.ONNX), (INT8, Kind.INT8)])
def test_a_signed_model_that_refers_to_other_files_is_refused(
    publisher: Publisher, where: str, file: str, kind: Kind
) -> None:
    """Also where the other file of the package runs: with --store-plain another program would open this one."""
    files = {**release(2.0), file: (external(where).SerializeToString(), kind)}
    assert f"{file}: the model has external data" in refused(publisher, files)


def test_a_model_that_names_an_address_in_memory_is_refused(publisher: Publisher) -> None:
    model = linear_proto()
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.external_data.add(key="location", value="*/_ORT_MEM_ADDR_/*")
    assert "external data" in refused(publisher, {**release(2.0), FLOAT: (model.SerializeToString(), Kind.ONNX)})


@pytest.mark.parametrize("data", [b"", b"PK", b"weights" * 100], ids=["empty", "short", "long"])
@pytest.mark.parametrize(("file", "kind"), [(FLOAT, Kind.ONNX), (INT8, Kind.INT8), ("golden.npz", Kind.GOLDEN)])
def test_a_file_that_is_not_what_it_is_said_to_be_is_refused(
    publisher: Publisher, data: bytes, file: str, kind: Kind
) -> None:
    assert f"{file}: this is no " in refused(publisher, {**release(2.0), file: (data, kind)})


@pytest.mark.parametrize("factors", [(9.0, 9.0), (9.0, np.nan), (np.nan, np.nan)], ids=str)
def test_a_model_that_computes_something_else_leaves_the_old_one(
    publisher: Publisher, factors: tuple[float, float]
) -> None:
    files = release(2.0, int8=factors[0], runs_as=factors[1])
    assert "outputs on the golden batch differ by" in refused(publisher, files)


def _fails(_: Manifest, __: Mapping[str, bytes]) -> float:
    raise MemoryError("no")


def _hangs(_: Manifest, __: Mapping[str, bytes]) -> float:
    return float(threading.Event().wait(30))


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        (_fails, "does not run: MemoryError"),
        (_hangs, "has not answered the golden batch in 0.05 s"),
        (lambda *_: float("nan"), "differ by nan"),
    ],
    ids=["fails", "hangs", "nan"],
)
def test_a_trial_that_fails_hangs_or_gives_nan_leaves_the_old_model(
    publisher: Publisher, probe: Probe, message: str
) -> None:
    assert message in refused(publisher, release(2.0), probe, trial=Trial(1e-3, 0.05))


def _full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _no_room_to_write(patch: pytest.MonkeyPatch) -> None:
    """A file can be made and takes nothing."""
    make = tempfile.NamedTemporaryFile

    def making(*arguments: Any, **options: Any) -> Any:
        made = make(*arguments, **options)
        made.write = _full
        return made

    patch.setattr(tempfile, "NamedTemporaryFile", making)


FULL: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "write": _no_room_to_write,
    "flush": lambda patch: patch.setattr(os, "fsync", _full),  # where the file system gives out room late
    "new file": lambda patch: patch.setattr(tempfile, "NamedTemporaryFile", _full),
    "new folder": lambda patch: patch.setattr(tempfile, "mkdtemp", _full),
    "rename": lambda patch: patch.setattr(Path, "rename", _full),
}


@pytest.mark.parametrize("is_noted", [False, True])
@pytest.mark.parametrize("where", FULL)
def test_a_disk_that_is_full_while_installing_keeps_the_old_model_and_says_so(
    publisher: Publisher, where: str, is_noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first write, which notes that the release is trusted, or, where that is noted, when the slot is filled."""
    package, steps = publisher.seal(2, release(2.0)), list[Status]()

    def install(probe: Probe = onnx_probe) -> None:
        publisher.device(probe=probe, tell=steps.append).install(package, key_for(package), NOW)

    if is_noted:
        with pytest.raises(PeerError):
            install(_fails)
    with monkeypatch.context() as patch:
        FULL[where](patch)
        with pytest.raises(StorageError, match="No space left on device") as caught:
            install()
    assert steps[-1] == Status(Outcome.FAILED, "storage")
    words = "release 1 of digits is what is installed", "the previous one is whole"
    assert str(caught.value).endswith(words if not is_noted else words[0])
    require_old(publisher)
    install()
    found = open_installed(publisher.folder / "device-0", publisher.keyholder())
    assert np.array_equal(found.choice.model.run(INPUTS)["output"], outputs_of(2.0))
    slots = publisher.folder / "device-0/models/digits/slots"
    assert sorted(path.name for path in slots.iterdir()) == ["a", "b"]
