from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from torch import nn

from harness import Blobs
from propolis.secure.errors import StorageError, UsageError
from propolis.server.checkpoint import RoundRecord, RunState, load_checkpoint, save_checkpoint
from propolis.server.model import GlobalModel
from propolis.server.replies import LONGEST_FAILURE, MOST_FAILURES, lines_of
from propolis.storage import write_atomically

RECORD = RoundRecord(1, 0.5, 1.25, 10, 20, 3, 1, 0.125, 2, ["ill"], {"train-loss": 0.75})


def state() -> RunState:
    model = GlobalModel.of(Blobs().model())
    return RunState(model, (RECORD,), {"m_t/dict/000000/w": np.arange(3.0)})


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    before = state()
    save_checkpoint(tmp_path / "c", before, "run")
    after = load_checkpoint(tmp_path / "c", before.model, "run")
    assert after.history == before.history
    assert after.completed == 1
    assert list(after.model.arrays) == list(before.model.arrays)
    for name, array in before.model.arrays.items():
        np.testing.assert_array_equal(after.model.arrays[name], array)
        assert after.model.arrays[name].dtype == array.dtype
    np.testing.assert_array_equal(after.strategy["m_t/dict/000000/w"], np.arange(3.0))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", state(), "run")
    with pytest.raises(UsageError, match=r"a checkpoint of another model: 0\.bias"):
        load_checkpoint(tmp_path / "c", GlobalModel.of(nn.Linear(2, 2)), "run")


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_cut_checkpoint_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, state(), "run")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UsageError, match="is not a whole checkpoint"):
        load_checkpoint(path, state().model, "run")


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, state(), "run")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UsageError, match="its contents are not those that were written"):
        load_checkpoint(path, state().model, "run")


def test_a_changed_history_is_found(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, state(), "run")
    content = path.read_bytes()
    assert content.count(b'"accuracy": 0.5') == 1
    path.write_bytes(content.replace(b'"accuracy": 0.5', b'"accuracy": 0.9'))
    with pytest.raises(UsageError, match="its contents are not those that were written"):
        load_checkpoint(path, state().model, "run")


def test_a_history_of_more_than_a_files_metadata_can_hold_is_kept(tmp_path: Path) -> None:
    failures = lines_of(f"{number:02d}" + "\N{HONEYBEE}" * LONGEST_FAILURE for number in range(MOST_FAILURES))
    history = (replace(RECORD, failures=list(failures)),) * 2500  # 120 MB
    save_checkpoint(tmp_path / "c", replace(state(), history=history), "run")
    assert load_checkpoint(tmp_path / "c", state().model, "run").history == history


def test_a_checkpoint_of_another_format_says_what_to_do(tmp_path: Path) -> None:
    header = json.dumps({"format": 1, "run": "run", "sha256": "", "history": []})
    (tmp_path / "c").write_bytes(save({"model/w": np.zeros(1)}, metadata={"propolis": header}))
    with pytest.raises(UsageError, match="has format 1, this version reads 2: go on with the version of propolis that"):
        load_checkpoint(tmp_path / "c", state().model, "run")


def test_a_checkpoint_of_a_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", state(), "run")
    with pytest.raises(UsageError, match="a run with other settings"):
        load_checkpoint(tmp_path / "c", state().model, "another run")


def test_no_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint at"):
        load_checkpoint(tmp_path / "absent", state().model, "run")


def test_a_full_disk_leaves_the_previous_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"previous")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*the previous one is whole"):
            write_atomically(path, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"previous"
    assert list(tmp_path.iterdir()) == [path]


def in_a_process_of_its_own(path: Path, preparation: str) -> list[str]:
    """Write NEW to `path` after some preparation, and return what was printed."""
    code = (
        "import os, sys; from pathlib import Path; from propolis.storage import write_atomically\n"
        f"path = Path(sys.argv[1])\n{preparation}\nwrite_atomically(path, b'NEW')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()


@pytest.mark.parametrize("last_step", ["os.fsync", "Path.chmod", "Path.replace"])
def test_a_kill_while_writing_leaves_a_whole_file(tmp_path: Path, last_step: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    in_a_process_of_its_own(path, f"{last_step} = lambda *_: os._exit(9)")
    assert path.read_bytes() == b"old"


def test_the_file_itself_is_never_opened_for_writing_but_renamed_into_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    hook = (
        "sys.addaudithook(lambda event, args: print(event, args[0] if event == 'open' else args[1])"
        " if event in ('open', 'os.rename') else None)"
    )
    events = in_a_process_of_its_own(path, hook)
    assert path.read_bytes() == b"NEW"
    assert f"os.rename {path}" in events
    assert f"open {path}" not in events
