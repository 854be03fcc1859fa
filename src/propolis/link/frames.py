"""The frames of a device's stream as frozen dataclasses, and their bytes: what a peer sends raises only our errors."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from propolis.protos import link_pb2 as pb
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.wire import between, fill, many, parse, read, sized, version_field

LARGEST_FRAME = 2**20
# So that a heartbeat waits behind little on a slow link, and a frame with everything around it stays below its limit.
CHUNK_BYTES = 256 * 1024
LARGEST_HEADER = 2**20
ID_BYTES = PROCESS_BYTES = 16
_LARGEST_SIZE = 2**50
_MOST_PARTS, _MOST_AT_ONCE = 8192, 4096
_LONGEST_CONFIG, _LONGEST_DETAIL = 2**16, 500
_LONGEST_BEAT_S = 3600
_LONGEST_SPREAD_MS = 60_000


class Reason(IntEnum):
    """Why a stream ends: the proto's `Farewell.Reason`."""

    UNSPECIFIED = 0
    RUN_OVER = 1
    SHUTDOWN = 2
    REPLACED = 3
    IDENTITY = 4
    CLOCK = 5
    PROTOCOL = 6
    TOO_LARGE = 7
    SILENT = 8
    VERSION = 9
    UNSURE = 10


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of a message has arrived; `whole` also says that no more of it is wanted."""

    id: bytes = sized(ID_BYTES)
    size: int = between(0, _LARGEST_SIZE)
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Hello:
    """The device's first frame; `server` is the server process that `have` is about."""

    process: bytes = sized(PROCESS_BYTES)
    node_id: int = between(2, 2**63 - 1)
    clock: int = between(0, 2**62)
    server: bytes = sized(0, PROCESS_BYTES)
    have: tuple[Progress, ...] = many(_MOST_AT_ONCE)
    version: int = between(0, 2**31)


@dataclass(frozen=True, slots=True)
class Welcome:
    """The server's first frame."""

    process: bytes = sized(PROCESS_BYTES)
    beat_seconds: int = between(1, _LONGEST_BEAT_S)
    largest_message: int = between(1, _LARGEST_SIZE)
    run_id: int = between(0, 2**63 - 1)
    run_config: bytes = sized(0, _LONGEST_CONFIG)
    have: tuple[Progress, ...] = many(_MOST_AT_ONCE)
    version: int = version_field()


@dataclass(frozen=True, slots=True)
class Begin:
    """A message starts, or goes on at `offset`."""

    id: bytes = sized(ID_BYTES)
    header: int = between(1, LARGEST_HEADER)
    parts: tuple[int, ...] = between(0, _LARGEST_SIZE, count=_MOST_PARTS)
    offset: int = between(0, _LARGEST_SIZE)
    data: bytes = sized(0, LARGEST_FRAME)

    @property
    def total(self) -> int:
        """Bytes of the whole message."""
        return self.header + sum(self.parts)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next bytes of the message that began last."""

    data: bytes = sized(1, LARGEST_FRAME)


@dataclass(frozen=True, slots=True)
class Received:
    """The reply to this request has arrived whole."""

    id: bytes = sized(ID_BYTES)


@dataclass(frozen=True, slots=True)
class Beat:
    """I am here."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for the reply to this request any more."""

    id: bytes = sized(ID_BYTES)


@dataclass(frozen=True, slots=True)
class Free:
    """The device, which was told `Cancel`, no longer works on it."""

    id: bytes = sized(ID_BYTES)


@dataclass(frozen=True, slots=True)
class News:
    """There is something new to ask the service Delivery about, within this time, at random."""

    spread_ms: int = between(0, _LONGEST_SPREAD_MS)


@dataclass(frozen=True, slots=True)
class Farewell:
    """The last frame of a stream: why it ends."""

    reason: int = between(0, 2**31 - 1)  # a later version may know more of them
    detail: str = sized(0, _LONGEST_DETAIL)

    @property
    def name(self) -> str:
        """The reason in a word."""
        return Reason(self.reason).name if self.reason in set(Reason) else f"reason {self.reason}"


Frame = Hello | Welcome | Begin | Chunk | Received | Beat | Cancel | Free | Farewell | News

_KINDS: dict[str, type[Frame]] = {
    "hello": Hello,
    "welcome": Welcome,
    "begin": Begin,
    "chunk": Chunk,
    "received": Received,
    "beat": Beat,
    "cancel": Cancel,
    "free": Free,
    "farewell": Farewell,
    "news": News,
}
_FIELDS = {cls: name for name, cls in _KINDS.items()}


def farewell(reason: Reason, detail: str) -> Farewell:
    """A farewell whose detail fits."""
    return Farewell(int(reason), detail[:_LONGEST_DETAIL])


def encode_frame(frame: Frame) -> bytes:
    """The frame's bytes, at most `LARGEST_FRAME`."""
    message = pb.Frame()
    inner = getattr(message, _FIELDS[type(frame)])
    inner.SetInParent()
    fill(frame, inner)
    data: bytes = message.SerializeToString()
    return data


def decode_frame(data: bytes) -> Frame:
    """A frame from a peer's bytes.

    Raises:
        PeerError: too long, no frame, of a kind that this version does not know, or a field out of its bounds.
    """
    message = parse(pb.Frame, data, LARGEST_FRAME)
    kind = message.WhichOneof("kind")
    if kind is None:
        raise PeerError(Refusal.MALFORMED, f"a frame of {len(data)} bytes that is none of this version's")
    return read(_KINDS[kind], getattr(message, kind))
