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

from propolis.secure.codec.broadcast import Delta, compress
from propolis.secure.codec.series import MOST_DELTAS, Broadcast, ModelSeries, Pace, Version, first_version, rebuild
from propolis.secure.errors import PeerError, Refusal

COUNT = 3000
SERIES = b"series of a test"


def drawn(seed: int, count: int = COUNT) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count).astype(np.float32)


def series(versions: int = 3, coarseness: float = 0.5, count: int = COUNT, **how: Any) -> ModelSeries:
    """Of a model that moves a little with each version."""
    made = ModelSeries(SERIES, coarseness, (count,), **how)
    for number in range(versions):
        made.publish(drawn(0, count) + np.float32(0.01) * drawn(number, count))
    return made


def over_the_wire(broadcast: Broadcast) -> Broadcast:
    return Broadcast.from_bytes(broadcast.to_bytes())


def device_of(server: ModelSeries) -> Version:
    return rebuild(over_the_wire(server.message_for(None)), None, (len(server.values),))


def refusal_of(broadcast: Broadcast, had: Version | None, count: int = COUNT) -> Refusal:
    with pytest.raises(PeerError) as caught:
        rebuild(broadcast, had, (count,))
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
    server = series(1, coarseness, count, start=Pace(drawn(9, count), drawn(8, count), (0.1,)) if resumed else None)
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
            had = rebuild(over_the_wire(server.message_for(known)), had, (count,))
            require_newest(had, server)
            known = known if event == "ahead" else server.version


def test_a_newcomer_gets_all_and_the_others_the_steps_that_they_missed() -> None:
    server = series(3)
    newcomer = device_of(server)
    require_newest(newcomer, server)
    for _ in range(2):
        server.publish(drawn(0) + np.float32(0.01) * drawn(7))
    missed = server.message_for(newcomer.number)
    assert (missed.first, missed.version, len(missed.deltas), missed.values) == (4, 5, 2, b"")
    require_newest(rebuild(over_the_wire(missed), newcomer, (COUNT,)), server)


def test_who_has_the_newest_version_is_sent_next_to_nothing() -> None:
    server = series(3)
    device = device_of(server)
    nothing = server.message_for(server.version)
    assert len(nothing.to_bytes()) < 100
    require_newest(rebuild(over_the_wire(nothing), device, (COUNT,)), server)


def test_a_message_leads_on_from_any_version_that_it_covers() -> None:
    server = series(1)
    versions = [device_of(server)]
    for number in range(3):
        server.publish(drawn(0) + np.float32(0.01) * drawn(number))
        versions.append(device_of(server))
    message = over_the_wire(server.message_for(1))
    for version in versions:
        require_newest(rebuild(message, version, (COUNT,)), server)


def test_a_version_so_old_that_the_steps_from_it_are_forgotten_is_replaced_by_the_whole() -> None:
    server = series(1)
    old = device_of(server)
    for number in range(40):
        server.publish(drawn(number))
    message = server.message_for(old.number)
    require_newest(rebuild(over_the_wire(message), old, (COUNT,)), server)


def test_a_version_that_never_was_is_replaced_by_the_whole() -> None:
    server = series()
    for number in (-1, 99):
        require_newest(rebuild(over_the_wire(server.message_for(number)), None, (COUNT,)), server)


def test_no_message_is_much_larger_than_the_model() -> None:
    for count in (0, 10, 3000):
        server = series(0, count=count)
        for number in range(60):
            server.publish(drawn(number, count) * np.float32(10.0 ** (number % 5)))
            for known in (None, *range(max(0, number - 30), server.version + 1)):
                assert len(server.message_for(known).to_bytes()) <= 4 * count + 5000


def test_a_server_that_goes_on_starts_from_the_values_that_the_devices_have() -> None:
    before = series(3)
    after = ModelSeries(b"s" * 16, 0.5, (COUNT,), before.pace)
    assert after.version == 0
    device = rebuild(over_the_wire(after.message_for(None)), device_of(before), (COUNT,))
    np.testing.assert_array_equal(device.values, before.values)
    before.publish(drawn(5))
    after.publish(drawn(5))
    assert after.values.tobytes() == before.values.tobytes()
    moved = rebuild(over_the_wire(after.message_for(0)), device, (COUNT,))
    assert moved.values.tobytes() == after.values.tobytes()


# What does not fit


