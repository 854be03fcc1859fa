"""The root's side: who is invited and revoked, whatever the instant of a crash."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command
from enrolling import DAY_S, HOUR_S, NAMES, Applicant, Site

from propolis.link.authority import Authority, fingerprint_of, names_of
from propolis.link.certificates import fault_of, load_pem, load_tls, parse_certificate
from propolis.link.keys import load_signing_key
from propolis.link.token import Token
from propolis.secure.errors import UsageError
from propolis.secure.identity import descriptor_digest, verify_invitation
from propolis.server.federation import Federation
from propolis.server.foundation import Foundation, found, renew_server_certificate
from propolis.server.roster import load_roster

NOW = time.time()

CRASH = """
import os, sys
from propolis import storage
at, write, calls = int(sys.argv[1]), storage.write_atomically, []
def dying(*arguments, **named):
    calls.append(1)
    if len(calls) == at:
        os._exit(9)
    write(*arguments, **named)
storage.write_atomically = dying
from propolis.cli import main
sys.argv = ["propolis", *sys.argv[2:]]
try:
    main()
finally:
    if len(calls) + 1 == at:
        os._exit(9)
"""


def killed_at_write(number: int, *arguments: object) -> bool:
    """Run a command that dies at its n-th write, or after the last one; False when it has fewer writes."""
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(number), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 9), done.stderr
    return done.returncode == 9


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "fed")


def states(federation: Federation, now: float = NOW) -> list[tuple[str, str]]:
    return [(member.name, member.state) for member in federation.members(now)]


# A new one.


def test_a_new_federation_has_its_secrets_for_its_owner_and_the_root_off_the_server(site: Site) -> None:
    modes = {str(path.relative_to(site.folder)): path.stat().st_mode & 0o777 for path in site.folder.rglob("*")}
    assert modes == {
        "root.key": 0o600,
        "invitations": 0o700,
        "server": 0o700,
        "server/root.pub": 0o644,
        "server/roster.bin": 0o644,
        "server/ca.key": 0o600,
        "server/ca.pem": 0o644,
        "server/tls.key": 0o600,
        "server/tls.pem": 0o644,
        "server/enrolled": 0o700,  # of the Membership
    }
    root = load_signing_key(site.folder / "root.key")
    assert root.public.hex() == (site.server / "root.pub").read_text().strip()
    everything = b"".join(path.read_bytes() for path in site.server.rglob("*") if path.is_file())
    assert root.private not in everything
    assert (load_roster(site.server).number, load_roster(site.server).roster.entries) == (1, ())
    tls = load_tls(site.server)
    assert fault_of(tls, time.time()) is None
    assert names_of(parse_certificate(tls.certificate)) == NAMES


def test_with_root_online_all_is_in_the_servers_folder_and_invitations_say_so(tmp_path: Path) -> None:
    site = Site(tmp_path / "fed", root_online=True)
    assert [path.name for path in site.folder.iterdir()] == ["server"]
    assert site.token().verified().root_online
    assert Token.from_text(Federation(site.server).invite("clinic", HOUR_S, NOW)) == site.token()
    assert Federation(site.server).root_online


def test_a_federation_is_not_made_over_another_one(site: Site, tmp_path: Path) -> None:
    before = (site.folder / "root.key").read_bytes()
    for folder in (site.folder, site.folder / "root.key"):
        with pytest.raises(UsageError, match="is not empty: a new federation needs a new folder"):
            found(folder, Foundation(NAMES), NOW)
    assert (site.folder / "root.key").read_bytes() == before
    (tmp_path / "empty").mkdir()
    found(tmp_path / "empty", Foundation(NAMES), NOW)


def test_a_wrong_name_of_the_server_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a DNS name nor an IP address"):
        found(tmp_path / "fed", Foundation(["http://cloud"]), NOW)
    assert not (tmp_path / "fed").exists()


def test_the_roots_and_the_servers_keys_have_passphrases_of_their_own(tmp_path: Path) -> None:
    keys = Foundation(NAMES, passphrase=b"root", server_passphrase=b"server")
    found(tmp_path / "fed", keys, NOW)
    assert load_tls(tmp_path / "fed" / "server", b"server")
    assert Authority.load(tmp_path / "fed" / "server", b"server")
    for wrong, line in ((None, "is encrypted"), (b"server", "the passphrase is wrong")):
        with pytest.raises(UsageError, match=line):
            Federation(tmp_path / "fed", wrong).invite("clinic", HOUR_S, NOW)
    assert Federation(tmp_path / "fed", b"root").invite("clinic", HOUR_S, NOW)


# Invitations.


def test_an_invitation_is_signed_in_the_roster_and_ends(site: Site) -> None:
    token = site.token("clinic", 2 * HOUR_S, NOW)
    invitation = verify_invitation(site.membership.root_key, token.invitation)
    assert (invitation.index, invitation.name, invitation.root_online) == (0, "clinic", False)
    assert invitation.not_after == int(NOW) + 2 * HOUR_S
    assert token.authority == fingerprint_of(site.authority.der)
    roster = load_roster(site.server)
    assert roster.number == 2
    assert roster.require_member(0).public_key == invitation.public_key
    (file,) = (site.folder / "invitations").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_the_same_name_gets_the_same_token_for_as_long_as_it_is_valid(site: Site) -> None:
    token = site.token("clinic", HOUR_S, NOW)
    assert site.token("clinic", 5 * HOUR_S, NOW + HOUR_S - 5) == token
    assert load_roster(site.server).number == 2
    assert site.token("ward", HOUR_S, NOW) != token
    assert states(site.federation) == [("clinic", "invited"), ("ward", "invited")]


def test_an_expired_invitation_that_nobody_used_gives_way_to_a_new_one(site: Site) -> None:
    old = site.token("clinic", HOUR_S, NOW)
    later = NOW + 2 * HOUR_S
    assert states(site.federation, later) == [("clinic", "expired")]
    new = site.token("clinic", HOUR_S, later)
    assert new.verified().index == 1 != old.verified().index
    assert states(site.federation, later) == [("clinic", "revoked"), ("clinic", "invited")]


def test_a_device_that_may_be_in_use_is_not_replaced_by_accident(site: Site) -> None:
    """The root's folder does not hear who enrolled: the server's does."""
    site.token("clinic", HOUR_S, NOW)
    (site.server / "enrolled").rmdir()
    with pytest.raises(UsageError, match="does not know whether it was used: --replace"):
        site.token("clinic", HOUR_S, NOW + 2 * HOUR_S)
    assert states(site.federation) == [("clinic", "invited")]
    site.federation.invite("clinic", HOUR_S, NOW + 2 * HOUR_S, replace=True)
    assert [state for _, state in states(site.federation)] == ["revoked", "invited"]


def test_an_enrolled_device_is_listed_with_its_node_id_and_replaced_on_request_only(site: Site) -> None:
    device = Applicant(site.token("clinic", HOUR_S, NOW))
    site.membership.admit(0, device.state.descriptor)
    (member,) = site.federation.members(NOW + DAY_S)
    digest = descriptor_digest(device.state.descriptor)
    assert (member.state, member.node_id) == ("enrolled", int.from_bytes(digest[:8], "big") >> 1)
    with pytest.raises(UsageError, match="has enrolled; --replace revokes that device"):
        site.token("clinic", HOUR_S, NOW + 2 * HOUR_S)
    site.federation.invite("clinic", HOUR_S, NOW, replace=True)
    assert [state for _, state in states(site.federation)] == ["revoked", "invited"]


@pytest.mark.parametrize("name", ["", " a", "a\nb", "a\x1b[2J", "x" * 201])
def test_a_name_can_be_shown_on_a_terminal(site: Site, name: str) -> None:
    with pytest.raises(UsageError, match="a device's name"):
        site.token(name)
    assert not list((site.folder / "invitations").iterdir())


def test_a_lost_token_is_not_made_up(site: Site) -> None:
    site.token("clinic", HOUR_S, NOW)
    (site.folder / "invitations" / "0").unlink()
    (site.server / "enrolled").rmdir()
    with pytest.raises(UsageError, match="--replace"):
        site.token("clinic", HOUR_S, NOW)


# Revoking and renewing.


def test_revoking_raises_the_rosters_number_and_is_said_once(site: Site) -> None:
    site.token("clinic")
    assert site.federation.revoke("clinic")
    roster = load_roster(site.server)
    assert (roster.number, roster.roster.entries[0].revoked) == (3, True)
    assert not site.federation.revoke("clinic")
    assert load_roster(site.server).number == 3
    with pytest.raises(UsageError, match="there is no device 'ward' among 1"):
        site.federation.revoke("ward")


def test_a_revoked_name_may_be_invited_again(site: Site) -> None:
    old = site.token("clinic")
    site.federation.revoke("clinic")
    assert site.token("clinic") != old
    assert states(site.federation) == [("clinic", "revoked"), ("clinic", "invited")]


def test_renewing_makes_the_roster_last_longer(site: Site) -> None:
    site.token("clinic")
    site.federation.renew_roster(NOW + 500 * DAY_S)
    roster = load_roster(site.server)
    assert (roster.number, roster.roster.not_after) == (3, int(NOW + 500 * DAY_S))
    assert len(roster.roster.entries) == 1


def test_the_servers_certificate_is_renewed_for_the_same_key_without_the_root(site: Site) -> None:
    (site.folder / "root.key").unlink()
    before = parse_certificate(load_pem(site.server / "tls.pem"))
    renew_server_certificate(site.server, (), 900, None, NOW)
    after = parse_certificate(load_tls(site.server).certificate)
    assert fault_of(load_tls(site.server), NOW + 899 * DAY_S) is None
    assert (after.public_key(), names_of(after)) == (before.public_key(), NAMES)
    renew_server_certificate(site.server, ["cloud.example"], 5, None, NOW)
    assert names_of(parse_certificate(load_pem(site.server / "tls.pem"))) == ("cloud.example",)
    assert load_roster(site.server).number == 1


# What does not hold.


def without_the_root(site: Site) -> None:
    (site.folder / "root.key").unlink()


def with_another_root(site: Site) -> None:
    other = Site(site.folder.parent / "other")
    (other.folder / "root.key").rename(site.folder / "root.key")


def that_others_read(site: Site) -> None:
    (site.folder / "root.key").chmod(0o644)


def with_a_forged_roster(site: Site) -> None:
    other = Site(site.folder.parent / "other")
    other.token("eve")
    (other.server / "roster.bin").rename(site.server / "roster.bin")


def without_a_roster(site: Site) -> None:
    (site.server / "roster.bin").unlink()


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (without_the_root, "root.key is not here: run this where the federation's root key is kept"),
        (with_another_root, "is not the key of this federation's root"),
        (that_others_read, "others may read .*root.key"),
        (with_a_forged_roster, "does not hold: the signature on a roster"),
        (without_a_roster, "holds no federation: cannot read .*roster.bin"),
    ],
)
def test_a_federation_that_does_not_hold_is_not_changed(site: Site, damage: Callable[[Site], None], line: str) -> None:
    site.token("clinic")
    damage(site)
    kept = (site.server / "roster.bin").read_bytes() if (site.server / "roster.bin").exists() else b""
    for change in (lambda f: f.invite("ward", HOUR_S, NOW), lambda f: f.revoke("clinic"), lambda f: f.renew_roster(9)):
        with pytest.raises(UsageError, match=line):
            change(Federation(site.folder))
    assert not kept or (site.server / "roster.bin").read_bytes() == kept


def test_two_invitations_at_once_both_count(site: Site) -> None:
    commands = [[sys.executable, "-m", "propolis", "federation", "invite", str(site.folder), name] for name in "abcd"]
    started = [subprocess.Popen(each, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for each in commands]
    tokens = [Token.from_text(each.communicate(timeout=60)[0]) for each in started]
    roster = load_roster(site.server).roster
    assert sorted(token.verified().name for token in tokens) == [*"abcd"]
    for token in tokens:
        assert roster.entries[token.verified().index].public_key == token.key.public


# The commands.


def test_an_invitation_killed_at_any_write_ends_with_one_whole_member(site: Site, propolis: Command) -> None:
    for number in range(1, 10):
        name = f"device-{number}"
        was_killed = killed_at_write(number, "federation", "invite", site.folder, name)
        token = Token.from_text(propolis("federation", "invite", site.folder, name).stdout)
        entries = [entry for entry in load_roster(site.server).roster.entries if entry.name == name]
        assert [entry.public_key for entry in entries] == [token.key.public]
        assert not entries[0].revoked
        if not was_killed:
            break
    assert number == 4  # token, roster, after the roster, and not at all


def test_a_killed_founding_is_told_from_a_federation(tmp_path: Path) -> None:
    assert killed_at_write(6, "federation", "init", tmp_path / "fed")  # the roster's, the last one
    with pytest.raises(UsageError, match="holds no federation"):
        Federation(tmp_path / "fed")


def test_the_commands_print_what_a_script_needs(propolis: Command, mistake: Callable[..., str], tmp_path: Path) -> None:
    done = propolis("federation", "init", "fed", "--name", "cloud.example, 10.0.0.1", "--valid-days", 30)
    assert done.returncode == 0, done.stderr
    names = names_of(parse_certificate(load_pem(tmp_path / "fed" / "server" / "tls.pem")))
    assert names == ("cloud.example", "10.0.0.1")
    invited = propolis("federation", "invite", "fed", "clinic", "--expires-hours", 5)
    assert Token.from_text(invited.stdout).to_text() + "\n" == invited.stdout
    assert "roster.bin to the server" in invited.stderr
    assert "clinic" in propolis("federation", "list", "fed").stdout
    assert json.loads(propolis("federation", "list", "fed", "--json").stdout) == [
        {"index": 0, "name": "clinic", "state": "invited", "node_id": None}
    ]
    assert "is revoked" in propolis("federation", "revoke", "fed", "clinic").stdout
    again = propolis("federation", "revoke", "fed", "clinic")
    assert (again.returncode, "was revoked before" in again.stdout) == (0, True)
    assert "copy" in propolis("federation", "renew", "fed", "--valid-days", 60).stdout
    assert "tls.pem" in propolis("federation", "renew", "fed", "--server-cert", "--name", "a.example").stdout
    assert "give --server-cert too" in mistake("federation", "renew", "fed", "--name", "a.example")
    assert "holds no federation" in mistake("federation", "list", "nowhere")
    assert "is not empty" in mistake("federation", "init", "fed")
