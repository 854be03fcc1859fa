"""A run goes by the newest key, waits for one where there is none that a round may be under, and not for ever."""

from __future__ import annotations

import threading
import time

import pytest
from encrypted_app import EncryptedHive, another_key

from propolis.secure.errors import CancelledError, PropolisError, UsageError
from propolis.secure.he.keys import PublicKey
from propolis.secure.he.messages import EncryptedPlan
from propolis.server.renewal import Renewal

LINE = "lab is revoked and has the key"


class Desk:
    """Where a holder's keys are put, after some calls."""

    def __init__(self, key: PublicKey, refused: int) -> None:
        self.key, self.refused, self.asked = key, refused, 0

    def __call__(self) -> PublicKey:
        self.asked += 1
        if self.asked <= self.refused:
            raise UsageError(LINE)
        return self.key


def renewal(desk: Desk, deadline: float = 30.0, cancelled: threading.Event | None = None) -> Renewal:
    return Renewal(None, desk, deadline, cancelled or threading.Event())


def plan_key(hive: EncryptedHive) -> bytes:
    assert hive.grid.model is not None
    return EncryptedPlan.from_bytes(hive.grid.model.plan).key_id


def test_a_run_waits_for_another_key_and_says_why_once(caplog: pytest.LogCaptureFixture) -> None:
    hive = EncryptedHive(3)
    keys = another_key(hive.federation)
    for store, bundle in zip(hive.stores, keys.bundles, strict=True):
        store.keep_he_key(bundle)  # type: ignore[attr-defined]
    renewal(Desk(keys.public, refused=3)).renew(hive.grid)
    hive.round()
    assert plan_key(hive) == keys.public.key_id
    assert caplog.text.count(LINE) == 1


def test_the_wait_for_another_key_ends_with_the_line() -> None:
    hive = EncryptedHive(3)
    began = time.monotonic()
    with pytest.raises(PropolisError, match=LINE) as caught:
        renewal(Desk(hive.keys.public, refused=10**9), deadline=0.5).renew(hive.grid)
    assert 0.5 <= time.monotonic() - began < 5
    assert not isinstance(caught.value, UsageError)  # the run has failed: nobody typed anything wrong


def test_a_run_that_waits_for_a_key_can_be_stopped() -> None:
    hive, cancelled = EncryptedHive(3), threading.Event()
    threading.Timer(0.3, cancelled.set).start()
    with pytest.raises(CancelledError):
        renewal(Desk(hive.keys.public, refused=10**9), cancelled=cancelled).renew(hive.grid)


def test_an_evaluation_does_not_wait() -> None:
    hive = EncryptedHive(3)
    assert not renewal(Desk(hive.keys.public, refused=1)).is_good(hive.grid)
    assert renewal(Desk(hive.keys.public, refused=0)).is_good(hive.grid)
