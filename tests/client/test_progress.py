"""Long work is told in the log of a device."""

from __future__ import annotations

import logging
import time

import pytest
from encrypted_app import EncryptedHive

from propolis.client import progress


def test_what_takes_long_is_told_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    moments = iter([0.0, 1.0, 4.9, 5.0, 6.0, 11.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(moments))
    with caplog.at_level(logging.INFO, "propolis.client"):
        assert list(progress.told("abcde", 5, "reading")) == list("abcde")
    assert caplog.messages == ["reading: 3 of 5", "reading: 5 of 5"]


def test_devices_tell_how_far_they_are_with_a_large_model(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "_EVERY_S", 0.0)
    hive = EncryptedHive(3)
    with caplog.at_level(logging.INFO, "propolis.client"):
        hive.round()
        hive.round()
    assert caplog.messages.count("encrypting the update: 1 of 1") == 6
    assert caplog.messages.count("opening the encrypted model: 1 of 1") == 3
