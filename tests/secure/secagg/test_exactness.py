"""The sum is the plain sum, bit for bit, or it is not told at all."""

from __future__ import annotations

from itertools import combinations
from typing import NamedTuple

import numpy as np
import pytest
from attacks.uniformity import looks_uniform
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol import SHARED_INPUT, Cohort, Round, plain_sum, server_from

from propolis.protos import secagg_pb2 as pb
from propolis.secure.codec.lanes import LANES
from propolis.secure.errors import StorageError, TooFewPeersError
from propolis.secure.ring import Vector
from propolis.secure.secagg.device_state import DeviceState
from propolis.secure.secagg.messages import UploadReply, from_bytes
from propolis.simulations.federation import Federation

SPARSE = {"corrupted_ppm": 50_000, "dropped_ppm": 100_000}


class Case(NamedTuple):
    """A round: who falls silent at which exchange, and whether all state goes through bytes in between."""

    devices: int
    width: int
    malicious: bool
    dimension: int
    lanes: int
    silent: dict[int, str]
    reloaded: bool

    def at(self, exchange: str) -> set[int]:
        return {index for index, step in self.silent.items() if step == exchange}

    @property
    def able(self) -> bool:
        """Whether the design promises a sum: everybody keeps t neighbours at every exchange."""
        threshold = 2 * (self.devices - 1) // 3 + 1
        prepared = self.devices - len(self.at("prepare"))
        alive = prepared - len(self.at("upload"))
        answering = alive - len(self.at("unmask"))
        return prepared > threshold and alive > threshold and answering > threshold


@st.composite
def cases(draw: st.DrawFn) -> Case:
    devices = draw(st.integers(3, 9))
    width = draw(st.integers((2 * devices).bit_length(), 32))
    losses = st.dictionaries(
        st.integers(0, devices - 1), st.sampled_from(["prepare", "upload", "unmask"]), max_size=devices // 2
    )
    sizes = draw(st.tuples(st.integers(0, 40), st.integers(0, 5)))
    return Case(devices, width, draw(st.booleans()), *sizes, draw(losses), draw(st.booleans()))


def reload_between_exchanges(played: Round) -> None:
    """From here on, every reply finds the server and the device that gave it restored from their bytes."""

    def meddle(step: str, index: int, data: bytes) -> bytes:
        if step.endswith("reply"):
            cohort = played.cohort
            played.server = server_from(played.server.to_bytes(), cohort.roster)
            states = list(cohort.federation.devices)
            states[index] = DeviceState.from_bytes(states[index].to_bytes())
            cohort.federation = Federation(cohort.federation.root, cohort.federation.roster, tuple(states))
        return data

    played.meddle = meddle


def plain_lanes(played: Round) -> Vector:
    lanes = [np.arange(index, index + played.lanes, dtype=np.uint64) for index in played.server.alive]
    return plain_sum(lanes, LANES.zeros(played.lanes))


def assert_exact(played: Round, vector: Vector, lanes: Vector) -> None:
    assert vector.dtype == played.terms.grid.ring.dtype
    assert vector.tolist() == played.expected().tolist()
    assert lanes.tolist() == plain_lanes(played).tolist()


@given(cases())
@settings(deadline=None, max_examples=60)
def test_the_sum_is_the_plain_sum_or_none(case: Case) -> None:
    cohort = Cohort(case.devices)
    played = cohort.round(cohort.plan(width=case.width, malicious=case.malicious), case.dimension, case.lanes)
    if case.reloaded:
        reload_between_exchanges(played)
    silent = (case.at("prepare"), case.at("upload"), case.at("unmask"))
    if not case.able:
        with pytest.raises(TooFewPeersError):
            played.through(*silent)
        return
    assert_exact(played, *played.through(*silent))
    assert set(played.server.alive) == set(range(case.devices)) - silent[0] - silent[1]


@pytest.mark.parametrize("malicious", [False, True])
@pytest.mark.parametrize("width", [4, 7, 8, 9, 16, 17, 24, 31, 32])
def test_every_width_adds_up_exactly(width: int, malicious: bool) -> None:
    played = Cohort(7).round(width=width, malicious=malicious, dimension=100)
    assert_exact(played, *played.through(upload=[3]))


@pytest.mark.parametrize("silent", [(), (0,), (9,), (0, 9)])
@pytest.mark.parametrize("exchange", ["prepare", "upload", "unmask"])
def test_a_device_may_be_lost_at_any_exchange_while_t_neighbours_stay(exchange: str, silent: tuple[int, ...]) -> None:
    played = Cohort(10).round()
    assert played.terms.sharing.threshold == 7  # of 9: two may go
    assert_exact(played, *played.through(**{exchange: silent}))


def test_a_sparse_round_adds_up_exactly_in_spite_of_the_lost() -> None:
    played = Cohort(72).round(**SPARSE)
    assert played.terms.sharing.degree < 71
    vector, lanes = played.through(prepare=[5], upload=[0, 40], unmask=[70])
    assert len(played.server.alive) == 69
    assert not played.refused
    assert_exact(played, vector, lanes)


