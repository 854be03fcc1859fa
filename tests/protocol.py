"""One secure round in memory: real devices and a real server role, with a place to meddle at every message."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from encrypting import decryptor, encryptor, key_of, scheme, tags

from propolis.secure.codec.quantize import wrap_free
from propolis.secure.errors import RefusedError
from propolis.secure.he.held import EncodedUpdate, layout_of
from propolis.secure.he.keys import PublicKey, Secret
from propolis.secure.he.layout import Layout
from propolis.secure.he.messages import EncryptedPlan, Entry, pieces
from propolis.secure.he.stream import Declared, open_vector
from propolis.secure.he.tag import Tags, tag_bytes
from propolis.secure.he.total import EncryptedTotal, Summed
from propolis.secure.identity import TrustedRoster, trusted_roster
from propolis.secure.prg import Mask
from propolis.secure.ring import Vector
from propolis.secure.secagg.addition import Addend, RingTotal, RingVector, Total
from propolis.secure.secagg.device import Device, Upload
from propolis.secure.secagg.masks import pairwise_masks
from propolis.secure.secagg.messages import (
    RECORD_BYTES,
    ConfirmReply,
    HelloReply,
    HelloRequest,
    NeighbourKeys,
    PrepareReply,
    PrepareRequest,
    UnmaskReply,
    UnmaskRequest,
    UploadReply,
    from_bytes,
    marked,
    marks,
    to_bitmap,
    to_bytes,
)
from propolis.secure.secagg.plan import Encoding, Kind, Plan, Terms
from propolis.secure.secagg.policy import Policy
from propolis.secure.secagg.preparation import delivery_path_size
from propolis.secure.secagg.runs import new_run_id
from propolis.secure.secagg.server import SecAggServer
from propolis.secure.shamir import SHARE_BYTES
from propolis.simulations.federation import Federation, make_federation

T = TypeVar("T")
# What the server sends to a device, and what the device answers, may be changed on the way: (step, index, bytes).
Meddle = Callable[[str, int, bytes], bytes]

SHARED_INPUT, MODEL = b"i" * 32, b"m" * 32
UNLIMITED = Policy(min_cohort=2, max_reveals_per_model=None)


def untouched(step: str, index: int, data: bytes) -> bytes:
    return data


def pairwise_mask(own: int, own_private: bytes, other: int, other_key: bytes, plan: bytes, shared_input: bytes) -> Mask:
    """The mask of one pair."""
    (mask,) = pairwise_masks(own, own_private, [(other, other_key)], plan, shared_input)
    return mask


def plain_encoding(
    quantized: tuple[str, ...],
    exact: tuple[str, ...] = (),
    *,
    width: int = 16,
    devices: int = 3,
    range_: float = 1.0,
    max_weight: float = 1.0,
    weight_key: str = "num-examples",
) -> Encoding:
    """All the values on the finest grid on which no sum of so many devices can leave the ring."""
    grid = wrap_free(width, devices, range_)
    return Encoding(width, grid.step, grid.levels, max_weight, weight_key, quantized, exact)


def another_run(name: bytes = b"another ") -> bytes:
    """The name of a run that began today; the same one in all processes of the tests."""
    return new_run_id(time.time() // 86400 * 86400, lambda size: name[:size])


# What a sum is over is the same protocol: vectors in a ring, or ciphertexts; a fixture of the attacks chooses.
over_ciphertexts = ContextVar("over_ciphertexts", default=False)
MOST_DEVICES = 128


def encryption() -> tuple[PublicKey, Secret]:
    """The key of homomorphic encryption that all of them have."""
    return key_of(scheme(MOST_DEVICES))


class Cohort:
    """A federation whose devices live in memory, between rounds."""

    def __init__(self, devices: int, policy: Policy = UNLIMITED, federation: Federation | None = None) -> None:
        self.federation = federation or make_federation(devices)
        self.policy = policy
        self.run_id = new_run_id(time.time(), os.urandom)
        self.now = time.time()
        self.signed_roster = self.federation.roster

    @property
    def roster(self) -> TrustedRoster:
        return trusted_roster(self.federation.root_key, self.signed_roster)

    def device(self, index: int) -> Device:
        return Device(self.federation.devices[index], self.policy, self.now)

    def hello(self, index: int) -> NeighbourKeys:
        request = HelloRequest(self.signed_roster, os.urandom(32))
        reply = from_bytes(HelloReply, self.device(index).hello(to_bytes(request)))
        return NeighbourKeys(reply.descriptor, reply.prekey)

    def plan(self, number: int = 1, attempt: int = 0, **changes: Any) -> Plan:
        cohort = changes.pop("cohort", range(len(self.federation.devices)))
        dimension = changes.pop("dimension", 8)
        sent = () if changes.get("kind") == Kind.EVALUATE else ("a",)
        encoding = plain_encoding(sent, width=changes.pop("width", 16), devices=len(list(cohort)))
        values: dict[str, Any] = {
            "encoding": encoding,
            "malicious": False,
            "run_id": self.run_id,
            "round": number,
            "attempt": attempt,
            "kind": Kind.TRAIN,
            "roster_number": self.roster.number,
            "roster_digest": self.roster.digest,
            "cohort": to_bitmap(list(cohort), len(self.roster.roster.entries)),
            "corrupted_ppm": 100_000,
            "dropped_ppm": 250_000,
        }
        plan = Plan(**{**values, **changes})
        return encrypted_plan(plan, dimension) if over_ciphertexts.get() else plan

    def round(self, plan: Plan | None = None, dimension: int = 8, lanes: int = 2, **changes: Any) -> Round:
        """A round of all the devices, who say hello first."""
        terms = Terms((plan or self.plan(dimension=dimension, **changes)).to_bytes())
        keys = {index: self.hello(index) for index in terms.cohort}
        server = SecAggServer(terms, self.roster, keys, empty_total(terms, dimension), lanes)
        return Round(self, terms, server, dimension, lanes)


def empty_total(terms: Terms, dimension: int = 0) -> Total[Any]:
    """What the updates of a round are added to."""
    if terms.is_encrypted:
        return EncryptedTotal(EncryptedPlan.from_bytes(terms.plan.encrypted), encryption()[0], ())
    return RingTotal(terms.grid.ring, dimension)


def server_from(state: bytes, roster: TrustedRoster) -> SecAggServer[Any]:
    """A server's role from its state."""
    return SecAggServer.from_bytes(state, roster, empty_total)


