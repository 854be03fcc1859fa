"""A device's part of a key of homomorphic encryption: what it believes, keeps, and opens again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Command
from dying import die_at
from enrolling import DAY_S
from holding import NOW, SMALL, Holding, holding

from propolis.client.he_folder import HE_FORMER_FILE, HE_KEY_FILE, MOST_FORMER, forget_former_keys, read_he_keys
from propolis.client.he_key import install_he_key, load_he_key
from propolis.client.seal import Seal
from propolis.he_files import read_published, read_sealed_key
from propolis.secure.errors import PeerError, Refusal, StorageError, TrustError, UsageError
from propolis.secure.he.bfv import Scheme
from propolis.secure.he.held import KeyBundle
from propolis.server.he_key import Asked

Mistake = Callable[..., str]
RENEW = replace(SMALL, renew=True)


@pytest.fixture
def made(tmp_path: Path) -> Holding:
    made = holding(tmp_path, "clinic", "lab")
    made.issue()
    return made


def install(made: Holding, index: int = 0, now: float = NOW, seal: Seal | None = None) -> None:
    home = made.folder / f"device-{index}"
    home.mkdir(exist_ok=True)
    install_he_key(home, made.device(index), made.published, made.sealed(index), now, seal)


def loaded(made: Holding, index: int = 0, now: float = NOW, seal: Seal | None = None) -> object:
    return load_he_key(made.folder / f"device-{index}", made.device(index), now, seal)


def test_a_device_keeps_its_key_and_computes_with_it(made: Holding) -> None:
    assert load_he_key(made.folder, made.device(0), NOW) is None
    for index in (0, 1):
        install(made, index)
    keys = [load_he_key(made.folder / f"device-{index}", made.device(index), NOW) for index in (0, 1)]
    assert keys[0] == keys[1]
    key = keys[0]
    assert key is not None
    scheme = Scheme(key.public.parameters)
    slots = np.arange(scheme.parameters.degree, dtype=np.uint64)
    sent, _ = scheme.secret_encryptor(key.secret.secret_key, key.public.key_id).encrypt(slots)
    np.testing.assert_array_equal(scheme.decryptor(key.secret.secret_key, key.public.key_id).decrypt(sent), slots)
    assert "secret" not in repr(key)


def test_the_file_is_for_its_owner_alone_and_shows_nothing(made: Holding) -> None:
    install(made)
    path = made.folder / "device-0" / HE_KEY_FILE
    assert path.stat().st_mode & 0o777 == 0o600
    key = load_he_key(path.parent, made.device(0), NOW)
    assert key is not None
    plain = path.read_bytes()
    assert key.secret.mac_key not in plain
    assert key.secret.secret_key[:64] not in plain
    assert made.published.material in plain
    seal = Seal(b"open sesame")
    with pytest.raises(StorageError, match="not encrypted"):
        loaded(made, seal=seal)
    path.unlink()
    install(made, seal=seal)
    assert made.published.material not in path.read_bytes()
    assert loaded(made, seal=seal) == key
    for wrong in (None, Seal(b"another")):
        with pytest.raises(StorageError, match=r"is encrypted|wrong passphrase"):
            loaded(made, seal=wrong)
        with pytest.raises(StorageError, match=r"is encrypted|wrong passphrase"):
            install(made, seal=wrong)
    assert loaded(made, seal=seal) == key


def test_another_devices_part_is_not_kept(made: Holding) -> None:
    home = made.home(0)
    with pytest.raises(TrustError, match="does not open") as caught:
        install_he_key(home, made.device(0), made.published, made.sealed(1), NOW)
    assert caught.value.refusal is Refusal.HE_KEY
    assert not (home / HE_KEY_FILE).exists()


def test_an_older_key_is_refused_and_the_newer_one_stays(made: Holding) -> None:
    old = made.published, made.sealed(0)
    install(made)
    made.issue(RENEW)
    install(made)
    install(made)  # once more
    newer = loaded(made)
    with pytest.raises(TrustError, match="an older one is refused"):
        install_he_key(made.folder / "device-0", made.device(0), *old, NOW)
    assert loaded(made) == newer


def test_the_key_before_stays_beside_the_newer_one(made: Holding) -> None:
    """A model under it may still come; a file that was there before the new key is whole whatever happens."""
    seal = Seal(b"open sesame")
    install(made, seal=seal)
    first, home = loaded(made, seal=seal), made.folder / "device-0"
    (home / HE_KEY_FILE).chmod(0o600)
    made.issue(RENEW)
    install(made, seal=seal)
    install(made, seal=seal)
    assert loaded(made, seal=seal) != first
    newest, before = (KeyBundle.from_bytes(data) for data in read_he_keys(home, seal))
    assert newest.number > before.number
    assert before.material not in (home / HE_FORMER_FILE).read_bytes()
    assert (home / HE_FORMER_FILE).stat().st_mode & 0o777 == 0o600
    # The same key, sealed once more, is no key before itself.
    (made.out / "he.keys").unlink()
    made.issue(SMALL)
    install(made, seal=seal)
    assert len(read_he_keys(home, seal)) == 2
    for _ in range(MOST_FORMER + 1):
        made.issue(RENEW)
        install(made, seal=seal)
    assert len(read_he_keys(home, seal)) == 1 + MOST_FORMER
    forget_former_keys(home)
    assert len(read_he_keys(home, seal)) == 1


@pytest.mark.parametrize("step", range(1, 12))
def test_a_kill_at_any_instant_loses_no_key(made: Holding, step: int) -> None:
    install(made)
    first = loaded(made)
    made.issue(RENEW)
    die_at(step, lambda: install(made))
    home = made.folder / "device-0"
    kept = [KeyBundle.from_bytes(data).number for data in read_he_keys(home, None)]
    assert first.number in kept  # type: ignore[attr-defined]
    install(made)
    assert [KeyBundle.from_bytes(data).number for data in read_he_keys(home, None)][1:] == [first.number]  # type: ignore[attr-defined]


def test_a_damaged_file_of_former_keys_is_one_line(made: Holding) -> None:
    install(made)
    home = made.folder / "device-0"
    (home / HE_FORMER_FILE).write_bytes(b"\xff")
    with pytest.raises(StorageError, match="is damaged: remove it"):
        read_he_keys(home, None)
    made.issue(RENEW)
    with pytest.raises(StorageError, match="is damaged: remove it"):
        install(made)


def test_two_keys_with_one_number_are_one_too_many(made: Holding) -> None:
    install(made)
    before = loaded(made)
    made.holder_file.with_name("he.holder.secret").unlink()
    made.issue()  # within the same second, by a holder that has forgotten the first
    with pytest.raises(TrustError, match="another key with this number"):
        install(made)
    assert loaded(made) == before


def test_a_key_stops_when_its_holder_does(made: Holding, tmp_path: Path) -> None:
    install(made)
    loaded(made, now=NOW + DAY_S - 1)
    with pytest.raises(TrustError, match="has expired"):
        loaded(made, now=NOW + DAY_S + 1)
    made.site.federation.revoke_key_holder(1)
    for act in (loaded, install):
        with pytest.raises(TrustError, match="the key holder 1 is revoked"):
            act(made)
    # The next holder's key is taken, also where the first one said the largest number there is.
    made.holder_file = tmp_path / "next"
    made.holder = made.delegate(made.holder_file)
    made.issue(now=NOW - 3000)
    install(made)
    assert loaded(made).number == int(NOW) - 3000  # type: ignore[attr-defined]


def test_an_expired_roster_is_no_reason_to_believe(made: Holding) -> None:
    install(made)
    made.site.federation.renew_roster(NOW + 10)
    loaded(made)
    with pytest.raises(TrustError, match=r"roster .* has expired"):
        loaded(made, now=NOW + 11)


def test_a_damaged_file_is_one_line(made: Holding) -> None:
    install(made)
    path = made.folder / "device-0" / HE_KEY_FILE
    whole = path.read_bytes()
    kept = KeyBundle.from_bytes(whole)
    unsaid = replace(kept, statement=replace(kept.statement, payload=b"\xff")).to_bytes()
    for damaged in (b"", b"\xff", whole[:-1], whole + b"\xff", unsaid):
        path.write_bytes(damaged)
        for act in (loaded, install):
            with pytest.raises(StorageError, match="is damaged: remove it"):
                act(made)
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(TrustError, match="does not open"):
        loaded(made)
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match="it is no file"):
        loaded(made)


def test_files_that_hold_no_key_are_told(made: Holding) -> None:
    other = made.folder / "other"
    other.write_bytes(b"\xff" * 200)
    for read in (lambda: read_sealed_key(other, 0), lambda: read_published(other)):
        with pytest.raises(PeerError):
            read()
    with pytest.raises(UsageError, match="cannot read"):
        read_published(made.folder / "nothing")
    # One device's part may also be in a file of its own.
    other.write_bytes(made.sealed(1))
    assert read_sealed_key(other, 1) == made.sealed(1)
    with pytest.raises(PeerError, match="no key for device 0"):
        read_sealed_key(other, 0)


def test_the_command_installs_from_files(made: Holding, propolis: Command, mistake: Mistake) -> None:
    (made.folder / "word").write_text("open sesame\n")
    (made.folder / "word").chmod(0o600)
    home = made.home(0, seal=Seal(b"open sesame"))
    line = ["client", "he-key", "he/he.public", "he/he.keys", "--dir", home, "--passphrase-file", "word"]
    done = propolis(*line)
    assert done.returncode == 0, done.stderr
    assert "sums of 10 devices at most and values of 16 bits, and for updates with or without masks" in done.stdout
    assert load_he_key(home, made.device(0), NOW, Seal(b"open sesame")) is not None
    assert "cannot read" in mistake(*line[:2], "nothing", *line[3:])
    assert "is encrypted" in mistake(*line[:6])
    made.issue(Asked(masked=True, renew=True), now=NOW + 1)
    assert "and for updates under masks only" in propolis(*line).stdout
    (made.folder / "he" / "he.public").write_bytes(b"garbage")
    refused = propolis(*line)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
