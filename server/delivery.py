"""Releases and keys for the devices that ask for them: the service Delivery, on the link's port, under its mutual TLS.

Who asks is who its certificate says; a request names no device. Membership is looked at with every chunk, so revoking a
device, or stopping a rollout, ends a download that is under way. Bytes come from the disk as they are wanted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, NoReturn

import grpc

from propolis.link.certificates import DeviceName
from propolis.link.delivery import (
    LARGEST_REQUEST,
    MOST_OFFERS,
    SERVICE,
    AnnounceReply,
    AnnounceRequest,
    FetchRequest,
    HeKeyReply,
    HeKeyRequest,
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
from propolis.secure.errors import PropolisError, Refusal, RefusedError, StorageError, TrustError
from propolis.secure.wire import decode, encode
from propolis.server.he_served import ServedKey
from propolis.server.membership import Membership
from propolis.server.patience import BusyError, Complaints, Patience
from propolis.server.reports import Report, Reports
from propolis.server.shelf import NotOnOfferError, Shelf

# An honest device asks a handful of times for each release, one thing after another; it may not have noticed that a
# connection was cut.
_MOST_ASKED, _ASKED_IN_S, _MOST_AT_ONCE, _MOST_STREAMS = 200, 10.0, 4, 2
# A device that takes longer for a chunk has gone, or keeps the server's memory on purpose.
_LONGEST_WRITE_S = 60.0
# Pieces in memory for devices that are quick to take them; one that is not gives its turn to another.
_MOST_SENDING, _QUICK_WRITE_S = 32, 1.0
_READERS = 4
_log = logging.getLogger("propolis.server")

Answer = Callable[[Any, DeviceName], Awaitable[object]]
# A piece that is still to be read, and how many bytes it has at most.
Unread = tuple[Callable[[], bytes], int]
Answers = Callable[[Any, DeviceName], AsyncGenerator[Unread, None]]


class Delivery:
    """See the module.

    Args:
        shelf: what is on offer.
        membership: who may ask; somebody else keeps it up to date.
        reports: where what devices say goes.
        rate: bytes per second to all devices together; 0 is as fast as it goes.
        he_key: of homomorphic encryption; None has none for anybody.
    """

    def __init__(
        self,
        shelf: Shelf,
        membership: Membership,
        reports: Reports,
        rate: float = 0,
        he_key: ServedKey | None = None,
    ) -> None:
        self._shelf, self._membership, self._reports, self._key = shelf, membership, reports, he_key
        self._rate = Rate(rate)
        self._sending = asyncio.Semaphore(_MOST_SENDING)
        self._questions = Patience(_MOST_ASKED, _ASKED_IN_S, _MOST_AT_ONCE)
        self._streams = Patience(_MOST_ASKED, _ASKED_IN_S, _MOST_STREAMS)
        self._complaints = Complaints(_log)
        # Reading must not wait for what devices make the server write, and that needs no more than one thread.
        self._readers = ThreadPoolExecutor(_READERS, "propolis-delivery")
        self._writer = ThreadPoolExecutor(1, "propolis-reports")
        self._roster: tuple[int, bytes] = (0, b"")

    def refresh(self) -> bool:
        """Look for changes, often; whether devices should ask again."""
        is_new_key = self._key is not None and self._key.refresh()
        return self._shelf.refresh() or is_new_key

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a gRPC server is given."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Look": self._unary(self._look, LookRequest, pb.LookRequest, pb.LookReply),
                "Announce": self._unary(self._announce, AnnounceRequest, pb.AnnounceRequest, pb.AnnounceReply),
                "Open": self._unary(self._open, OpenRequest, pb.OpenRequest, pb.OpenReply),
                "Report": self._unary(self._report, ReportRequest, pb.ReportRequest, pb.ReportReply),
                "HeKey": self._unary(self._he_key, HeKeyRequest, pb.HeKeyRequest, pb.HeKeyReply),
                "FetchRoster": self._stream(self._fetch_roster, RosterRequest, pb.RosterRequest),
                "Fetch": self._stream(self._fetch, FetchRequest, pb.FetchRequest),
            },
        )

    async def _look(self, asked: LookRequest, name: DeviceName) -> LookReply:
        self._shelf.look()
        await self._note(set(asked.installed), name, Outcome.INSTALLED)
        unknown = await self._written(self._membership.announced, name.index) is None
        offers = self._shelf.offers_for(name, asked.begun)[:MOST_OFFERS]
        return LookReply(self._membership.roster.number, tuple(offers), unknown)

    async def _announce(self, asked: AnnounceRequest, name: DeviceName) -> AnnounceReply:
        await self._written(self._membership.announce, name.index, asked.announcement)
        return AnnounceReply()

    async def _open(self, asked: OpenRequest, name: DeviceName) -> OpenReply:
        self._shelf.look()
        offer = self._shelf.require(asked.release, name)
        key = partial(self._shelf.key, offer, name)
        return OpenReply(offer.header, await asyncio.get_running_loop().run_in_executor(self._readers, key))

    async def _report(self, asked: ReportRequest, name: DeviceName) -> ReportReply:
        await self._note({asked.release}, name, Outcome(asked.outcome), asked.reason)
        return ReportReply()

    async def _he_key(self, asked: HeKeyRequest, name: DeviceName) -> HeKeyReply:
        if self._key is None:
            return HeKeyReply(b"")
        bundle = partial(self._key.bundle, name.index, asked.have)
        data = await asyncio.get_running_loop().run_in_executor(self._readers, bundle)
        await self._rate.take(len(data))
        return HeKeyReply(data)

    async def _note(self, releases: set[Release], name: DeviceName, outcome: Outcome, reason: str = "") -> None:
        """Keep what a device says, where that can be kept: models go out all the same.

        Nothing is kept of releases that this server never had: a device could make up any number of them.
        """
        known = [release for release in releases if self._shelf.knows(release)]
        printable = reason if reason.isprintable() else "unprintable"
        report = Report(name.index, outcome, printable, time.time())
        try:
            if known:
                await self._written(self._reports.note, known, report)
        except StorageError as error:
            self._complaints.say(f"cannot keep what devices report: {error}")
        if outcome is Outcome.FAILED:
            for release in known:
                self._complaints.say(f"{release} failed on a device: {printable}", name.index)

    async def _fetch_roster(self, _: RosterRequest, __: DeviceName) -> AsyncGenerator[Unread, None]:
        roster = self._membership.roster
        if self._roster[0] != roster.number:
            self._roster = (roster.number, encode(roster.signed, identity_pb2.Signed))
        data = self._roster[1]

        def piece(begin: int) -> bytes:
            return data[begin : begin + SEALED_CHUNK_BYTES]

        for begin in range(0, len(data), SEALED_CHUNK_BYTES):
            yield partial(piece, begin), min(SEALED_CHUNK_BYTES, len(data) - begin)

    async def _fetch(self, asked: FetchRequest, name: DeviceName) -> AsyncGenerator[Unread, None]:
        offer = self._shelf.require(asked.release, name)
        with offer.opened() as chunk:
            for number in range(asked.first, offer.chunks):
                self._shelf.require(asked.release, name)
                yield partial(chunk, number), SEALED_CHUNK_BYTES

    async def _send(self, unread: Unread, context: Any) -> None:
        """Read a piece and send it, when it is its turn; who is slow to take it keeps nobody else waiting."""
        read, size = unread
        await self._rate.take(size)
        write = None
        try:
            async with self._sending:
                data = await asyncio.get_running_loop().run_in_executor(self._readers, read)
                write = asyncio.ensure_future(context.write(encode(Piece(data), pb.Piece)))
                del data
                await asyncio.wait({write}, timeout=_QUICK_WRITE_S)
            await asyncio.wait_for(write, _LONGEST_WRITE_S)
        finally:
            if write is not None and not write.done():
                write.cancel()
                await asyncio.gather(write, return_exceptions=True)

    async def _written(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """A look at, or a change of, small files, beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, partial(call, *arguments))

    def _unary(self, answer: Answer, cls: type, proto: type, reply: type) -> grpc.RpcMethodHandler:
        async def handle(data: bytes, context: Any) -> bytes:
            try:
                with self._asking(context, self._questions) as name:
                    return encode(await answer(decode(cls, data, proto, LARGEST_REQUEST), name), reply)
            except Exception as error:
                await self._abort(context, error)

        return grpc.unary_unary_rpc_method_handler(handle)

    def _stream(self, answers: Answers, cls: type, proto: type) -> grpc.RpcMethodHandler:
        async def handle(data: bytes, context: Any) -> None:
            try:
                with self._asking(context, self._streams) as name:
                    async with aclosing(answers(decode(cls, data, proto, LARGEST_REQUEST), name)) as pieces:
                        async for unread in pieces:
                            self._membership.require(name)
                            await self._send(unread, context)
            except Exception as error:
                await self._abort(context, error)

        return grpc.unary_stream_rpc_method_handler(handle)

    @contextmanager
    def _asking(self, context: Any, patience: Patience) -> Iterator[DeviceName]:
        """Who asks, while it is answered; raises TrustError where it may not, BusyError where it did too often."""
        try:
            name = DeviceName.of(context.auth_context()["x509_pem_cert"][0])
        except KeyError:
            raise TrustError(Refusal.IDENTITY, "no certificate") from None
        self._membership.require(name)
        with patience.asking(name.index):
            yield name

    async def _abort(self, context: Any, error: Exception) -> NoReturn:
        """End a call with what is wrong, in gRPC's terms; a fault of the server's own is told in its log alone."""
        code, detail = _code_of(error), str(error)
        if code is grpc.StatusCode.UNAVAILABLE:
            said = str(error) if isinstance(error, PropolisError) else repr(error)
            self._complaints.say(f"cannot answer a device: {said}")
            detail = "the server cannot answer at the moment"
        elif code in _TO_BE_SEEN:
            self._complaints.say(f"refused a device: {error}")
        await context.abort(code, detail)
        raise error  # which abort never lets happen


_TO_BE_SEEN = frozenset({grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.FAILED_PRECONDITION})


def _code_of(error: Exception) -> grpc.StatusCode:
    if isinstance(error, BusyError):
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    if isinstance(error, NotOnOfferError):
        return grpc.StatusCode.NOT_FOUND
    if isinstance(error, TimeoutError):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    if isinstance(error, RefusedError) and error.refusal is not Refusal.ROSTER:  # which is to be mended here, not there
        if error.refusal is Refusal.PACKAGE:
            return grpc.StatusCode.FAILED_PRECONDITION
        is_theirs = isinstance(error, TrustError)
        return grpc.StatusCode.PERMISSION_DENIED if is_theirs else grpc.StatusCode.INVALID_ARGUMENT
    return grpc.StatusCode.UNAVAILABLE