def test_a_model_that_begins_with_the_first_version_lacks_nothing() -> None:
    start = first_version(drawn(0), (1000, 2000))
    assert ModelSeries(SERIES, 0.5, (1000, 2000)).publish(start).tobytes() == start.tobytes()
    assert 0 < np.abs(start - drawn(0)).max() < 0.2


def test_small_layers_survive_beside_large_ones() -> None:
    model = np.concatenate([drawn(0, 1000), drawn(1, 1000) * np.float32(1e-3)])
    first = first_version(model, (1000, 1000))
    assert np.corrcoef(first[1000:], model[1000:])[0, 1] > 0.98


@pytest.mark.parametrize("kind", ["alike", "normal"])
def test_a_model_that_moves_on_and_on_is_followed_with_a_bounded_lag(kind: str) -> None:
    move = np.full(COUNT, 0.01, np.float32) if kind == "alike" else np.float32(0.01) * drawn(1)
    target, server = drawn(0), ModelSeries(SERIES, 3.4, (COUNT,))
    for _ in range(200):
        target = target + move
        server.publish(target)
    assert np.abs(target - server.values).max() < (0.6 * 4 * 3.4 + 4) * 0.01 * (1 if kind == "alike" else 4)


def test_no_more_steps_are_kept_or_taken_than_a_device_can_be_expected_to_follow() -> None:
    server = series(MOST_DELTAS + 20, coarseness=50.0, count=10)
    message = server.message_for(None)
    assert len(message.deltas) <= MOST_DELTAS
    require_newest(rebuild(over_the_wire(message), None, (10,)), server)
    many = replace(message, deltas=(message.deltas or (Delta((1.0,), 1, b"b", b""),))[:1] * (MOST_DELTAS + 1))
    with pytest.raises(PeerError):
        over_the_wire(many)


def test_a_whole_that_is_no_number_is_refused() -> None:
    message = ModelSeries(SERIES, 0.5, (2,), Pace(np.ones(2, np.float32), np.ones(2, np.float32), (1.0,))).message_for(
        None
    )
    bad = b"r" + np.array([1, np.nan], "<f4").tobytes()
    assert refusal_of(replace(message, values=bad), None, 2) is Refusal.MODEL


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
        require_newest(rebuild(server.message_for(None), had, (COUNT,)), server)


def test_a_version_that_does_not_come_out_as_said_is_refused() -> None:
    server = series(3)
    damaged = device_of(series(2))
    damaged.values[17] = np.nextafter(damaged.values[17], np.float32(9))
    assert refusal_of(server.message_for(2), damaged) is Refusal.BASE
    message = server.message_for(None)
    assert refusal_of(replace(message, digest=bytes(32)), None) is Refusal.BASE


@pytest.mark.parametrize("number", [2, 3])
def test_a_device_whose_version_is_damaged_takes_the_whole(number: int) -> None:
    server = series(3)
    damaged = replace(device_of(series(number)), values=drawn(5))
    require_newest(rebuild(server.message_for(None), damaged, (COUNT,)), server)


def test_steps_that_do_not_lead_to_the_version_are_malformed() -> None:
    message = series(3).message_for(1)
    for wrong in ({"version": 4}, {"first": 1}, {"deltas": ()}, {"deltas": message.deltas[1:]}):
        assert refusal_of(replace(message, **wrong), device_of(series(1))) is Refusal.MALFORMED


def test_a_model_of_another_size_is_malformed() -> None:
    message = series(2).message_for(None)
    for count in (0, COUNT - 1, COUNT + 1):
        assert refusal_of(message, None, count) is Refusal.MALFORMED
    assert refusal_of(replace(message, values=compress(bytes(10**7))), None) is Refusal.MALFORMED


WRONG: list[dict[str, Any]] = [
    *({"series": name} for name in (b"", b"s" * 15, b"s" * 17)),
    *({"digest": digest} for digest in (b"", b"d" * 31, b"d" * 33)),
    {"format": 2},
    {"version": 2**31 + 1},
    *({"deltas": (Delta((step,), 1, b"b", b""),)} for step in (-1.0, float("inf"), float("nan"))),
    *({"deltas": (Delta((1.0,), size, b"b", b""),)} for size in (0, 3)),
    {"deltas": (Delta((1.0,), 1, b"", b""),)},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
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
            rebuilt = rebuild(Broadcast.from_bytes(bytes(data[:cut])), had, (60,))
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
