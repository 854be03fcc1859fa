"""Bytes that no honest peer sends: random ones, and valid ones with something changed.

The number of cases per target is PROPOLIS_FUZZ_CASES, the seed PROPOLIS_FUZZ_SEED. The seed decides what is changed,
and where; what it is changed in has new keys in every run, so a failure prints the case and the role's state as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import pytest

CASES = int(os.environ.get("PROPOLIS_FUZZ_CASES", "600"))
SEED = int(os.environ.get("PROPOLIS_FUZZ_SEED", "0"))

_LONGEST_RANDOM = 200
_LONGEST_SPAN = 64
_LENGTH_DELIMITED = 2
# Where bounds are: around powers of two, as varints.
_NUMBERS = tuple(2**bits + step for bits in (0, 1, 7, 8, 14, 16, 20, 31, 32, 33, 62, 63, 64) for step in (-1, 0, 1))

Case = Callable[[bytes], object]


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a protobuf message: where its tag, its content and the next field start."""

    start: int
    content: int
    end: int
    nests: bool


@lru_cache(maxsize=4096)
def fields_of(data: bytes) -> tuple[Field, ...]:
    """The fields of a message, as far as the bytes are one."""
    found, at = [], 0
    try:
        while at < len(data):
            start = at
            tag, at = _read_varint(data, at)
            if tag & 7 == _LENGTH_DELIMITED:
                length, content = _read_varint(data, at)
                at = content + length
            else:
                content = at
                at = _read_varint(data, at)[1] if tag & 7 == 0 else at + 8
            if at > len(data):
                break
            found.append(Field(start, content, at, tag & 7 == _LENGTH_DELIMITED))
    except IndexError:
        pass
    return tuple(found)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while data[at] & 128:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


class Mutator:
    """Changes bytes; with one seed always in the same ways."""

    def __init__(self, seed: int | str, corpus: Sequence[bytes]) -> None:
        self._random = Random(seed)
        self._corpus = corpus

    def cases(self, count: int) -> Iterator[bytes]:
        """Random bytes now and then, changed valid ones otherwise, mostly with their framing intact."""
        for _ in range(count):
            kind, valid = self._random.random(), self._random.choice(self._corpus)
            if kind < 0.05:
                yield self._random.randbytes(self._random.randrange(_LONGEST_RANDOM))
            elif kind < 0.35:
                yield self._changed(valid)
            else:
                yield self._reframed(valid)

    def _below(self, end: int) -> int:
        """A place below `end`, quicker than `randrange`."""
        return int(self._random.random() * end)

    def _changed(self, data: bytes) -> bytes:
        """Bytes with one change, whatever they mean."""
        start = self._below(len(data) + 1)
        end = min(len(data), start + self._below(_LONGEST_SPAN))
        match self._below(7):
            case 0:
                return data[:start]
            case 1:
                return data[:end] + data[start:end] * (1 + self._below(3)) + data[end:]
            case 2:
                return data[:start] + self._random.randbytes(self._below(_LONGEST_SPAN)) + data[start:]
            case 3:
                return data[:start] + data[end:]
            case 4:
                return data[:start] + varint(self._random.choice(_NUMBERS)) + data[start:]
            case _:
                return self._with_flips(data)

    def _with_flips(self, data: bytes) -> bytes:
        flipped = bytearray(data)
        for _ in range(1 + self._below(3) if data else 0):
            bit = self._below(8 * len(data))
            flipped[bit // 8] ^= 1 << bit % 8
        return bytes(flipped)

    def _reframed(self, data: bytes, depth: int = 0) -> bytes:
        """A message with one of its fields, at any depth, changed, left out, repeated or moved."""
        fields = fields_of(data)
        if not fields:
            return self._changed(data)
        field = fields[self._below(len(fields))]
        tag, content = data[field.start : field.content], data[field.content : field.end]
        before, after = data[: field.start], data[field.end :]
        choice = self._random.random()
        if field.nests and choice < 0.75:
            content = self._reframed(content, depth + 1) if choice < 0.55 and depth < 8 else self._changed(content)
            return before + tag[:1] + varint(len(content)) + content + after
        match self._below(5):
            case 0:
                return before + after
            case 1:
                return before + (tag + content) * (2 + self._below(3)) + after
            case 2:
                return before + after + tag + content
            case 3:
                return before + bytes([self._below(256)]) + tag[1:] + content + after
            case _:
                number = varint(self._random.choice(_NUMBERS))
                return before + tag[:1] + number + (content if field.nests else b"") + after


def fuzz(
    name: str,
    corpus: Sequence[bytes],
    take: Case,
    allowed: type[Exception],
    stored: Callable[[], bytes] = bytes,
) -> int:
    """Feed mutations of a corpus to `take`, which may raise `allowed` and nothing else.

    Args:
        name: of the target.
        corpus: valid bytes.
        take: the target.
        allowed: what it may raise.
        stored: state of the target, to print when it fails.

    Returns:
        How many were taken without an error.
    """
    taken = 0
    for place, case in enumerate(Mutator(f"{name} {SEED}", corpus).cases(CASES)):
        try:
            take(case)
        except allowed:
            continue
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            pytest.fail(f"{name}, seed {SEED}, case {place}: {reason}\ncase {case.hex()}\nstate {stored().hex()}")
        taken += 1
    return taken