def test_a_sparse_round_ends_when_one_device_has_too_few_neighbours_left() -> None:
    played = Cohort(70).round(**SPARSE)
    lonely = played.terms.neighbours(0)[: played.terms.sharing.degree - played.terms.sharing.threshold + 1]
    played.prepare()
    played.upload(silent=lonely)
    threshold = played.terms.sharing.threshold
    assert played.terms.sharing.degree < 69
    with pytest.raises(TooFewPeersError, match=f"device 0 has {threshold - 1} neighbours among them, {threshold} are"):
        played.server.close_uploads()


def test_a_round_without_uploads_has_no_sum() -> None:
    played = Cohort(4).round()
    played.prepare()
    with pytest.raises(TooFewPeersError, match="no device sent a masked update"):
        played.sum()
    with pytest.raises(TooFewPeersError, match="no device sent a masked update"):
        played.server.close_uploads()


def test_a_sum_asked_for_too_early_spoils_nothing() -> None:
    played = Cohort(7).round()
    played.prepare()
    played.upload()
    played.server.close_uploads()
    played.unmask(silent=[0, 1])
    with pytest.raises(TooFewPeersError, match="shares of device 2 came, 5 are needed"):
        played.sum()
    played.unmask()
    for _ in range(2):
        assert_exact(played, *played.sum())


@pytest.mark.parametrize("malicious", [False, True])
def test_state_that_went_through_bytes_stays_the_same(malicious: bool) -> None:
    played = Cohort(5).round(malicious=malicious)
    played.prepare()
    played.upload(silent=[4])
    played.server.close_uploads()
    if malicious:
        played.confirm()
    played.unmask()
    state = played.server.to_bytes()
    restored = server_from(state, played.cohort.roster)
    assert restored.to_bytes() == state
    assert restored.alive == played.server.alive
    assert restored.metrics == played.server.metrics
    for device in played.cohort.federation.devices:
        assert DeviceState.from_bytes(device.to_bytes()) == device
    assert_exact(played, *restored.sum(SHARED_INPUT, threads=1))


@pytest.mark.parametrize("version", [0, 1, 3])
def test_server_state_of_another_format_is_refused(version: int) -> None:
    played = Cohort(3).round()
    state = pb.ServerState.FromString(played.server.to_bytes())
    state.version = version
    with pytest.raises(StorageError, match=f"is damaged: format {version}"):
        server_from(state.SerializeToString(), played.cohort.roster)


def test_server_state_of_another_cohort_or_length_is_refused() -> None:
    played = Cohort(4).round()
    for field, message in (("members", "not the round's cohort"), ("total", "expected a vector of 7 elements")):
        state = pb.ServerState.FromString(played.server.to_bytes())
        if field == "members":
            del state.members[2]
        else:
            state.total = state.total[:-1]
        with pytest.raises(StorageError, match=message):
            server_from(state.SerializeToString(), played.cohort.roster)


# What a masked upload looks like.


def masked_zeros(cohort: Cohort, number: int = 1, attempt: int = 0, width: int = 32) -> dict[int, UploadReply]:
    """What the devices upload when every value is zero."""
    played, uploads = cohort.round(cohort.plan(number, attempt, width=width), 4096, 512), {}
    ring = played.terms.grid.ring
    played.inputs = {index: ring.zeros(4096) for index in played.terms.cohort}

    def keep(step: str, index: int, data: bytes) -> bytes:
        if step == "upload reply":
            uploads[index] = from_bytes(UploadReply, data)
        return data

    played.meddle = keep
    played.prepare()
    played.upload()
    return uploads


@pytest.mark.parametrize("width", [4, 8, 12, 16, 32])
def test_a_masked_constant_looks_uniform(width: int) -> None:
    assert not looks_uniform(bytes(4096))
    for upload in masked_zeros(Cohort(4), width=width).values():
        assert looks_uniform(upload.vector)
        assert looks_uniform(upload.lanes)
        assert upload.lanes[:256] not in upload.vector


def test_no_two_masked_uploads_have_anything_in_common() -> None:
    """Between clients, attempts and rounds the difference of two uploads of the same values looks uniform too."""
    cohort = Cohort(4)
    names = [(1, 0), (1, 1), (2, 0)]
    uploads = [upload for name in names for upload in masked_zeros(cohort, *name).values()]
    assert len(uploads) == 12
    for one, other in combinations(uploads, 2):
        vectors = np.frombuffer(one.vector, "<u4") - np.frombuffer(other.vector, "<u4")
        lanes = np.frombuffer(one.lanes, "<u8") - np.frombuffer(other.lanes, "<u8")
        assert looks_uniform(vectors.tobytes())
        assert looks_uniform(lanes.tobytes())
