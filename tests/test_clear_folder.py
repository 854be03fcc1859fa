"""A model that must lie in a file for a moment lies in memory, and nowhere after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx_models import proto_of, value

from propolis import clear_folder as module
from propolis.clear_folder import clear_folder, temporary_files_in
from propolis.secure.errors import UsageError

WEIGHTS = np.random.default_rng(7).normal(size=(32, 32)).astype(np.float32)
LONG_RUN = WEIGHTS.tobytes()[1024:1536]
DYING = """
import os, signal, sys
from pathlib import Path
import onnxruntime.quantization as library
import torch
from propolis import clear_folder, export
clear_folder.IN_MEMORY = Path(sys.argv[2])
done = library.quantize_static
def then_die(*arguments, **options):
    done(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
library.quantize_static = then_die
export.quantize_int8(Path(sys.argv[1]).read_bytes(), export.Origin("m", "1", "t", "d"), torch.randn(8, 32))
"""


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "disk"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


def killed_after_quantizing(folder: Path, memory: Path) -> None:
    nodes = [helper.make_node("MatMul", ["input", "w"], ["output"])]
    ends = (value(name, TensorProto.FLOAT, "batch", 32) for name in ("input", "output"))
    (folder / "model").write_bytes(proto_of(nodes, [next(ends)], [next(ends)], {"w": WEIGHTS}).SerializeToString())
    assert LONG_RUN in (folder / "model").read_bytes()
    done = subprocess.run([sys.executable, "-c", DYING, folder / "model", memory], check=False, cwd=folder)
    assert done.returncode == -signal.SIGKILL
    (folder / "model").unlink()


def with_weights(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and LONG_RUN in path.read_bytes()]


def test_a_kill_while_it_is_quantized_leaves_no_model_on_a_disk(disk: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    killed_after_quantizing(disk, memory)
    assert with_weights(disk) == []
    assert with_weights(memory), "it was killed while the model was there"
    assert {path.stat().st_mode & 0o777 for path in memory.iterdir()} == {0o700}


def test_where_there_is_no_memory_the_next_one_removes_what_a_kill_left(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_after_quantizing(disk, tmp_path / "absent")
    assert with_weights(disk / f"propolis-{os.getuid()}")
    monkeypatch.setattr(module, "IN_MEMORY", tmp_path / "absent")
    with clear_folder(1):
        assert with_weights(disk) == []


def test_one_that_is_in_use_is_left_alone(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IN_MEMORY", disk)
    with clear_folder(1) as first:
        with clear_folder(1) as second:
            assert first.is_dir()
            assert second != first
        assert not second.exists()
        assert first.is_dir()


def test_memory_without_room_is_not_used(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(module, "IN_MEMORY", memory)
    with clear_folder(1) as folder:
        assert folder.is_relative_to(memory)
    with clear_folder(2**60) as folder:
        assert folder.is_relative_to(disk)


def test_a_folder_that_others_may_enter_is_refused(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IN_MEMORY", disk)
    home = disk / f"propolis-{os.getuid()}"
    home.mkdir()
    home.chmod(0o755)
    with pytest.raises(UsageError, match="must be a folder of your own"), clear_folder(1):
        pass
    home.rmdir()
    (disk / "elsewhere").mkdir(mode=0o700)
    home.symlink_to(disk / "elsewhere")
    with pytest.raises(UsageError, match="must be a folder of your own"), clear_folder(1):
        pass


def test_temporary_files_of_libraries_lie_there(disk: Path, tmp_path: Path) -> None:
    with temporary_files_in(tmp_path):
        assert tempfile.gettempdir() == str(tmp_path)
    assert tempfile.gettempdir() == str(disk)
