"""Rollouts: what may be handed over, what is kept, and what a crash in between leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Command
from delivering import Site
from dying import die_at
from releasing import flipped, release_key

from propolis.secure.errors import UsageError
from propolis.server.rollout import Progress, start_rollout


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_package_is_handed_over_once_and_again_only_its_percentage_changes(site: Site) -> None:
    package = site.seal(1)
    first = start_rollout(site.server_folder, package, 10)
    again = start_rollout(site.server_folder, package, 30)
    assert (first.percent, again.percent) == (10, 30)
    assert again.started == first.started
    assert len(site.rollouts.all()) == 1
    copied = site.rollouts.package(first)
    assert copied.read_bytes() == package.read_bytes()
    assert Path(f"{copied}.keys").read_bytes() == Path(f"{package}.keys").read_bytes()
    assert copied.stat().st_mode & 0o077 == 0


def test_a_release_that_is_not_newer_is_not_handed_over(site: Site) -> None:
    site.release(2)
    for sequence in (1, 2):
        with pytest.raises(UsageError, match="is not newer than 2"):
            site.release(sequence)
    site.rollouts.change("digits", progress=Progress.STOPPED)
    with pytest.raises(UsageError, match="is not newer than 2"):
        site.release(1)
    assert site.release(3).sequence == 3


def test_a_package_that_devices_would_refuse_is_not_handed_over(site: Site) -> None:
    package = site.seal(1)
    package.write_bytes(flipped(package.read_bytes(), len(package.read_bytes()) - 5))
    with pytest.raises(UsageError, match="devices would refuse this package"):
        start_rollout(site.server_folder, package, 100)
    site.key = release_key(site.root, serial=7)
    other = site.seal(1)
    site.put_roster(site.roster.revoking_release(7))
    with pytest.raises(UsageError, match="devices would refuse this package"):
        start_rollout(site.server_folder, other, 100)
    assert site.rollouts.all() == ()


def test_the_keys_must_be_the_packages(site: Site) -> None:
    package, other = site.seal(1), site.seal(2)
    Path(f"{package}.keys").write_bytes(Path(f"{other}.keys").read_bytes())
    with pytest.raises(UsageError, match="has the keys of another package"):
        start_rollout(site.server_folder, package, 100)
    Path(f"{package}.keys").unlink()
    with pytest.raises(UsageError, match="cannot read"):
        start_rollout(site.server_folder, package, 100)


@pytest.mark.parametrize("percent", [-1.0, 100.1, float("nan")])
def test_a_percentage_is_one(site: Site, percent: float) -> None:
    with pytest.raises(UsageError, match="a percentage is from 0 to 100"):
        site.release(1, percent=percent)
    site.release(1)
    with pytest.raises(UsageError, match="a percentage is from 0 to 100"):
        site.rollouts.change("digits", percent=percent)


def test_a_kill_at_any_write_leaves_the_old_offer_or_the_new_one(site: Site) -> None:
    old, package = site.release(1, percent=50), site.seal(2)
    step, was_killed = 0, True
    while was_killed:
        step += 1
        was_killed = die_at(step, lambda: start_rollout(site.server_folder, package, 50))
        offered = site.rollouts.all()
        assert [each.sequence for each in offered] in ([1], [2, 1])
        for each in offered:  # whatever is named is whole
            assert site.rollouts.package(each).stat().st_size > 0
            assert Path(f"{site.rollouts.package(each)}.keys").stat().st_size > 0
        if len(offered) == 2:
            site.rollouts.index.write_text(json.dumps({"rollouts": [json.loads(old.model_dump_json())]}))
    assert step > 4


def test_the_commands_say_what_is_on_offer(site: Site, propolis: Command) -> None:
    where = ("--federation", site.server_folder)
    assert "no release has been handed over" in propolis("rollout", "show", *where).stdout
    started = propolis("rollout", "start", site.seal(1), *where, "--percent", 25)
    assert started.stdout == "release 1 of digits: running, for 25 % of the devices\n"
    paused = json.loads(propolis("rollout", "pause", "digits", *where, "--json").stdout)
    assert (paused["progress"], paused["percent"], paused["sequence"]) == ("paused", 25.0, 1)
    assert propolis("rollout", "resume", "digits", *where).returncode == 0
    assert "for 50 %" in propolis("rollout", "set", "digits", "--percent", 50, *where).stdout
    assert "no device has said anything yet" in propolis("rollout", "show", "digits", *where).stdout


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("start", "nothing"), "cannot read nothing"),
        (("set", "digits", "--percent", 5), "no release of digits has been handed over"),
        (("show", "cnn"), "no release of cnn has been handed over"),
    ],
)
def test_a_mistake_is_one_line(site: Site, mistake: object, arguments: tuple[object, ...], error: str) -> None:
    assert error in mistake("rollout", *arguments, "--federation", site.server_folder)  # type: ignore[operator]
