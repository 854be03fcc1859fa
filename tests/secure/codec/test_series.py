"""The versions of a run's model: any device gets to the newest one from whatever it has, or says that it cannot."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.codec.broadcast import Delta, compress, values_digest
from propolis.secure.codec.series import MOST_DELTAS, Broadcast, ModelSeries, Pace, Version, rebuild
from propolis.secure.errors import PeerError, Refusal

COUNT, SIZES = 3000, (1000, 2000)
SERIES = b"series of a test"


def drawn(seed: int, count: int = COUNT) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def halves(count: int) -> tuple[int, int]:
    """Sizes of two arrays, which together have so many values."""
    return count // 3, count - count // 3


def series(versions: int = 3, coarseness: float = 0.5, count: int = COUNT, **how: Any) -> ModelSeries:
    """Of a model that moves a little with each version."""
    made = ModelSeries(SERIES, coarseness, halves(count), **how)
    for number in range(versions):
        made.publish(drawn(0, count) + np.float32(0.01) * drawn(number, count))
    return made


def over_the_wire(broadcast: Broadcast) -> Broadcast:
    return Broadcast.from_bytes(broadcast.to_bytes())


def device_of(server: ModelSeries) -> Version:
    return rebuild(over_the_wire(server.message_for(None)), None, halves(len(server.values)))


def refusal_of(broadcast: Broadcast, had: Version | None, count: int = COUNT) -> Refusal:
    with pytest.raises(PeerError) as caught:
        rebuild(broadcast, had, halves(count))
    return caught.value.refusal


def require_newest(version: Version, server: ModelSeries) -> None:
    assert (version.series, version.number) == (SERIES, server.version)
    assert version.values.tobytes() == server.values.tobytes()


# From whatever a device has


@given(
    st.lists(st.sampled_from(["publish", "ask", "forget", "lose", "ahead"]), max_size=25),
    st.sampled_from([0, 1, 40, 3000]),
    st.sampled_from([1 / 32, 0.5, 3.5]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_a_device_is_always_taken_to_the_newest_version(
    events: list[str], count: int, coarseness: float, resumed: bool
) -> None:
    server = series(1, coarseness, count, start=Pace(drawn(9, count), drawn(8, count), (0.1, 0.2)) if resumed else None)
    had: Version | None = None
    known: int | None = None
    for number, event in enumerate(events):
        if event == "publish":
            server.publish(drawn(number, count))
        elif event == "forget":
            known = None
        elif event == "lose":
            had = known = None
        else:
            had = rebuild(over_the_wire(server.message_for(known)), had, halves(count))
            require_newest(had, server)
            known = known if event == "ahead" else server.version


def test_a_message_leads_on_from_any_version_that_it_covers() -> None:
    server = series(1)
    versions = [device_of(server)]
    for number in range(3):
        server.publish(drawn(0) + np.float32(0.01) * drawn(number))
        versions.append(device_of(server))
    message = over_the_wire(server.message_for(1))
    for version in versions:
        require_newest(rebuild(message, version, SIZES), server)


@pytest.mark.parametrize("known", [-1, 1, 99], ids=["never was", "too old", "to come"])
def test_a_version_that_no_steps_lead_on_from_is_replaced_by_the_whole(known: int) -> None:
    server = series(1)
    old = device_of(server)
    for number in range(40):
        server.publish(drawn(number))
    message = server.message_for(known)
    assert message.values
    for had in (None, old):
        require_newest(rebuild(over_the_wire(message), had, SIZES), server)


def test_no_message_is_much_larger_than_the_model() -> None:
    for count in (0, 10, 3000):
        server = series(0, count=count)
        for number in range(60):
            server.publish(drawn(number, count) * np.float32(10.0 ** (number % 5)))
            for known in (None, *range(max(0, number - 30), server.version + 1)):
                assert len(server.message_for(known).to_bytes()) <= 4 * count + 5000


def test_a_server_that_goes_on_starts_from_the_values_that_the_devices_have() -> None:
    before = series(3)
    after = ModelSeries(b"s" * 16, 0.5, SIZES, before.pace)
    assert after.version == 0
    device = rebuild(over_the_wire(after.message_for(None)), device_of(before), SIZES)
    np.testing.assert_array_equal(device.values, before.values)
    before.publish(drawn(5))
    after.publish(drawn(5))
    assert after.values.tobytes() == before.values.tobytes()
    moved = rebuild(over_the_wire(after.message_for(0)), device, SIZES)
    assert moved.values.tobytes() == after.values.tobytes()


# What does not fit


def test_a_device_without_the_version_that_is_led_on_from_asks_for_the_whole() -> None:
    server = series(3)
    steps = server.message_for(2)
    old = replace(device_of(series(1)), number=1)
    for had in (None, old, replace(old, number=4), replace(old, number=2, values=old.values[:-1])):
        assert refusal_of(steps, had) is Refusal.BASE


def test_a_device_of_another_series_or_a_later_version_takes_the_whole() -> None:
    server = series(3)
    other = Version(b"another series 1", 2, drawn(8))
    assert refusal_of(server.message_for(2), other) is Refusal.BASE
    for had in (other, replace(other, series=SERIES, number=9)):
        require_newest(rebuild(server.message_for(None), had, SIZES), server)


def test_a_version_that_does_not_come_out_as_said_is_refused() -> None:
    server = series(3)
    damaged = device_of(series(2))
    damaged.values[17] = np.nextafter(damaged.values[17], np.float32(9))
    assert refusal_of(server.message_for(2), damaged) is Refusal.BASE
    message = server.message_for(None)
    assert refusal_of(replace(message, digest=bytes(32)), None) is Refusal.BASE


@pytest.mark.parametrize("number", [2, 3, 9])
def test_a_device_whose_version_is_damaged_takes_the_whole(number: int) -> None:
    server = series(3)
    for values in (drawn(5), np.full(COUNT, np.nan, np.float32), drawn(5, 7)):
        damaged = Version(SERIES, number, values)
        require_newest(rebuild(server.message_for(None), damaged, SIZES), server)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_whole_that_is_no_number_is_refused_though_its_digest_is_right(wrong: float) -> None:
    values = np.array([1, wrong], np.float32)
    said = {"values": b"r" + values.tobytes(), "digest": values_digest(values), "deltas": (), "first": 1, "version": 0}
    message = replace(series(1, count=2).message_for(None), **said)
    for had in (None, Version(SERIES, 0, np.ones(2, np.float32))):
        assert refusal_of(message, had, 2) is Refusal.MODEL


def test_steps_that_do_not_lead_to_the_version_are_malformed() -> None:
    message = series(3).message_for(1)
    for wrong in ({"version": 4}, {"first": 1}, {"deltas": ()}, {"deltas": message.deltas[1:]}):
        assert refusal_of(replace(message, **wrong), device_of(series(1))) is Refusal.MALFORMED


def test_a_model_of_another_size_or_of_other_arrays_is_malformed() -> None:
    for sizes in ((COUNT,), (1000, 1000, 1000)):
        with pytest.raises(PeerError, match=f"2 steps for {len(sizes)} arrays"):
            rebuild(series(2).message_for(1), device_of(series(1)), sizes)
    message = series(2).message_for(None)
    for count in (0, COUNT - 1, COUNT + 1):
        assert refusal_of(message, None, count) is Refusal.MALFORMED
    assert refusal_of(replace(message, values=compress(bytes(10**7))), None) is Refusal.MALFORMED


WRONG: list[dict[str, Any]] = [
    *({"series": name} for name in (b"", b"s" * 15, b"s" * 17)),
    *({"digest": digest} for digest in (b"", b"d" * 31, b"d" * 33)),
    {"format": 2},
    {"version": 2**31 + 1},
    *({"deltas": (Delta((1.0, step), 1, b"b", b""),)} for step in (-1.0, float("inf"), float("nan"))),
    *({"deltas": (Delta((1.0,), size, b"b", b""),)} for size in (0, 3)),
    {"deltas": (Delta((1.0,), 1, b"", b""),)},
    {"deltas": (Delta((1.0,), 1, b"b", b""),) * (MOST_DELTAS + 1)},
]


@pytest.mark.parametrize("wrong", WRONG, ids=",".join)
def test_fields_out_of_their_bounds_are_malformed(wrong: dict[str, Any]) -> None:
    with pytest.raises(PeerError) as caught:
        over_the_wire(replace(series(1).message_for(None), **wrong))
    assert caught.value.refusal is Refusal.MALFORMED


@pytest.mark.parametrize("known", [None, 1])
def test_of_random_and_mutated_bytes_only_our_error_comes(known: int | None) -> None:
    server, rng = series(3, count=60), Random(0)
    valid, had = server.message_for(known).to_bytes(), device_of(series(1, count=60))
    for number in range(2000):
        data = bytearray(valid if number % 4 else rng.randbytes(rng.randrange(200)))
        for _ in range(rng.randrange(1, 4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        cut = len(data) if rng.random() < 0.7 else rng.randrange(len(data) + 1)
        with suppress(PeerError):
            rebuilt = rebuild(Broadcast.from_bytes(bytes(data[:cut])), had, (20, 40))
            assert rebuilt.values.tobytes() == server.values.tobytes()


# What a device keeps


@given(st.binary(min_size=16, max_size=16), st.integers(0, 2**31), st.integers(0, 300))
@settings(deadline=None)
def test_a_version_is_kept_as_it_is(name: bytes, number: int, count: int) -> None:
    version = Version(name, number, drawn(1, count))
    again = Version.from_bytes(version.to_bytes())
    assert again is not None
    assert (again.series, again.number) == (name, number)
    assert again.values.tobytes() == version.values.tobytes()


def test_a_damaged_version_is_none() -> None:
    whole = device_of(series(2)).to_bytes()
    for damaged in (b"", b"\xff" * 50, whole[:-1], whole[: len(whole) // 2], whole + b"\x08\x02", os.urandom(99)):
        assert Version.from_bytes(damaged) is None
