"""What masks under encryption cost: a device that has some neighbours, and a server that takes as many masks away."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median

import numpy as np

from propolis.secure.he.parameters import choose
from propolis.secure.he.stream import Declared, encrypt_vector, open_vector
from propolis.secure.prg import Mask
from propolis.simulations.bench.he_sides import Integers, Key
from propolis.simulations.bench.link_parts import Figure

# Its own one, and one for each of nine neighbours.
MASKS = 10
_MILLION = 1e6
_BITS, _CLIENTS = 16, 1000


def masks_of(device: int, count: int, sign: int = 1) -> list[Mask]:
    """Some masks of a device, to add or to take away."""
    return [Mask(bytes((place,)) + device.to_bytes(31, "big"), sign) for place in range(count)]


def masking(parameters: int, turns: int) -> list[Figure]:
    """The time of an upload with masks and without, in turns, and of taking the masks of one upload away.

    Args:
        parameters: of a vector.
        turns: of each, of which the first is not timed.
    """
    return [figure for seeded in (False, True) for figure in _of_mode(parameters, turns, seeded)]


def _of_mode(parameters: int, turns: int, seeded: bool) -> list[Figure]:
    key = Key(choose(_CLIENTS, _BITS, seeded=seeded), parameters)
    values = np.random.default_rng(0).integers(-(2 ** (_BITS - 1)), 2 ** (_BITS - 1), parameters)
    seconds: dict[str, list[float]] = {"without": [], "under": [], "away": []}
    is_exact = True
    for turn in range(turns):
        seconds["without"].append(_encrypting(key, values, turn, ())[1])
        upload, taken = _encrypting(key, values, turn, masks_of(turn, MASKS))
        seconds["under"].append(taken)
        totals = key.totals()
        totals.add(upload)
        began = time.perf_counter()
        sums = list(totals.without(masks_of(turn, MASKS, -1)))
        seconds["away"].append(time.perf_counter() - began)
        opened = open_vector(sums, key.decryptor(), key.tags, Declared([turn], 1, parameters))
        is_exact &= bool((opened == values).all())
    name = "seeded" if seeded else "public-key"
    without, under, away = (median(each[1:]) * _MILLION / parameters for each in seconds.values())
    ratio = median(masked / plain for masked, plain in zip(seconds["under"][1:], seconds["without"][1:], strict=True))
    return [
        Figure(f"{name}: encrypt without masks", without, "s"),
        Figure(f"{name}: encrypt under {MASKS} masks", under, "s"),
        Figure(f"{name}: masks beside none", ratio, "x"),
        Figure(f"{name}: server takes {MASKS} masks from the sum", away, "s"),
        Figure(f"{name}: what is opened then is off by", 0 if is_exact else 1, "", 0),
    ]


def _encrypting(key: Key, values: Integers, device: int, masks: Sequence[Mask]) -> tuple[list[bytes], float]:
    encryptor = key.encryptor()
    began = time.perf_counter()
    return list(encrypt_vector(values, encryptor, key.tags, device, masks)), time.perf_counter() - began