def encrypted_plan(plan: Plan, dimension: int) -> Plan:
    """The same round over ciphertexts."""
    entries = (Entry("a", "float32", (dimension,)),) if plan.kind == Kind.TRAIN else ()
    names = (plan.run_id, plan.round, plan.attempt, plan.kind, plan.roster_number, plan.roster_digest)
    inner = EncryptedPlan(*names, encryption()[0].key_id, "num-examples", 1.0, 1.0, entries)
    return replace(plan, encoding=None, encrypted=inner.encoded)


@dataclass
class Round:
    """One attempt at one round; `refused` says what a device refused, and why."""

    cohort: Cohort
    terms: Terms
    server: SecAggServer[Any]
    dimension: int
    lanes: int
    meddle: Meddle = untouched
    inputs: dict[int, Vector] = field(default_factory=dict)
    shared_inputs: dict[int, bytes] = field(default_factory=dict)
    refused: dict[int, RefusedError] = field(default_factory=dict)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def prepare(self, silent: Collection[int] = ()) -> None:
        for index in self.terms.cohort:
            if index not in silent:
                request = to_bytes(self.server.prepare_request(index))
                reply = self._ask("prepare", index, request, self.cohort.device(index).prepare)
                if reply is not None:
                    self.server.receive_prepare(index, from_bytes(PrepareReply, reply))

    def upload(self, silent: Collection[int] = ()) -> None:
        for index in self.server.prepared:
            if index not in silent:
                request = to_bytes(self.server.upload_request(index))
                reply = self._ask("upload", index, request, lambda asked, i=index: self.masked(i, asked))
                if reply is not None:
                    self.server.receive_upload(index, from_bytes(UploadReply, reply))

    def masked(self, index: int, request: bytes) -> bytes:
        """A device's answer to an upload request: its input, drawn on first use, masked."""
        device, shared_input = self.cohort.device(index), self.shared_inputs.get(index, SHARED_INPUT)
        if (stored := device.begin_upload(request, shared_input)) is not None:
            return stored
        lanes = np.arange(index, index + self.lanes, dtype=np.uint64)
        update = self._encrypted(index) if self.terms.is_encrypted else self._in_ring(index)
        return device.upload(request, Upload(shared_input, MODEL, update, lanes, ()))

    def _in_ring(self, index: int) -> Addend:
        ring = self.terms.grid.ring
        if index not in self.inputs:
            drawn = self.rng.integers(0, 2 ** min(ring.width, 62), self.dimension, dtype=np.uint64)
            self.inputs[index] = drawn.astype(ring.dtype)
        return RingVector(self.inputs[index].copy(), ring)

    def _encrypted(self, index: int) -> Addend:
        if index not in self.inputs:
            self.inputs[index] = self.rng.integers(-(2**15), 2**15, self._layout.count)
        tag, values = self._encrypted_plan.tag, self.inputs[index]
        return EncodedUpdate(tag, (), values, encryptor(scheme(MOST_DEVICES)), self._tags, index)

    @property
    def _encrypted_plan(self) -> EncryptedPlan:
        return EncryptedPlan.from_bytes(self.terms.plan.encrypted)

    @property
    def _layout(self) -> Layout:
        return layout_of(self._encrypted_plan, (), encryption()[0].parameters)

    @property
    def _tags(self) -> Tags:
        made = scheme(MOST_DEVICES)
        return tags(
            made, made.parameters.ciphertexts(self._layout.count), self._encrypted_plan.round_id((), SHARED_INPUT)
        )

    def opened(self, summed: Summed) -> Any:
        """What a sum of ciphertexts says to who has the key; raises PeerError where it is not that of the alive."""
        made = scheme(MOST_DEVICES)
        size = made.ciphertext_bytes + tag_bytes(made.parameters)
        declared = Declared(self.server.alive, 1, self._layout.count)
        return open_vector(pieces(summed.ciphertexts, size), decryptor(made), self._tags, declared)

    def confirm(self, silent: Collection[int] = ()) -> None:
        for index in self.server.alive:
            if index not in silent:
                request = to_bytes(self.server.confirm_request())
                reply = self._ask("confirm", index, request, self.cohort.device(index).confirm)
                if reply is not None:
                    self.server.receive_confirm(index, from_bytes(ConfirmReply, reply))

    def unmask(self, silent: Collection[int] = ()) -> None:
        for index in self.server.alive:
            if index not in silent:
                request = to_bytes(self.server.unmask_request(index))
                reply = self._ask("unmask", index, request, self.cohort.device(index).unmask)
                if reply is not None:
                    self.server.receive_unmask(index, from_bytes(UnmaskReply, reply))

    def masking(self, index: int) -> list[int]:
        """The neighbours that a device masks for."""
        return [other for other in self.terms.neighbours(index) if other in self.server.prepared]

    def sum(self) -> tuple[Vector, Vector]:
        total, lanes = self.server.sum(SHARED_INPUT, threads=1)
        return self.opened(total) if self.terms.is_encrypted else total, lanes

    def expected(self) -> Vector:
        """The plain sum of the inputs of the devices that are alive."""
        if self.terms.is_encrypted:
            return np.sum([self.inputs[index] for index in self.server.alive], axis=0)
        ring = self.terms.grid.ring
        return ring.reduce(plain_sum([self.inputs[index] for index in self.server.alive], ring.zeros(self.dimension)))

    def through(
        self, prepare: Collection[int] = (), upload: Collection[int] = (), unmask: Collection[int] = ()
    ) -> tuple[Vector, Vector]:
        """The whole round; the arguments name who is silent from that exchange on."""
        self.prepare(prepare)
        self.upload(upload)
        self.server.close_uploads()
        if self.terms.plan.malicious:
            self.confirm()
        self.unmask(unmask)
        return self.sum()

    def _ask(self, step: str, index: int, request: bytes, answer: Callable[[bytes], bytes]) -> bytes | None:
        try:
            return self.meddle(f"{step} reply", index, answer(self.meddle(f"{step} request", index, request)))
        except RefusedError as error:
            self.refused[index] = error
            return None


