"""A release key: made and revoked where the root's key is, and used without it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from enrolling import DAY_S, Site

from propolis.secure.errors import UsageError
from propolis.secure.release import verify_delegation
from propolis.server.release_key import load_release_key, make_release_key
from propolis.server.roster import load_roster

NOW = time.time()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "fed")


def test_every_key_has_a_number_of_its_own_and_is_for_its_owner_alone(site: Site, tmp_path: Path) -> None:
    for serial in (1, 2, 3):
        out = tmp_path / f"release-{serial}.key"
        made = make_release_key(site.federation, out, DAY_S, NOW, ("faces",) if serial == 2 else ())
        assert made.claimed.serial == serial
        assert out.stat().st_mode & 0o777 == 0o600
        loaded = load_release_key(out)
        assert (loaded.key.private, loaded.delegation) == (made.key.private, made.delegation)
        found = verify_delegation(site.membership.root_key, load_roster(site.server), loaded.delegation)
        assert (found.public_key, found.models) == (made.key.public, ("faces",) if serial == 2 else ())
    with pytest.raises(UsageError, match="exists: give another --out"):
        make_release_key(site.federation, out, DAY_S, NOW)


def test_a_key_can_be_under_a_passphrase(site: Site, tmp_path: Path) -> None:
    out = tmp_path / "release.key"
    made = make_release_key(site.federation, out, DAY_S, NOW, passphrase=b"open sesame")
    assert made.key.private not in out.read_bytes()
    assert load_release_key(out, b"open sesame").key.private == made.key.private
    with pytest.raises(UsageError, match="is encrypted"):
        load_release_key(out)


def test_a_key_without_its_delegation_or_with_another_ones_is_told(site: Site, tmp_path: Path) -> None:
    one, other = tmp_path / "one.key", tmp_path / "other.key"
    for out in (one, other):
        make_release_key(site.federation, out, DAY_S, NOW)
    beside = tmp_path / "one.key.delegation"
    beside.write_bytes((tmp_path / "other.key.delegation").read_bytes())
    with pytest.raises(UsageError, match="is of another key"):
        load_release_key(one)
    beside.write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is damaged"):
        load_release_key(one)
    beside.unlink()
    with pytest.raises(UsageError, match="which goes with"):
        load_release_key(one)


def test_a_number_that_is_revoked_is_not_given_again(site: Site, tmp_path: Path) -> None:
    make_release_key(site.federation, tmp_path / "1.key", DAY_S, NOW)
    make_release_key(site.federation, tmp_path / "2.key", DAY_S, NOW)
    assert site.federation.revoke_release_key(2)
    assert not site.federation.revoke_release_key(2)
    assert load_roster(site.server).roster.revoked_releases == (2,)
    (site.folder / "releases" / "2").unlink()
    assert make_release_key(site.federation, tmp_path / "3.key", DAY_S, NOW).claimed.serial == 3
    with pytest.raises(UsageError, match="there is no release key 9"):
        site.federation.revoke_release_key(9)


def test_it_takes_the_roots_key(site: Site, tmp_path: Path) -> None:
    (site.folder / "root.key").unlink()
    with pytest.raises(UsageError, match="where the federation's root key is kept"):
        make_release_key(site.federation, tmp_path / "key", DAY_S, NOW)
    assert not (tmp_path / "key").exists()
