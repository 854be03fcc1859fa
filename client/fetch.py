"""The device's end of the service Delivery: what is on offer, and a package that goes on where it was cut."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Protocol, TypeVar

import grpc
import grpc.aio

from propolis.link.delivery import (
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
from propolis.link.frames import LARGEST_FRAME
from propolis.link.rate import Rate
from propolis.protos import identity_pb2
from propolis.protos import model_pb2 as pb
from propolis.secure.errors import PeerError, PropolisError, Refusal
from propolis.secure.identity import Signed
from propolis.secure.wire import decode, encode

T = TypeVar("T")

_ANSWER_S = 30.0
# Of one piece; the server may let many devices share little bandwidth.
_PIECE_S = 300.0
_TRIES, _FIRST_PAUSE_S, _LONGEST_PAUSE_S = 8, 0.5, 30.0
_LARGEST_ROSTER, _ROSTER_S = 2**26, 600.0
_FINAL = frozenset(
    {
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
_log = logging.getLogger("propolis.client")


class NotDeliveredError(PropolisError):
    """The server did not give what was asked; `is_final` where asking again soon does not help."""

    def __init__(self, detail: str, is_final: bool) -> None:
        super().__init__(detail)
        self.is_final = is_final


class NotServedError(NotDeliveredError):
    """The server has no such service."""


class Arriving(Protocol):
    """Takes the chunks of a package."""

    @property
    def next(self) -> int:
        """Number of the first chunk that is missing."""

    @property
    def is_whole(self) -> bool:
        """Whether all chunks are there."""

    def add(self, chunk: bytes) -> None:
        """Take the next chunk; raises TrustError when it is not the one that was released, or StorageError."""


class Fetcher:
    """Asks one server; what it answers is bytes until our own code has looked at them.

    Args:
        channel: to it, with this device's certificate.
        rate: bounds how fast packages come.
    """

    def __init__(self, channel: grpc.aio.Channel, rate: Rate) -> None:
        self._channel, self._rate = channel, rate

    async def look(self, installed: Sequence[Release], begun: Sequence[Release] = ()) -> LookReply:
        """What is on offer for this device; raises NotDeliveredError, or PeerError when the answer is malformed."""
        return await self._ask("Look", LookRequest(tuple(installed), tuple(begun)), LookReply)

    async def announce(self, announcement: Signed) -> None:
        """Announce the device's hybrid key; raises as `look` does."""
        await self._ask("Announce", AnnounceRequest(announcement), AnnounceReply)

    async def open(self, release: Release) -> OpenReply:
        """The header of a package and the key to it; raises as `look` does."""
        return await self._ask("Open", OpenRequest(release), OpenReply)

    async def report(self, release: Release, outcome: Outcome, reason: str = "") -> None:
        """Say how far a release got; raises as `look` does."""
        await self._ask("Report", ReportRequest(release, int(outcome), reason), ReportReply)

    async def roster(self) -> Signed:
        """The server's newest roster, which nobody has checked; raises as `look` does."""
        try:
            return decode(
                Signed, await asyncio.wait_for(self._roster(), _ROSTER_S), identity_pb2.Signed, _LARGEST_ROSTER
            )
        except TimeoutError:
            raise NotDeliveredError(f"the roster did not come within {_ROSTER_S:g} s", is_final=False) from None

    async def he_key(self, have: bytes = b"") -> bytes:
        """This device's `KeyBundle`, which nobody has checked; raises as `look` does.

        Args:
            have: id of the key that it has.

        Returns:
            Nothing, where the server has no other one.
        """
        return (await self._ask("HeKey", HeKeyRequest(have), HeKeyReply)).bundle

    async def fetch(self, release: Release, incoming: Arriving) -> None:
        """The chunks of a package that are missing; again and again, for as long as some come.

        Args:
            release: which one.
            incoming: takes them.

        Raises:
            NotDeliveredError: the server refuses, or nothing more came in several attempts.
            PeerError, TrustError: a piece is malformed, or not what was released.
            StorageError: it could not be written.
        """
        tries = 0
        while not incoming.is_whole:
            before = incoming.next
            try:
                await self._fetch_on(release, incoming)
            except NotDeliveredError as error:
                tries = 0 if incoming.next > before else tries + 1
                if error.is_final or tries >= _TRIES:
                    raise
                await _pause(tries, error)

    async def _fetch_on(self, release: Release, incoming: Arriving) -> None:
        async with aclosing(self._pieces("Fetch", FetchRequest(release, incoming.next))) as pieces:
            async for piece in pieces:
                if incoming.is_whole:
                    raise PeerError(Refusal.PACKAGE, f"{release} is longer than its header says")
                await asyncio.to_thread(incoming.add, piece)
                await self._rate.take(len(piece))
        if not incoming.is_whole:
            raise NotDeliveredError(f"{release} was cut after {incoming.next} chunks", is_final=False)

    async def _roster(self) -> bytes:
        data = bytearray()
        async with aclosing(self._pieces("FetchRoster", RosterRequest())) as pieces:
            async for piece in pieces:
                data += piece
                if len(data) > _LARGEST_ROSTER:
                    raise PeerError(Refusal.MALFORMED, f"the server's roster has more than {_LARGEST_ROSTER} bytes")
        return bytes(data)

    async def _ask(self, method: str, asked: object, reply: type[T]) -> T:
        call = self._channel.unary_unary(f"/{SERVICE}/{method}")
        try:
            answer = await call(encode(asked, getattr(pb, type(asked).__name__)), timeout=_ANSWER_S)
        except grpc.aio.AioRpcError as error:
            raise _not_delivered(error) from None
        return decode(reply, answer, getattr(pb, reply.__name__), LARGEST_FRAME)

    async def _pieces(self, method: str, asked: object) -> AsyncGenerator[bytes, None]:
        call = self._channel.unary_stream(f"/{SERVICE}/{method}")(encode(asked, getattr(pb, type(asked).__name__)))
        try:
            while (data := await asyncio.wait_for(call.read(), _PIECE_S)) is not grpc.aio.EOF:
                yield decode(Piece, data, pb.Piece, LARGEST_FRAME).data
            if await call.code() is not grpc.StatusCode.OK:
                raise NotDeliveredError(await call.details(), await call.code() in _FINAL)
        except grpc.aio.AioRpcError as error:
            raise _not_delivered(error) from None
        except (TimeoutError, asyncio.InvalidStateError):
            raise NotDeliveredError("the server sent nothing for too long", is_final=False) from None
        finally:
            call.cancel()


def _not_delivered(error: grpc.aio.AioRpcError) -> NotDeliveredError:
    detail = error.details() or error.code().name
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return NotServedError("this server delivers nothing of that kind", is_final=True)
    return NotDeliveredError(detail, error.code() in _FINAL)


async def _pause(tries: int, error: NotDeliveredError) -> None:
    seconds = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**tries) * random.uniform(0.5, 1.0)  # noqa: S311
    _log.info("fetching goes on in %.1f s: %s", seconds, error)
    await asyncio.sleep(seconds)
