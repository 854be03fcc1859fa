"""Private keys in files: whole, their owner's alone, and a clear line where they cannot be used."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from propolis.link.keys import load_private_key, load_signing_key, load_tls_key, passphrase_of, save_private_key
from propolis.secure.errors import UsageError

KEY = generate_private_key(SECP256R1())


@pytest.mark.parametrize("passphrase", [None, b"open sesame"])
def test_a_key_comes_back_and_is_its_owners_alone(tmp_path: Path, passphrase: bytes | None) -> None:
    before = os.umask(0)
    try:
        save_private_key(tmp_path / "key", KEY, passphrase)
    finally:
        os.umask(before)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert load_tls_key(tmp_path / "key", passphrase).private_numbers() == KEY.private_numbers()
    assert (b"ENCRYPTED" in (tmp_path / "key").read_bytes()) == (passphrase is not None)


def readable_by_group(path: Path) -> None:
    path.chmod(0o640)


def readable_by_all(path: Path) -> None:
    path.chmod(0o604)


def writable_by_all(path: Path) -> None:
    path.chmod(0o602)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir(mode=0o700)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def a_device(path: Path) -> None:
    path.unlink()
    path.symlink_to(os.devnull)


def scribbled(path: Path) -> None:
    path.write_bytes(b"no key at all\n")


def huge(path: Path) -> None:
    path.write_bytes(bytes(2**17))


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (readable_by_group, "others may read .*key.*: chmod 600 .*key"),
        (readable_by_all, "others may read .*key"),
        (writable_by_all, "others may read .*key"),
        (Path.unlink, "cannot read .*key: No such file"),
        (a_folder, "cannot read .*key: Is a directory"),
        (a_pipe, "key is a pipe, a device or the like: write the secret into a regular file"),
        (a_device, "key is a pipe, a device or the like"),
        (scribbled, "holds no private key"),
        (huge, "larger than a key can be"),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_a_key_that_cannot_be_used_says_why(tmp_path: Path, damage: Callable[[Path], None], line: str) -> None:
    save_private_key(tmp_path / "key", KEY)
    damage(tmp_path / "key")
    with pytest.raises(UsageError, match=line):
        load_private_key(tmp_path / "key")


def owned_by(uid: int) -> Callable[[int], os.stat_result]:
    """`os.fstat` where files are this user's; only root could give one away."""
    fstat = os.fstat
    return lambda descriptor: os.stat_result((*fstat(descriptor)[:4], uid, *fstat(descriptor)[5:]))


def test_a_key_is_this_users_or_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_private_key(tmp_path / "key", KEY)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for owner in (0, 1000):
        monkeypatch.setattr(os, "fstat", owned_by(owner))
        assert load_private_key(tmp_path / "key")
    monkeypatch.setattr(os, "fstat", owned_by(1001))
    with pytest.raises(UsageError, match=r"key belongs to user 1001, who may .*: run this as that user"):
        load_private_key(tmp_path / "key")


@pytest.mark.parametrize(
    ("saved", "given", "line"),
    [
        (b"right", b"wrong", "the passphrase is wrong"),
        (b"right", None, "is encrypted: give --passphrase-file"),
        (None, b"any", "is not encrypted, but there is a passphrase"),
    ],
)
def test_the_wrong_passphrase_is_one_line(tmp_path: Path, saved: bytes | None, given: bytes | None, line: str) -> None:
    save_private_key(tmp_path / "key", KEY, saved)
    with pytest.raises(UsageError, match=line):
        load_private_key(tmp_path / "key", given)


def test_a_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_private_key(tmp_path / "tls", KEY)
    save_private_key(tmp_path / "root", Ed25519PrivateKey.generate())
    assert len(load_signing_key(tmp_path / "root").public) == 32
    with pytest.raises(UsageError, match="not a key for signatures"):
        load_signing_key(tmp_path / "tls")
    with pytest.raises(UsageError, match="not a key for TLS"):
        load_tls_key(tmp_path / "root")


def test_a_passphrase_is_the_files_first_line_or_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PROPOLIS_PASSPHRASE", raising=False)
    assert passphrase_of(None) is None
    monkeypatch.setenv("PROPOLIS_PASSPHRASE", "from outside")
    assert passphrase_of(None) == b"from outside"
    file = tmp_path / "passphrase"
    file.write_bytes(b"from the file \r\nand not this\n")
    with pytest.raises(UsageError, match="others may read"):
        passphrase_of(file)
    file.chmod(0o400)
    assert passphrase_of(file) == b"from the file "


def test_an_empty_passphrase_is_none_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").touch(mode=0o600)
    with pytest.raises(UsageError, match="empty is empty"):
        passphrase_of(tmp_path / "empty")
    monkeypatch.setenv("PROPOLIS_PASSPHRASE", "")
    with pytest.raises(UsageError, match="PROPOLIS_PASSPHRASE is empty"):
        passphrase_of(None)


@pytest.mark.parametrize(
    ("passphrase", "line"),
    [
        (b"\xff\xfe", "is no text"),
        (b"open\0sesame", "is no text"),
        (b"\xed\xb3\xbf", "is no text"),  # a surrogate
        (b"x" * 1024, "has 1024 bytes, at most 1023 can be"),
    ],
)
def test_a_passphrase_that_nobody_can_type_is_one_line(tmp_path: Path, passphrase: bytes, line: str) -> None:
    file = tmp_path / "passphrase"
    file.touch(mode=0o600)
    file.write_bytes(passphrase + b"\n")
    with pytest.raises(UsageError, match=f"the passphrase in {file} {line}"):
        passphrase_of(file)


@pytest.mark.parametrize("passphrase", [b"\xff\xfe", b"x" * 1024])
def test_neither_is_one_in_the_environment(monkeypatch: pytest.MonkeyPatch, passphrase: bytes) -> None:
    monkeypatch.setitem(os.environb, b"PROPOLIS_PASSPHRASE", passphrase)
    with pytest.raises(UsageError, match="the passphrase in PROPOLIS_PASSPHRASE "):
        passphrase_of(None)


def test_the_longest_passphrase_encrypts(tmp_path: Path) -> None:
    longest = "ü".encode() * 511 + b"!"
    save_private_key(tmp_path / "key", KEY, longest)
    assert load_tls_key(tmp_path / "key", longest)
