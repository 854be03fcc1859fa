"""A model is summed over a limited number of times: near-equal cohorts, one after the other, would show one device."""

from __future__ import annotations

from typing import Any

import protocol
import pytest
from attacks.insiders import refuses
from protocol import Cohort, Round, another_run

from propolis.secure.errors import Refusal, RefusedError, TooFewPeersError, UsageError
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.messages import to_bytes
from propolis.secure.secagg.plan import Kind
from propolis.secure.secagg.policy import Policy
from propolis.simulations.federation import Federation

DEVICES = 3
NUMBERS = iter(range(1, 10**6))


def limited(most: int | None) -> Cohort:
    return Cohort(DEVICES, Policy(max_reveals_per_model=most))


def reveals(cohort: Cohort, **changes: Any) -> bool:
    """Whether a round's sum is revealed; if not, then because every device refuses for this reason."""
    attempt = cohort.round(**{"number": next(NUMBERS), **changes})
    try:
        attempt.through()
    except TooFewPeersError:
        assert {index: error.refusal for index, error in attempt.refused.items()} == dict.fromkeys(
            range(DEVICES), Refusal.REVEALS
        )
        assert not any(member.shares for member in attempt.server._members.values())
        return False
    assert not attempt.refused
    return True


def before_unmask(cohort: Cohort) -> Round:
    attempt = cohort.round(number=next(NUMBERS))
    attempt.prepare()
    attempt.upload()
    attempt.server.close_uploads()
    return attempt


@pytest.mark.parametrize("most", [1, 2, 4])
def test_a_model_is_revealed_as_often_as_allowed(most: int) -> None:
    cohort = limited(most)
    assert [reveals(cohort) for _ in range(most + 2)] == [True] * most + [False] * 2


def test_the_default_is_four() -> None:
    cohort = Cohort(DEVICES, Policy())
    assert [reveals(cohort) for _ in range(5)] == [True] * 4 + [False]


def test_no_limit_is_no_limit() -> None:
    cohort = limited(None)
    assert all(reveals(cohort) for _ in range(8))


@pytest.mark.parametrize(
    "change",
    [lambda: {"run_id": another_run()}, lambda: {"attempt": 7}, lambda: {"width": 24}, lambda: {"malicious": True}],
    ids=["run", "attempt", "encoding", "mode"],
)
def test_nothing_but_the_model_makes_a_sum_another_one(change: Any) -> None:
    cohort = limited(2)
    assert reveals(cohort)
    assert reveals(cohort, **change())
    assert not reveals(cohort, **change())
    assert not reveals(cohort)


@pytest.mark.parametrize(("first", "then"), [(Kind.TRAIN, Kind.EVALUATE), (Kind.EVALUATE, Kind.TRAIN)])
def test_training_and_evaluation_are_counted_apart(first: Kind, then: Kind) -> None:
    cohort = limited(1)
    assert [reveals(cohort, kind=kind) for kind in (first, first, then, then)] == [True, False, True, False]


def test_another_model_is_counted_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = limited(1)
    assert reveals(cohort)
    monkeypatch.setattr(protocol, "MODEL", b"n" * 32)
    assert [reveals(cohort), reveals(cohort)] == [True, False]
    monkeypatch.setattr(protocol, "MODEL", b"m" * 32)
    assert not reveals(cohort)


def test_a_restart_does_not_forget_what_was_revealed() -> None:
    cohort = limited(1)
    assert reveals(cohort)
    old = cohort.federation
    restarted = tuple(DeviceState.from_bytes(device.to_bytes()) for device in old.devices)
    assert not reveals(Cohort(DEVICES, cohort.policy, Federation(old.root, old.roster, restarted)))


def test_a_refusal_reveals_nothing_however_often_it_is_asked_for() -> None:
    cohort = limited(1)
    assert reveals(cohort)
    attempt = before_unmask(cohort)
    before, request = cohort.federation.devices[0].to_bytes(), to_bytes(attempt.server.unmask_request(0))
    for _ in range(3):
        with refuses(Refusal.REVEALS):
            cohort.device(0).unmask(request)
        assert cohort.federation.devices[0].to_bytes() == before


def test_the_same_request_again_is_the_same_reply_and_counts_once() -> None:
    cohort = limited(2)
    attempt = before_unmask(cohort)
    request = to_bytes(attempt.server.unmask_request(0))
    replies = {cohort.device(0).unmask(request) for _ in range(5)}
    assert len(replies) == 1
    assert list(cohort.federation.devices[0].reveals.values()) == [1]
    attempt.unmask()
    assert reveals(cohort)
    assert not reveals(cohort)


def test_a_refused_unmask_request_costs_nothing() -> None:
    cohort = limited(1)
    attempt = before_unmask(cohort)
    request = attempt.server.unmask_request(0)
    for stray in (attempt.server.unmask_request(1), attempt.server.confirm_request()):
        with pytest.raises(RefusedError):
            cohort.device(0).unmask(to_bytes(stray))
    assert not cohort.federation.devices[0].reveals
    assert cohort.device(0).unmask(to_bytes(request))


def test_a_round_that_is_not_unmasked_costs_nothing() -> None:
    cohort = limited(1)
    for _ in range(3):
        before_unmask(cohort)
    assert [reveals(cohort), reveals(cohort)] == [True, False]


@pytest.mark.parametrize("most", [0, -1])
def test_a_limit_below_one_is_no_policy(most: int) -> None:
    with pytest.raises(UsageError, match="max_reveals_per_model"):
        Policy(max_reveals_per_model=most)
