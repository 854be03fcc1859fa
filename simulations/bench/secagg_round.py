"""One secure sum of ours, measured: the server's real role; the transport to the devices is not timed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from propolis.messages import model_digest, model_in, shared_input_of
from propolis.secure.codec.pipeline import Pipeline
from propolis.secure.codec.quantize import wrap_free
from propolis.secure.codec.update import Mean, count_lanes, decode_mean
from propolis.secure.graph import Sharing
from propolis.secure.identity import trusted_roster
from propolis.secure.ring import Vector
from propolis.secure.secagg.addition import RingTotal
from propolis.secure.secagg.messages import (
    HelloReply,
    HelloRequest,
    PrepareReply,
    UnmaskReply,
    UploadReply,
    from_bytes,
    to_bitmap,
    to_bytes,
)
from propolis.secure.secagg.plan import Encoding, Kind, Plan, Terms
from propolis.secure.secagg.runs import new_run_id
from propolis.secure.secagg.server import SecAggServer
from propolis.secure.secagg.states import Exchange
from propolis.server.directory import Directory
from propolis.simulations.bench.secagg_devices import NAME, RANGE, Devices, content_of, update_of

_BITS = 16


@dataclass(frozen=True, slots=True)
class SecureSum:
    """What came of it.

    Attributes:
        mean: of the updates of the devices that were left, all of weight 1.
        alive: these devices.
        server_seconds: all of the server's work.
        sharing: how many neighbours shared each secret.
    """

    mean: Mean
    alive: tuple[int, ...]
    server_seconds: float
    sharing: Sharing

    def largest_error(self) -> float:
        """Largest absolute difference from the plain mean."""
        (found,) = self.mean.changes.values()
        expected = np.zeros(found.shape)
        for index in self.alive:
            expected += update_of(index, len(expected))
        return float(np.abs(found - expected / len(self.alive)).max())


def secure_sum(devices: Devices, count: int, dimension: int, dropped: Collection[int]) -> SecureSum:
    """The first round of a run, hello included, as `propolis.server.grid` drives it.

    Args:
        devices: who takes part.
        count: how many.
        dimension: length of their updates.
        dropped: who falls silent after having prepared.
    """
    content = content_of(dimension)
    began = time.perf_counter()
    asking = _Asking(devices)
    shared_input = shared_input_of(content, model_digest(model_in(content)), "")
    server = _introduced(asking, count, dimension)
    for index in server.terms.cohort:
        server.receive_prepare(index, from_bytes(PrepareReply, asking(Exchange.PREPARE, index, server.prepare_request)))
    for index in server.ready:
        if index in dropped:
            to_bytes(server.upload_request(index))
        else:
            server.receive_upload(index, from_bytes(UploadReply, asking(Exchange.UPLOAD, index, server.upload_request)))
    server.close_uploads()
    for index in server.alive:
        server.receive_unmask(index, from_bytes(UnmaskReply, asking(Exchange.UNMASK, index, server.unmask_request)))
    vector, lanes = server.sum(shared_input)
    pipeline, alive = Pipeline(server.terms.encoding, count, {NAME: (dimension,)}, {}), server.alive
    mean = decode_mean(vector, lanes, server.metrics, pipeline, len(alive))
    return SecureSum(mean, alive, time.perf_counter() - began - asking.seconds, server.terms.sharing)


class _Asking:
    """Asks a device, and adds up how long that took: making the request and reading the reply is the server's work."""

    def __init__(self, devices: Devices) -> None:
        self.devices = devices
        self.seconds = 0.0

    def __call__(self, exchange: Exchange, index: int, request_for: Callable[[int], object]) -> bytes:
        request = to_bytes(request_for(index))
        began = time.perf_counter()
        reply = self.devices.answer(exchange, index, request)
        self.seconds += time.perf_counter() - began
        return reply


def plain_encoding(devices: int) -> Encoding:
    """As the codec float32 has it: all the values, on a grid on which no sum can leave the ring."""
    grid = wrap_free(_BITS, devices, RANGE)
    return Encoding(grid.width, grid.step, grid.levels, 1.0, "num-examples", (NAME,), ())


def _introduced(asking: _Asking, count: int, dimension: int) -> SecAggServer[Vector]:
    """The server's role once all the devices have said hello."""
    roster = trusted_roster(asking.devices.root_key, asking.devices.roster)
    directory, hello = Directory(roster), HelloRequest(roster.signed, os.urandom(32))
    for index in range(count):
        reply = from_bytes(HelloReply, asking(Exchange.HELLO, index, lambda _: hello))
        directory.take_hello(index, hello.challenge, reply)
    plan = Plan(
        encoding=plain_encoding(count),
        malicious=False,
        run_id=new_run_id(time.time(), os.urandom),
        round=1,
        attempt=0,
        kind=Kind.TRAIN,
        roster_number=roster.number,
        roster_digest=roster.digest,
        cohort=to_bitmap(range(count), len(roster.roster.entries)),
        corrupted_ppm=100_000,
        dropped_ppm=250_000,
    )
    keys = {index: directory.spend(index) for index in range(count)}
    shapes = {NAME: (dimension,)}
    terms = Terms(plan.to_bytes())
    total = RingTotal(terms.grid.ring, terms.encoding.dimension(shapes))
    return SecAggServer(terms, roster, keys, total, count_lanes(terms.encoding, shapes))
