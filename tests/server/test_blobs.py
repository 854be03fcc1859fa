from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from propolis.secure.errors import StorageError, UsageError
from propolis.server.blobs import Blobs, is_temporary, place_of
from propolis.server.urls import without_secrets

NAME, OTHER = "a" * 64, "b" * 64


@pytest.fixture(params=["folder", "object store"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A local folder, and a store of fsspec that has no folders and no rename."""
    if request.param == "folder":
        yield str(tmp_path / "blobs")
        return
    yield f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").store.clear()


def content(blobs: Blobs, name: str) -> bytes:
    with blobs.open(name) as file:
        return file.read()


def test_what_is_written_is_read_and_replaced(url: str) -> None:
    blobs = Blobs(url)
    assert not blobs.has(NAME)
    blobs.write(NAME, [b"one", b"two"])
    assert content(blobs, NAME) == b"onetwo"
    blobs.write(NAME, [b"three"])
    assert content(Blobs(url), NAME) == b"three"
    assert blobs.older_than(0) == [NAME]
    blobs.delete(NAME)
    assert not blobs.has(NAME)


def test_a_missing_blob_is_said(url: str) -> None:
    with pytest.raises(UsageError, match=f"blob {NAME} is missing"):
        content(Blobs(url), NAME)


def test_pieces_that_fail_leave_the_previous_blob_and_nothing_else(url: str) -> None:
    def fails() -> Iterator[bytes]:
        yield b"half"
        raise UsageError("the source failed")

    blobs = Blobs(url)
    blobs.write(NAME, [b"whole"])
    with pytest.raises(UsageError, match="the source failed"):
        blobs.write(NAME, fails())
    assert content(blobs, NAME) == b"whole"
    assert blobs.older_than(0) == [NAME]


def test_a_blob_is_under_its_name_only_when_it_is_whole(url: str) -> None:
    blobs, seen = Blobs(url), []

    def looks() -> Iterator[bytes]:
        yield b"a" * 100_000
        seen.append(blobs.has(NAME))
        yield b"b"

    blobs.write(NAME, looks())
    assert seen == [False]
    assert len(content(blobs, NAME)) == 100_001


def test_only_what_is_old_and_ours_is_listed(tmp_path: Path) -> None:
    blobs = Blobs(str(tmp_path))
    assert Blobs(str(tmp_path / "absent")).older_than(0) == []
    for name in (NAME, OTHER, "tmp-cut", "tmp-new", "somebody-elses.txt"):
        (tmp_path / name).write_bytes(b"")
    for name in (NAME, "tmp-cut", "somebody-elses.txt"):
        os.utime(tmp_path / name, (time.time() - 100,) * 2)
    assert blobs.older_than(50) == [NAME, "tmp-cut"]
    assert [is_temporary(name) for name in (NAME, "tmp-cut")] == [False, True]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write a blob to .*: No space left on device"):
        Blobs(str(tmp_path)).write(NAME, [b"x"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["nonsense://x", "s3://bucket/models"])
def test_a_store_without_a_driver_is_said(url: str) -> None:
    with pytest.raises(UsageError, match=f"blobs cannot be kept at {url}"):
        Blobs(url)


@pytest.mark.parametrize(
    "url",
    [
        "s3://key:se/s3cret@bucket/x",
        "ftp://user:s3cret@127.0.0.1:9/x",
        "simplecache::http://user:s3cret@127.0.0.1:9/x",
        "http://127.0.0.1:9/x?token=s3cret",
    ],
)
def test_credentials_are_refused_and_in_no_error(url: str) -> None:
    with pytest.raises(UsageError, match="leave out name, password and query") as caught:
        place_of(url)
    assert "s3cret" not in str(caught.value)
    with pytest.raises((UsageError, StorageError)) as caught:  # of a registry that was made before
        Blobs(url).has("a" * 64)
    assert "s3cret" not in str(caught.value)


def test_a_store_that_cannot_be_reached_is_said() -> None:
    with pytest.raises(StorageError, match=r"blobs cannot be kept at ftp://127.0.0.1:9/x: .*refused"):
        place_of("ftp://127.0.0.1:9/x")


def test_what_is_no_secret_is_shown() -> None:
    for url in ("s3://bucket/a", "http://host:9000/a", "sftp://user@host/a", "abfs://container@account/a", "/a:b@c"):
        assert without_secrets(url) == url
