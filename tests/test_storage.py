"""Files are whole or absent, and what a killed write leaves beside one does not stay."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from enrolling import Applicant, Site

from harness import Blobs
from propolis.link.keys import save_private_key
from propolis.secure.errors import StorageError
from propolis.server.checkpoint import RunState, save_checkpoint
from propolis.server.model import GlobalModel
from propolis.storage import remove_stale, write_atomically, write_once

KILLED = """
import os, signal, sys
from pathlib import Path
from propolis.storage import write_atomically
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), b"secret")
"""


def test_what_a_killed_write_leaves_is_found(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "key")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"secret"]
    remove_stale(tmp_path / "key")
    assert [*tmp_path.iterdir()] == []


def test_no_other_file_is_taken_for_a_left_one(tmp_path: Path) -> None:
    others = {"key", "key.a1b2c3d4", ".key.pem.a1b2c3d4", ".key.a1b2c3d4e", ".kex.a1b2c3d4", "k[e]x"}
    for name in others:
        (tmp_path / name).touch()
    for name in ("key", "k[e]x", "missing"):
        remove_stale(tmp_path / name)
    assert {*os.listdir(tmp_path)} == others  # noqa: PTH208


def test_where_nothing_can_be_removed_it_is_the_write_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "scandir", exhausted)
    monkeypatch.setattr(os, "open", exhausted)
    with pytest.raises(StorageError, match=r"cannot write .*key: Too many open files"):
        save_private_key(tmp_path / "key", Ed25519PrivateKey.generate())


def a_key(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "root.key"
    return path, lambda: save_private_key(path, Ed25519PrivateKey.generate())


def a_token(folder: Path) -> tuple[Path, Callable[[], object]]:
    site = Site(folder / "fed")
    return site.folder / "invitations" / "0", site.token


def a_member(folder: Path) -> tuple[Path, Callable[[], object]]:
    site = Site(folder / "fed")
    device = Applicant(site.token())
    return site.server / "enrolled" / "0", lambda: site.membership.admit(0, device.state.descriptor)


def a_checkpoint(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "checkpoint"
    return path, lambda: save_checkpoint(path, RunState(GlobalModel.of(Blobs().model()), (), {}), "run")


@pytest.mark.parametrize("kind", [a_key, a_token, a_member, a_checkpoint])
def test_the_next_write_removes_what_a_killed_one_left(
    tmp_path: Path, kind: Callable[[Path], tuple[Path, Callable[[], object]]]
) -> None:
    path, write = kind(tmp_path)
    left = path.with_name(f".{path.name}.a1b2c3d4")
    left.write_bytes(b"old secrets")
    write()
    assert path.is_file()
    assert not left.exists()


def test_what_is_written_at_this_moment_is_not_removed(tmp_path: Path) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"first"
        remove_stale(tmp_path / "model")
        yield b" and second"

    write_atomically(tmp_path / "model", pieces())
    assert (tmp_path / "model").read_bytes() == b"first and second"


def test_what_is_written_once_stays_whoever_comes_second(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        write_once(tmp_path / "key", content, 0o600)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
