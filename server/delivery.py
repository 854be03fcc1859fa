"""Releases for the devices that ask for them: the service Delivery, on the link's port and under its mutual TLS.

Who asks is who its certificate says; a request names no device. Membership is looked at with every chunk, so revoking a
device, or stopping a rollout, ends a download that is under way. Bytes come from the disk as they are wanted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any

import grpc

from propolis.link.certificates import DeviceName
from propolis.link.delivery import (
    LARGEST_REQUEST,
    SERVICE,
    AnnounceReply,
    AnnounceRequest,
    FetchRequest,
    LookReply,
    LookRequest,
    OpenReply,
    OpenRequest,
    Outcome,
    Piece,
    Release,
    ReportReply,
    ReportRequest,
    RosterRequest,
)
from propolis.link.rate import Rate
from propolis.protos import identity_pb2
from propolis.protos import model_pb2 as pb
from propolis.secure.envelope import SEALED_CHUNK_BYTES
from propolis.secure.errors import PropolisError, Refusal, RefusedError, TrustError
from propolis.secure.wire import decode, encode
from propolis.server.membership import Membership
from propolis.server.patience import Patience
from propolis.server.reports import Report, Reports
from propolis.server.shelf import NotOnOfferError, Shelf

# Of one device, which needs one and may not have noticed that another was cut.
_MOST_FETCHES = 2
# An honest device asks a handful of times for each release.
_MOST_ASKED, _ASKED_IN_S = 200, 10.0
# A device that takes longer for a chunk has gone, or keeps the server's memory on purpose.
_LONGEST_WRITE_S = 60.0
# Pieces in memory for devices that are quick to take them; one that is not gives its turn to another.
_MOST_SENDING, _QUICK_WRITE_S = 32, 1.0
_log = logging.getLogger("propolis.server")

Answer = Callable[[Any, DeviceName], Awaitable[object]]
Read = Callable[[], bytes]
Answers = Callable[[Any, DeviceName], AsyncGenerator[Read, None]]


class Delivery:
    """See the module.

    Args:
        shelf: what is on offer.
        membership: who may ask; somebody else keeps it up to date.
        reports: where what devices say goes.
        rate: bytes per second to all devices together; 0 is as fast as it goes.
    """

    def __init__(self, shelf: Shelf, membership: Membership, reports: Reports, rate: float = 0) -> None:
        self._shelf, self._membership, self._reports = shelf, membership, reports
        self._rate = Rate(rate)
        self._patience = Patience(_MOST_ASKED, _ASKED_IN_S)
        self._sending = asyncio.Semaphore(_MOST_SENDING)
        self._fetches: Counter[int] = Counter()

    def refresh(self) -> bool:
        """Look for changes, often; whether devices should ask again."""
        return self._shelf.refresh()

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a gRPC server is given."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Look": self._unary(self._look, LookRequest, pb.LookRequest, pb.LookReply),
                "Announce": self._unary(self._announce, AnnounceRequest, pb.AnnounceRequest, pb.AnnounceReply),
                "Open": self._unary(self._open, OpenRequest, pb.OpenRequest, pb.OpenReply),
                "Report": self._unary(self._report, ReportRequest, pb.ReportRequest, pb.ReportReply),
                "FetchRoster": self._stream(self._roster, RosterRequest, pb.RosterRequest),
                "Fetch": self._stream(self._fetch, FetchRequest, pb.FetchRequest),
            },
        )

    async def _look(self, asked: LookRequest, name: DeviceName) -> LookReply:
        self._shelf.look()
        for release in asked.installed:
            await self._note(release, name, Outcome.INSTALLED)
        unknown = await asyncio.to_thread(self._membership.announced, name.index) is None
        return LookReply(self._membership.roster.number, tuple(self._shelf.offers_for(name)), unknown)

    async def _announce(self, asked: AnnounceRequest, name: DeviceName) -> AnnounceReply:
        await asyncio.to_thread(self._membership.announce, name.index, asked.announcement)
        return AnnounceReply()

    async def _open(self, asked: OpenRequest, name: DeviceName) -> OpenReply:
        self._shelf.look()
        offer = self._shelf.require(asked.release, name)
        return OpenReply(offer.header, await asyncio.to_thread(self._shelf.key, offer, name))

    async def _report(self, asked: ReportRequest, name: DeviceName) -> ReportReply:
        await self._note(asked.release, name, Outcome(asked.outcome), asked.reason)
        return ReportReply()

    async def _note(self, release: Release, name: DeviceName, outcome: Outcome, reason: str = "") -> None:
        """Nothing is kept of releases that this server never had: a device could make up any number of them."""
        if not self._shelf.knows(release):
            return
        printable = reason if reason.isprintable() else "unprintable"
        await asyncio.to_thread(self._reports.note, release, Report(name.index, outcome, printable, time.time()))
        if outcome is Outcome.FAILED:
            _log.warning("%s failed on a device: %s", release, printable, extra={"index": name.index})

    async def _roster(self, _: RosterRequest, __: DeviceName) -> AsyncGenerator[Read, None]:
        data = encode(self._membership.roster.signed, identity_pb2.Signed)

        def piece(begin: int) -> bytes:
            return data[begin : begin + SEALED_CHUNK_BYTES]

        for begin in range(0, len(data), SEALED_CHUNK_BYTES):
            yield partial(piece, begin)

    async def _fetch(self, asked: FetchRequest, name: DeviceName) -> AsyncGenerator[Read, None]:
        offer = self._shelf.require(asked.release, name)
        with self._one_more(name), offer.opened() as chunk:
            for number in range(asked.first, offer.chunks):
                self._shelf.require(asked.release, name)
                yield partial(chunk, number)

    @contextmanager
    def _one_more(self, name: DeviceName) -> Iterator[None]:
        if self._fetches[name.index] >= _MOST_FETCHES:
            raise _BusyError(f"device {name.index} fetches {_MOST_FETCHES} times already")
        self._fetches[name.index] += 1
        try:
            yield
        finally:
            self._fetches[name.index] -= 1

    def _unary(self, answer: Answer, cls: type, proto: type, reply: type) -> grpc.RpcMethodHandler:
        async def handle(data: bytes, context: Any) -> bytes:
            try:
                return encode(await answer(decode(cls, data, proto, LARGEST_REQUEST), self._asker(context)), reply)
            except PropolisError as error:
                await _abort(context, error)
                raise

        return grpc.unary_unary_rpc_method_handler(handle)

    def _stream(self, answers: Answers, cls: type, proto: type) -> grpc.RpcMethodHandler:
        async def handle(data: bytes, context: Any) -> None:
            try:
                name = self._asker(context)
                async with aclosing(answers(decode(cls, data, proto, LARGEST_REQUEST), name)) as pieces:
                    async for piece in pieces:
                        self._membership.require(name)
                        await self._send(piece, context)
            except PropolisError as error:
                await _abort(context, error)
            except TimeoutError:
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the device does not read")

        return grpc.unary_stream_rpc_method_handler(handle)

    async def _send(self, read: Read, context: Any) -> None:
        """Read a piece and send it, when it is its turn; who is slow to take it keeps nobody else waiting."""
        async with self._sending:
            piece = encode(Piece(await asyncio.to_thread(read)), pb.Piece)
            await self._rate.take(len(piece))
            write = asyncio.ensure_future(context.write(piece))
            await asyncio.wait({write}, timeout=_QUICK_WRITE_S)
        await asyncio.wait_for(write, _LONGEST_WRITE_S)

    def _asker(self, context: Any) -> DeviceName:
        """Who asks, when it may; raises TrustError, or _BusyError when it did too often."""
        try:
            name = DeviceName.of(context.auth_context()["x509_pem_cert"][0])
        except KeyError:
            raise TrustError(Refusal.IDENTITY, "no certificate") from None
        self._membership.require(name)
        if self._patience.ends(name.index):
            raise _BusyError(f"device {name.index} asked more than {_MOST_ASKED} times in {_ASKED_IN_S:g} s")
        return name


class _BusyError(PropolisError):
    """A device asks for more than it needs."""


async def _abort(context: Any, error: PropolisError) -> None:
    """End a call with what is wrong, in gRPC's terms; a fault of the server's own is told in its log alone."""
    code, detail = _code_of(error), str(error)
    if code is grpc.StatusCode.UNAVAILABLE:
        _log.error("cannot answer a device: %s", error)
        detail = "the server cannot answer at the moment"
    elif code is grpc.StatusCode.PERMISSION_DENIED:
        _log.warning("refused a device: %s", error)
    await context.abort(code, detail)


def _code_of(error: PropolisError) -> grpc.StatusCode:
    if isinstance(error, _BusyError):
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    if isinstance(error, NotOnOfferError):
        return grpc.StatusCode.NOT_FOUND
    if isinstance(error, RefusedError):
        if error.refusal is Refusal.ROSTER:  # it has expired: to be mended here, not there
            return grpc.StatusCode.UNAVAILABLE
        if error.refusal is Refusal.PACKAGE:
            return grpc.StatusCode.FAILED_PRECONDITION
        is_theirs = isinstance(error, TrustError)
        return grpc.StatusCode.PERMISSION_DENIED if is_theirs else grpc.StatusCode.INVALID_ARGUMENT
    return grpc.StatusCode.UNAVAILABLE
