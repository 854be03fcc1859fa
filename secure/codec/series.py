"""The versions of a run's model and who has which: the server's end, and a device's.

A version is made by `publish`; `message_for` takes a device from the version that it has to the newest one, and
`rebuild` does that on the device. Both ends then have the same bits, or the device says that it needs the whole.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import floor, log2

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from propolis.protos import update_pb2 as pb
from propolis.secure.codec.broadcast import (
    FIRST_STEP,
    LARGEST_VALUES,
    NOT_PRUNED,
    Delta,
    Values,
    apply,
    compress,
    decompress,
    parts,
    step_towards,
    values_digest,
)
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.wire import FORMAT_VERSION, between, decode, encode, many, serialized, sized, version_field

SERIES_BYTES = 16
_DIGEST_BYTES = 32
# Steps that are kept and sent at the most: each costs a device some work.
MOST_DELTAS = 256
_LARGEST_BROADCAST = 2**31 - 1
# What is lacking may be this many times the last move before it decides the step no more.
_PILE = 4.0
_LEAST_STEP = 2.0**-100
# A model of less than this many bytes is not worth counting.
_SMALL = 4096


@dataclass(frozen=True, slots=True, repr=False)
class Broadcast:
    """What a device gets; see protos/update.proto."""

    series: bytes = sized(SERIES_BYTES)
    version: int = between(0, 2**31)
    first: int = between(0, 2**31)
    deltas: tuple[Delta, ...] = many(MOST_DELTAS)
    values: bytes = sized(0, LARGEST_VALUES)
    digest: bytes = sized(_DIGEST_BYTES)
    format: int = version_field()

    def to_bytes(self) -> bytes:
        """As it travels."""
        return encode(self, pb.Broadcast)

    @classmethod
    def from_bytes(cls, data: bytes) -> Broadcast:
        """From a peer's bytes; raises PeerError when they are none."""
        return decode(cls, data, pb.Broadcast, _LARGEST_BROADCAST)


@dataclass(frozen=True, slots=True, repr=False)
class Version:
    """A version that a device has."""

    series: bytes
    number: int
    values: Values

    def to_bytes(self) -> bytes:
        """As a device keeps it."""
        values = np.ascontiguousarray(self.values, "<f4").tobytes()
        kept = pb.Remembered(format=FORMAT_VERSION, series=self.series, version=self.number, values=values)
        return serialized(kept)

    @classmethod
    def from_bytes(cls, data: bytes) -> Version | None:
        """What `to_bytes` wrote; None where it is damaged: the device then asks for the whole."""
        try:
            kept = pb.Remembered.FromString(data)
            values = np.frombuffer(kept.values, "<f4").astype(np.float32)
        except (DecodeError, ValueError):
            return None
        return cls(kept.series, kept.version, values) if kept.format == FORMAT_VERSION else None


@dataclass(frozen=True, slots=True, repr=False)
class Pace:
    """What the next step depends on.

    Attributes:
        values: (d,) what the devices have.
        target: (d,) what they should have had.
        steps: of each array's last step.
    """

    values: Values
    target: Values
    steps: tuple[float, ...]


def rebuild(broadcast: Broadcast, had: Version | None, sizes: Sequence[int]) -> Version:
    """The newest version on a device.

    Args:
        broadcast: what came.
        had: the version that the device has kept; None when it has none.
        sizes: of the arrays, which add up to d.

    Raises:
        PeerError: malformed; or, with `Refusal.BASE`, the device needs the whole model because it has no version
            that this leads on from, or what it has is not what the server thinks.
    """
    count = sum(sizes)
    last = broadcast.first + len(broadcast.deltas) - 1
    if last != broadcast.version:
        raise PeerError(Refusal.MALFORMED, f"{len(broadcast.deltas)} steps do not lead to version {broadcast.version}")
    leads_on = (
        had is not None
        and had.series == broadcast.series
        and broadcast.first - 1 <= had.number <= broadcast.version
        and len(had.values) == count
    )
    if broadcast.values:  # also where the device has something: it may be damaged
        values, skipped = np.frombuffer(decompress(broadcast.values, 4 * count), "<f4").astype(np.float32), 0
    elif leads_on and had is not None:
        values, skipped = had.values, had.number - broadcast.first + 1
    else:
        raise PeerError(Refusal.BASE, f"this device has no version that leads to version {broadcast.version}")
    for delta in broadcast.deltas[skipped:]:
        values = apply(values, delta, sizes)
    if not np.isfinite(values).all():
        raise PeerError(Refusal.MODEL, "the model is infinite or NaN")
    if values_digest(values) != broadcast.digest:
        raise PeerError(Refusal.BASE, f"version {broadcast.version} does not come out as the server says")
    return Version(broadcast.series, broadcast.version, values)