def asking(plan: bytes, prekey_number: int, neighbours: Sequence[NeighbourKeys]) -> PrepareRequest:
    """A prepare request that tells a device of all its neighbours."""
    prekeys, descriptors = (tuple(getattr(each, name) for each in neighbours) for name in ("prekey", "descriptor"))
    return PrepareRequest(plan, prekey_number, prekeys, descriptors)


def shares_in(reply: UnmaskReply, masking: Sequence[int]) -> dict[int, bytes]:
    """The shares in a reply, by dealer; `masking` are the neighbours that its sender masked for."""
    unopened = marked(reply.unopened, masking)
    dealers = [dealer for dealer in masking if dealer not in unopened]
    assert len(reply.shares) == SHARE_BYTES * len(dealers)
    pieces = (reply.shares[start : start + SHARE_BYTES] for start in range(0, len(reply.shares), SHARE_BYTES))
    return dict(zip(dealers, pieces, strict=True))


def with_shares(reply: UnmaskReply, masking: Sequence[int], shares: Mapping[int, bytes]) -> UnmaskReply:
    """The reply with these shares and no others."""
    unopened = marks([dealer for dealer in masking if dealer not in shares], masking)
    values = b"".join(shares[dealer] for dealer in masking if dealer in shares)
    return replace(reply, shares=values, unopened=unopened)


def deliveries_in(request: UnmaskRequest, terms: Terms, holder: int, masking: Sequence[int]) -> list[bytes]:
    """Record and path of each masking neighbour, in a request to `holder`."""
    pieces, start = [], 0
    for dealer in masking:
        holders = terms.neighbours(dealer)
        end = start + RECORD_BYTES + delivery_path_size(holders.index(holder), len(holders))
        pieces.append(request.deliveries[start:end])
        start = end
    assert start == len(request.deliveries)
    return pieces


def plain_sum(vectors: Iterable[Vector] | Sequence[Vector], zero: Vector) -> Vector:
    for vector in vectors:
        zero += vector
    return zero
