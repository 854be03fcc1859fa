"""The holder's side of a key of homomorphic encryption: for whom it is made, and what it leaves where."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Command
from enrolling import DAY_S, Applicant, Site
from holding import NOW, SMALL, Holding, holding

from propolis.client.he_key import open_for
from propolis.he_files import read_published, sealed_keys
from propolis.secure.errors import PeerError, Refusal, TrustError, UsageError
from propolis.secure.he.keys import open_key, verify_holder
from propolis.secure.he.published import accept_key
from propolis.secure.identity import descriptor_digest
from propolis.server.he_held import load_held
from propolis.server.he_holder import load_holder_key, make_holder_key
from propolis.server.he_key import Asked
from propolis.server.release_key import make_release_key
from propolis.server.roster import load_roster

Mistake = Callable[..., str]

CRASH = """
import os, sys
from pathlib import Path
at, replaced, real = int(sys.argv[1]), [], Path.replace
def dying(self, target):
    replaced.append(target)
    if len(replaced) == at:
        os._exit(9)
    return real(self, target)
Path.replace = dying
from propolis.cli import main
sys.argv = ["propolis", *sys.argv[2:]]
main()
"""


@pytest.fixture
def made(tmp_path: Path) -> Holding:
    return holding(tmp_path, "clinic", "lab")


def members_of(made: Holding) -> list[int]:
    held = load_held(made.holder_file.with_name("he.holder.secret"), made.holder.key)
    assert held is not None
    return [member.index for member in held.members]


# Who may make keys.


def test_release_keys_and_key_holders_share_their_numbers(made: Holding, tmp_path: Path) -> None:
    site = made.site
    assert made.holder.claimed.serial == 1
    assert make_release_key(site.federation, tmp_path / "release", DAY_S, NOW).claimed.serial == 2
    assert made.delegate(tmp_path / "second").claimed.serial == 3
    assert site.federation.revoke_key_holder(3)
    assert not site.federation.revoke_key_holder(3)
    for folder in ("he-holders", "releases"):
        shutil.rmtree(site.folder / folder)
    assert make_release_key(site.federation, tmp_path / "other", DAY_S, NOW).claimed.serial == 4
    assert made.delegate(tmp_path / "third").claimed.serial == 5
    assert load_roster(site.server).roster.revoked_releases == (3,)


def test_one_kind_is_not_revoked_as_the_other(made: Holding, tmp_path: Path) -> None:
    make_release_key(made.site.federation, tmp_path / "release", DAY_S, NOW)
    with pytest.raises(UsageError, match="there is no key holder 2"):
        made.site.federation.revoke_key_holder(2)
    with pytest.raises(UsageError, match="there is no release key 1"):
        made.site.federation.revoke_release_key(1)
    assert load_roster(made.site.server).roster.revoked_releases == ()


def test_a_holders_key_is_for_its_owner_alone_and_goes_with_its_delegation(made: Holding, tmp_path: Path) -> None:
    assert made.holder_file.stat().st_mode & 0o777 == 0o600
    loaded = load_holder_key(made.holder_file)
    assert (loaded.key.private, loaded.delegation) == (made.holder.key.private, made.holder.delegation)
    assert verify_holder(made.trust.root_key, made.trust.roster, loaded.delegation, NOW).public_key == loaded.key.public
    with pytest.raises(UsageError, match="exists: give another --out"):
        made.delegate(made.holder_file)
    other = tmp_path / "other"
    locked = make_holder_key(made.site.federation, other, DAY_S, NOW, b"open sesame")
    assert locked.key.private not in other.read_bytes()
    with pytest.raises(UsageError, match="is encrypted"):
        load_holder_key(other)
    assert load_holder_key(other, b"open sesame").key.private == locked.key.private
    beside = made.holder_file.with_name("he.holder.delegation")
    beside.write_bytes((tmp_path / "other.delegation").read_bytes())
    with pytest.raises(UsageError, match="is of another key"):
        load_holder_key(made.holder_file)
    beside.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is damaged"):
        load_holder_key(made.holder_file)
    beside.unlink()
    with pytest.raises(UsageError, match="which goes with"):
        load_holder_key(made.holder_file)


def test_a_holder_is_never_in_the_servers_folder(made: Holding) -> None:
    server = made.site.server
    with pytest.raises(UsageError, match="in the server's folder"):
        made.delegate(server / "he.holder")
    assert not (server / "he.holder").exists()
    inside = made.copy / "he.holder"
    for suffix in ("", ".delegation"):
        shutil.copy(f"{made.holder_file}{suffix}", f"{inside}{suffix}")
    made.holder_file = inside
    with pytest.raises(UsageError, match="in the server's folder"):
        made.issue(federation=inside.parent)
    assert not inside.with_name("he.holder.secret").exists()


@pytest.mark.parametrize("fault", ["expired", "early", "revoked", "another root's", "nobody's"])
def test_who_is_no_holder_makes_no_key(made: Holding, tmp_path: Path, fault: str) -> None:
    now = NOW + {"expired": 2 * DAY_S, "early": -2 * DAY_S}.get(fault, 0.0)
    if fault == "revoked":
        made.site.federation.revoke_key_holder(1)
    elif fault == "another root's":
        elsewhere = Site(tmp_path / "elsewhere")
        made.holder = make_holder_key(elsewhere.federation, tmp_path / "stranger", DAY_S, NOW)
    elif fault == "nobody's":
        release = make_release_key(made.site.federation, tmp_path / "release", DAY_S, NOW)
        made.holder = replace(made.holder, key=release.key, delegation=release.delegation)
    with pytest.raises(TrustError) as caught:
        made.issue(now=now)
    assert caught.value.refusal is Refusal.HE_KEY
    assert not made.out.exists()


def test_an_expired_roster_makes_no_key(made: Holding) -> None:
    made.site.federation.renew_roster(NOW - 1)
    with pytest.raises(TrustError, match=r"roster .* has expired"):
        made.issue()


# A key for everybody.


def test_each_device_opens_its_part_of_a_key(made: Holding) -> None:
    issued = made.issue()
    assert (issued.is_new, issued.sealed, issued.devices) == (True, (0, 1), 2)
    parameters = issued.key.parameters
    assert (parameters.clients, parameters.value_bits, parameters.seeded) == (10, 16, True)
    accepted = accept_key(read_published(made.out / "he.public"), made.trust, NOW)
    assert (accepted.key, accepted.number, accepted.serial) == (issued.key, issued.number, 1)
    opened = [open_for(made.device(index), made.published, made.sealed(index), NOW) for index in (0, 1)]
    assert opened[0].secret == opened[1].secret
    assert opened[0].public == issued.key
    assert load_held(made.holder_file.with_name("he.holder.secret"), made.holder.key).secret == opened[0].secret  # type: ignore[union-attr]


def test_another_devices_part_does_not_open(made: Holding) -> None:
    key = made.issue().key
    one = made.devices[0].state
    with pytest.raises(TrustError, match="does not open"):
        open_for(made.device(1), made.published, made.sealed(0), NOW)
    with pytest.raises(TrustError, match="does not open"):  # nor with another's descriptor
        open_key(made.sealed(0), key, descriptor_digest(made.devices[1].state.descriptor), one.hpke_private)
    with pytest.raises(PeerError, match="no key for device 2"):
        made.sealed(2)


def test_the_server_has_nothing_secret(made: Holding) -> None:
    """Neither the folder that a server has, nor what it gets from the holder, has a byte of the secret part."""
    made.issue(Asked(clients=10, seeded=False))
    for name in ("he.public", "he.keys"):
        shutil.copy(made.out / name, made.site.server)
    held = load_held(made.holder_file.with_name("he.holder.secret"), made.holder.key)
    assert held is not None
    secrets = [held.mac_key, made.holder.key.private]
    secrets += [held.secret_key[at : at + 16] for at in range(0, len(held.secret_key), len(held.secret_key) // 64)]
    files = [path for folder in (made.site.server, made.out, made.copy) for path in folder.rglob("*") if path.is_file()]
    assert {"he.public", "he.keys", "roster.bin"} <= {path.name for path in files}
    for path in files:
        data = path.read_bytes()
        assert not any(secret in data or secret.hex().encode() in data for secret in secrets), path
    # And what the holder keeps is for its owner alone, under the key that its passphrase is of.
    kept = made.holder_file.with_name("he.holder.secret")
    assert kept.stat().st_mode & 0o777 == 0o600
    assert not any(secret in kept.read_bytes() for secret in secrets)


def test_swapped_public_material_is_refused(made: Holding, tmp_path: Path) -> None:
    first = made.issue()
    before = made.published
    second = made.issue(replace(SMALL, renew=True))
    after = made.published
    assert second.number > first.number
    swaps = (
        replace(after, material=before.material),
        replace(before, material=after.material),
        replace(after, statement=before.statement),
        replace(after, holder=made.delegate(tmp_path / "second").delegation),
    )
    for swapped in swaps:
        with pytest.raises(TrustError) as caught:
            accept_key(swapped, made.trust, NOW)
        assert caught.value.refusal is Refusal.HE_KEY
    with pytest.raises(TrustError, match="another one"):  # the sealed part of the old one
        open_for(made.device(0), before, made.sealed(0), NOW)
    (made.out / "he.public").write_bytes(b"\xff")
    with pytest.raises(PeerError):
        read_published(made.out / "he.public")
    with pytest.raises(UsageError, match="cannot read"):
        read_published(made.out / "nothing")


# Newcomers, and who leaves.


def test_a_newcomer_gets_the_same_key_and_the_others_parts_stay(made: Holding) -> None:
    first = made.issue()
    before = [made.sealed(index) for index in (0, 1)]
    assert made.issue(Asked()).sealed == ()
    made.enroll("office")
    issued = made.issue(Asked(), now=NOW + 10)
    assert (issued.is_new, issued.sealed, issued.devices) == (False, (2,), 3)
    assert (issued.number, issued.key) == (first.number, first.key)
    assert [made.sealed(index) for index in (0, 1)] == before
    secrets = [open_for(made.device(index), made.published, made.sealed(index), NOW).secret for index in range(3)]
    assert secrets[0] == secrets[2]


def test_a_newcomer_may_come_before_others_in_the_roster(tmp_path: Path) -> None:
    made = holding(tmp_path)
    late, early = (Applicant(made.site.token(name)) for name in ("late", "early"))
    made.devices = [late, early]
    made.membership.admit(1, early.state.descriptor)
    assert made.issue().sealed == (1,)
    made.membership.admit(0, late.state.descriptor)
    assert made.issue().sealed == (0,)
    for index in (0, 1):
        open_for(made.device(index), made.published, made.sealed(index), NOW)


def test_after_a_revocation_nothing_is_added_to_the_old_key(made: Holding) -> None:
    first = made.issue()
    made.site.federation.revoke("lab")
    made.enroll("office")
    with pytest.raises(UsageError, match="sealed for lab, which is revoked now: --renew"):
        made.issue()
    with pytest.raises(PeerError, match="no key for device 2"):
        made.sealed(2)
    renewed = made.issue(Asked(renew=True))
    assert (renewed.is_new, renewed.sealed, renewed.devices) == (True, (0, 2), 2)
    assert renewed.number > first.number
    assert renewed.key.key_id != first.key.key_id
    assert renewed.key.parameters == first.key.parameters  # nothing else was asked for
    assert made.issue().sealed == ()


def test_a_revoked_device_gets_nothing_of_the_new_key(made: Holding) -> None:
    made.issue()
    old = made.sealed(1)
    made.site.federation.revoke("lab")
    key = made.issue(replace(SMALL, renew=True)).key
    assert [sealed.index for sealed in sealed_keys(made.out / "he.keys", key.key_id)] == [0]
    assert members_of(made) == [0]
    revoked = made.devices[1].state
    for sealed in (old, made.sealed(0)):
        with pytest.raises(TrustError):
            open_key(sealed, key, descriptor_digest(revoked.descriptor), revoked.hpke_private)


def test_an_older_roster_brings_nobody_back(made: Holding) -> None:
    stale = made.folder / "stale"
    shutil.copytree(made.copy, stale)
    made.issue()
    made.site.federation.revoke("lab")
    made.issue(replace(SMALL, renew=True))
    for asked in (SMALL, replace(SMALL, renew=True)):
        with pytest.raises(UsageError, match=r"this is roster \d+, and \d+ was seen before"):
            made.issue(asked, federation=stale)
    assert members_of(made) == [0]


def test_a_device_that_comes_with_other_keys_gets_nothing(made: Holding) -> None:
    made.issue()
    other = Applicant(made.site.token("lab"))  # the same invitation once more, and a server that forgets the first
    (made.site.server / "enrolled" / "1").unlink()
    made.membership.admit(1, other.state.descriptor)
    (made.out / "he.keys").unlink()
    with pytest.raises(UsageError, match="lab is here with other keys"):
        made.issue()
    assert not (made.out / "he.keys").exists()


def test_a_part_that_was_lost_is_sealed_again_and_a_damaged_file_is_told(made: Holding) -> None:
    key = made.issue().key
    keys = made.out / "he.keys"
    whole = keys.read_bytes()
    keys.unlink()
    assert made.issue().sealed == (0, 1)
    for damaged, reason in ((whole[:-1], "is damaged"), (b"something else", "holds no sealed keys")):
        keys.write_bytes(damaged)
        with pytest.raises(UsageError, match=reason):
            made.issue()
    begin = len(whole) % ((len(whole) - 53) // 2)
    record = (len(whole) - begin) // 2
    keys.write_bytes(whole[:begin] + whole[begin + record :] + whole[begin : begin + record])
    with pytest.raises(UsageError, match="is damaged"):
        list(sealed_keys(keys, key.key_id))


def test_other_parameters_need_another_key(made: Holding) -> None:
    made.issue()
    has = "the key is for 10 devices and 16 bits, seeded, and for updates with or without masks: --renew"
    for asked in (Asked(clients=20), Asked(value_bits=8), Asked(seeded=False), Asked(masked=True)):
        with pytest.raises(UsageError, match=has):
            made.issue(asked)
    parameters = made.issue(Asked(value_bits=8, renew=True)).key.parameters
    assert (parameters.clients, parameters.value_bits, parameters.seeded) == (10, 8, True)


def test_a_key_for_masks_is_followed_by_one_for_masks_unless_it_is_asked_otherwise(made: Holding) -> None:
    assert not made.issue().key.masked
    key = made.issue(Asked(masked=True, renew=True)).key
    assert key.masked
    assert accept_key(made.published, made.trust, NOW).key.masked
    assert made.issue(Asked(masked=True)).key == key
    with pytest.raises(UsageError, match="seeded, and for updates under masks only: --renew"):
        made.issue(Asked(masked=False))
    assert made.issue(Asked(renew=True)).key.masked
    assert not made.issue(Asked(masked=False, renew=True)).key.masked


def test_nobody_is_no_reason_for_a_key(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no device has enrolled"):
        holding(tmp_path).issue()


def test_what_a_holder_keeps_opens_with_its_own_key_only(made: Holding, tmp_path: Path) -> None:
    made.issue()
    kept = made.holder_file.with_name("he.holder.secret")
    other = made.delegate(tmp_path / "other")
    with pytest.raises(UsageError, match="does not open with this holder's key"):
        load_held(kept, other.key)
    whole = kept.read_bytes()
    for place in (0, 20, 60, len(whole) - 1):
        kept.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UsageError, match="or damaged"):
            made.issue()
    for cut in (0, 10, 49, len(whole) - 1):
        kept.write_bytes(whole[:cut])
        with pytest.raises(UsageError, match="or damaged"):
            made.issue()
    kept.write_bytes(whole)
    assert made.issue().sealed == ()


def test_numbers_rise_within_a_second_and_from_holder_to_holder(made: Holding, tmp_path: Path) -> None:
    renew = replace(SMALL, renew=True)
    assert [made.issue(renew).number for _ in range(3)] == [int(NOW), int(NOW) + 1, int(NOW) + 2]
    made.holder_file = tmp_path / "next"
    made.holder = made.delegate(made.holder_file)
    assert made.issue(now=NOW + 60).number == int(NOW) + 60


# The commands.


def test_a_kill_between_any_two_writes_is_made_good_by_the_same_command(made: Holding) -> None:
    line = ["federation", "he-key", "--federation", made.copy, "--holder", made.holder_file, "--out", made.out]
    line += ["--clients", "10", "--seeded"]
    kept, keys, public = made.holder_file.with_name("he.holder.secret"), made.out / "he.keys", made.out / "he.public"
    for at, there in ((1, (False, False, False)), (2, (True, False, False)), (3, (True, True, False))):
        for path in (kept, keys, public):
            path.unlink(missing_ok=True)
        done = subprocess.run([sys.executable, "-c", CRASH, str(at), *map(str, line)], capture_output=True, check=False)
        assert done.returncode == 9, done.stderr
        assert (kept.exists(), keys.exists(), public.exists()) == there
        number = load_held(kept, made.holder.key).number if there[0] else None  # type: ignore[union-attr]
        issued = made.issue()
        assert issued.number == (number or issued.number)
        for index in (0, 1):
            open_for(made.device(index), made.published, made.sealed(index), time.time())
        left = [path for folder in (made.out, kept.parent) for path in folder.iterdir() if path.name.startswith(".he")]
        assert [path for path in left if path.suffix != ".lock"] == []


def test_a_kill_while_newcomers_are_added_leaves_the_others_their_key(made: Holding) -> None:
    made.issue()
    before = [made.sealed(index) for index in (0, 1)]
    made.enroll("office")
    line = ["federation", "he-key", "--federation", made.copy, "--holder", made.holder_file, "--out", made.out]
    for at in (1, 2):
        done = subprocess.run([sys.executable, "-c", CRASH, str(at), *map(str, line)], capture_output=True, check=False)
        assert done.returncode == 9, done.stderr
        assert [made.sealed(index) for index in (0, 1)] == before
    # It counts as having the key from before it was sealed, so its revocation is noticed also now.
    made.site.federation.revoke("office")
    with pytest.raises(UsageError, match="sealed for office, which is revoked now"):
        made.issue()


def test_the_commands_tell_what_is_to_be_done(made: Holding, propolis: Command, mistake: Mistake) -> None:
    (made.folder / "word").write_text("open sesame\n")
    (made.folder / "word").chmod(0o600)
    told = propolis("federation", "he-holder", "fed", "--out", "new.holder", "--key-passphrase-file", "word")
    assert told.returncode == 0, told.stderr
    assert "key holder 2 is in new.holder" in told.stdout
    flags = ["--federation", made.copy, "--holder", "new.holder", "--out", "out"]
    assert "is encrypted" in mistake("federation", "he-key", *flags)
    flags += ["--passphrase-file", "word", "--clients", "10", "--seeded"]
    done = propolis("federation", "he-key", *flags)
    assert done.returncode == 0, done.stderr
    assert "sealed for 2 devices now, 2 have it" in done.stdout
    assert "copy out/he.public and out/he.keys to the server" in done.stdout
    again = json.loads(propolis("federation", "he-key", *flags, "--json").stdout)
    assert (again["new"], again["sealed"], again["devices"], again["masked"]) == (False, [], 2, False)
    assert "with or without masks: --renew makes another one" in mistake("federation", "he-key", *flags, "--masks")
    masked = propolis("federation", "he-key", *flags, "--masks", "--renew")
    assert "it is for updates under masks only" in masked.stdout
    assert json.loads(propolis("federation", "he-key", *flags, "--json").stdout)["masked"]
    assert "under masks only: --renew makes another one" in mistake("federation", "he-key", *flags, "--no-masks")
    assert "--renew makes another one" in mistake("federation", "he-key", *flags, "--bits", "8")
    assert "holds no federation" in mistake("federation", "he-key", *flags, "--federation", "nothing")
    assert "cannot read nothing" in mistake("federation", "he-key", *flags, "--holder", "nothing")
    assert "33" in mistake("federation", "he-key", *flags, "--bits", "33")
    assert "there is no key holder 7" in mistake("federation", "revoke-he-holder", "fed", "7")
    revoked = propolis("federation", "revoke-he-holder", "fed", "2")
    assert "key holder 2 is revoked" in revoked.stdout
    assert "roster.bin" in revoked.stdout
    assert "was revoked before" in propolis("federation", "revoke-he-holder", "fed", "2").stdout
    flags[1] = made.copy
    refused = propolis("federation", "he-key", *flags)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "the key holder 2 is revoked" in refused.stderr