class ModelSeries:
    """The server's end.

    Args:
        series: 16 random bytes that name it.
        coarseness: of a step, in units of the root mean square of what an array lacks.
        sizes: of the arrays, which add up to d.
        start: where to go on; None for a new model.
    """

    def __init__(self, series: bytes, coarseness: float, sizes: Sequence[int], start: Pace | None = None) -> None:
        self._series, self._coarseness, self._sizes = series, coarseness, tuple(sizes)
        self.pace = start
        self.values = np.full(sum(sizes), NOT_PRUNED) if start is None else start.values
        self._base = self.values  # version `_first` - 1
        self._first = 1
        self._deltas: deque[Delta] = deque()

    @property
    def version(self) -> int:
        """The newest one."""
        return self._first + len(self._deltas) - 1

    def publish(self, target: Values, pruned: NDArray[np.bool_] | None = None) -> Values:
        """A step towards `target`; what the devices will then have.

        Args:
            target: (d,) finite.
            pruned: (d,) where the target is zero for good; None for nowhere.
        """
        steps = self._steps(target)
        delta, self.values = step_towards(self.values, target, steps, self._sizes, pruned)
        self.pace = Pace(self.values, target, steps)
        self._deltas.append(delta)
        while len(self._deltas) > 1 and (len(self._deltas) > MOST_DELTAS or _size(self._deltas) > self._whole_size):
            self._base = apply(self._base, self._deltas.popleft(), self._sizes)
            self._first += 1
        return self.values

    def _steps(self, target: Values) -> tuple[float, ...]:
        """In proportion to what is lacking; when that piles up, to how fast the model moves, so that it goes out."""
        if self.pace is None:
            return _first_steps(target, self._sizes)
        lacking = parts(target - self.values, self._sizes)
        # No coarser than what is largest, or nothing might be sent where all lack alike.
        wanted = (min(self._coarseness * _rms(part), float(np.abs(part).max(initial=0.0))) for part in lacking)
        moves = (_rms(part) for part in parts(target - self.pace.target, self._sizes))
        # An array that stood still keeps its step.
        most = (_PILE * self._coarseness * m if m > 0 else s for m, s in zip(moves, self.pace.steps, strict=True))
        return tuple(map(min, wanted, most))

    def message_for(self, number: int | None) -> Broadcast:
        """What takes a device from version `number` (None: nothing) to the newest one."""
        digest = values_digest(self.values)
        if number is not None and self._first - 1 <= number <= self.version:
            steps = tuple(self._deltas)[number - self._first + 1 :]
            return Broadcast(self._series, self.version, number + 1, steps, b"", digest)
        base, steps = _packed(self._base), tuple(self._deltas)
        if len(base) + _size(steps) < self._whole_size:
            return Broadcast(self._series, self.version, self._first, steps, base, digest)
        return Broadcast(self._series, self.version, self.version + 1, (), _packed(self.values), digest)

    @property
    def _whole_size(self) -> int:
        """Bytes of all the values: the steps that are kept weigh no more, and no device is sent more."""
        return max(_SMALL, self.values.nbytes)


def first_version(target: Values, sizes: Sequence[int]) -> Values:
    """What a new series makes of its first target: a model that starts there loses nothing on its way."""
    nothing = np.full(len(target), NOT_PRUNED)
    return step_towards(nothing, target, _first_steps(target, sizes), sizes, None)[1]


def _first_steps(target: Values, sizes: Sequence[int]) -> tuple[float, ...]:
    """Powers of two, so that a model that was rounded to them stays as it is."""
    sized = (FIRST_STEP * _rms(part) for part in parts(target, sizes))
    return tuple(2.0 ** floor(log2(step)) if step > _LEAST_STEP else 0.0 for step in sized)


def _rms(values: Values) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if len(values) else 0.0


def _size(deltas: Iterable[Delta]) -> int:
    return sum(len(delta.symbols) + len(delta.zeros) for delta in deltas)


def _packed(values: Values) -> bytes:
    """The values compressed where that is worth it: a trained model's are not."""
    data = np.ascontiguousarray(values, "<f4").tobytes()
    return compress(data) if len(values) and np.all(values == values[0]) else b"r" + data
