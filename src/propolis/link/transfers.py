"""Messages on their way over a stream that may be cut: each end knows how far it is, and goes on from there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from propolis.link.frames import CHUNK_BYTES, Begin, Chunk, Progress
from propolis.link.spool import Spool, Spools
from propolis.secure.errors import PeerError, Refusal


@dataclass(frozen=True, slots=True, repr=False)
class Body:
    """A message's bytes in the order in which they travel: its header, then its arrays as they are.

    Attributes:
        header: the message without its arrays, see `propolis.flower.parted`.
        parts: the arrays' bytes; several messages may share them.
    """

    header: bytes
    parts: Sequence[bytes]

    @property
    def total(self) -> int:
        """Bytes of the whole."""
        return len(self.header) + sum(map(len, self.parts))

    def frames(self, message_id: bytes, offset: int = 0) -> Iterator[Begin | Chunk]:
        """The frames of the message from byte `offset` on."""
        pieces = self._pieces(offset)
        sizes = tuple(map(len, self.parts))
        yield Begin(message_id, len(self.header), sizes, offset, next(pieces, b""))
        for piece in pieces:
            yield Chunk(piece)

    def _pieces(self, offset: int) -> Iterator[bytes]:
        """Pieces of `CHUNK_BYTES`, the last one shorter; small parts travel together."""
        gathered: list[bytes] = []
        missing = CHUNK_BYTES
        for part in (self.header, *self.parts):
            skipped, offset = min(offset, len(part)), offset - min(offset, len(part))
            view = memoryview(part)[skipped:]
            while view:
                piece, view = view[:missing], view[missing:]
                gathered.append(bytes(piece))
                missing -= len(piece)
                if not missing:
                    yield gathered[0] if len(gathered) == 1 else b"".join(gathered)
                    gathered, missing = [], CHUNK_BYTES
        if gathered:
            yield b"".join(gathered)


class Incoming:
    """A message that arrives.

    Args:
        begin: the frame that it began with.
        limit: bytes that it may have.
        spools: where its bytes go.

    Raises:
        PeerError: it is too large, or does not begin at its start.
    """

    def __init__(self, begin: Begin, limit: int, spools: Spools) -> None:
        if begin.total > limit:
            raise PeerError(Refusal.MALFORMED, f"a message of {begin.total} bytes; at most {limit} are taken")
        if begin.offset:
            raise PeerError(Refusal.MALFORMED, f"a message that goes on at byte {begin.offset} of which nothing came")
        self._begin = begin
        self._spool: Spool = spools.open(begin.total)
        self.received = 0

    @property
    def id(self) -> bytes:
        """The message's."""
        return self._begin.id

    @property
    def total(self) -> int:
        """Bytes that it will have."""
        return self._begin.total

    @property
    def is_whole(self) -> bool:
        """Whether all of it is there."""
        return self.received == self._begin.total

    @property
    def progress(self) -> Progress:
        """What the sender has to know to go on."""
        return Progress(self.id, self.received, self.is_whole)

    def go_on(self, begin: Begin) -> None:
        """The message begins again where it was cut; raises PeerError when it is another one, or another place."""
        same = (begin.header, begin.parts) == (self._begin.header, self._begin.parts)
        if not same or begin.offset != self.received or self.is_whole:
            raise PeerError(
                Refusal.MALFORMED,
                f"a message that goes on at byte {begin.offset} of {begin.total}; "
                f"{self.received} of {self._begin.total} are here",
            )

    def append(self, data: bytes) -> None:
        """Its next bytes.

        Raises:
            PeerError: there are more than were announced.
            StorageError: the disk is full.
        """
        if self.received + len(data) > self._begin.total:
            excess = self.received + len(data) - self._begin.total
            raise PeerError(Refusal.MALFORMED, f"{excess} bytes more than were announced")
        self._spool.append(data)
        self.received += len(data)
        if self.is_whole:
            self._spool.rewind()

    def header(self) -> bytes:
        """The header of a whole message: read it first, and once."""
        return self._spool.read(self._begin.header)

    def parts(self) -> Iterator[bytes]:
        """The parts after it, each as it is asked for."""
        return (self._spool.read(size) for size in self._begin.parts)

    def close(self) -> None:
        """Forget its bytes."""
        self._spool.close()
