"""``propolis bench he``: our homomorphic encryption beside CKKS as it is usual, its noise, and the server's memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, TypeVar

import numpy as np

from propolis.secure.he.parameters import choose
from propolis.secure.he.stream import Declared, encrypt_vector, open_vector
from propolis.simulations.bench.he_masks import masking, masks_of
from propolis.simulations.bench.he_memory import streamed
from propolis.simulations.bench.he_sides import Bfv, Ckks, Key, Reals, Side
from propolis.simulations.bench.link import Part
from propolis.simulations.bench.link_parts import Figure

PACKAGES = ("tenseal", "zstandard", "numpy", "propolis")
# Most devices, bits of a value, whether seeded; most bytes that a parameter may cost on its way up.
OURS = ((1000, 16, False, 12.0), (1000, 16, True, 6.5), (32, 8, False, 6.0), (32, 8, True, 3.5))
_MOST_CLIENTS = 32  # that all of them have room for
_MILLION, _MB = 1e6, 1e6

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is done for a figure.

    Attributes:
        parameters: of a vector; a multiple of 16,384 fills all ciphertexts.
        turns: of each side, of which the first is not timed; each adds one device's upload, 32 at most.
        clients: whose noise is looked at.
        model: parameters of the model whose sums are looked at in memory.
        devices: that send it.
    """

    parameters: int = 196_608
    turns: int = 32
    clients: tuple[int, ...] = (2, 10, 100, 1000)
    model: int = 10_000_000
    devices: int = 10


@dataclass(slots=True)
class Taken:
    """What a side took, turn by turn: seconds, bytes, and how far it was off."""

    encrypt: list[float] = field(default_factory=list)
    add: list[float] = field(default_factory=list)
    write: list[float] = field(default_factory=list)
    open: list[float] = field(default_factory=list)
    up: int = 0
    down: int = 0
    steps: float = 0.0
    error: float = 0.0


def parts(effort: Effort) -> Mapping[str, tuple[str, Part]]:
    """What is measured, as `propolis.simulations.bench.link.run_benchmark` takes it."""
    return {
        "costs": (f"{effort.parameters:,} parameters at a time, per million", partial(costs, effort)),
        "masks": (
            f"16 bits, n <= 1,000, under the masks of secure aggregation, {effort.parameters:,} parameters at a time, "
            "per million",
            partial(masking, effort.parameters, max(3, effort.turns // 4)),
        ),
        "noise": ("bits of noise budget left, all values extreme, under masks", partial(noise, effort)),
        "memory": (
            f"{effort.model:,} parameters from each of {effort.devices} devices through one server process",
            partial(memory, effort),
        ),
    }


def costs(effort: Effort) -> list[Figure]:
    """Bytes, times and errors of all sides."""
    ours = {Bfv(clients, bits, seeded, effort.parameters): most for clients, bits, seeded, most in OURS}
    usual = Ckks()
    taken = in_turns([*ours, usual], effort.parameters, effort.turns)
    figures = [figure for side, most in ours.items() for figure in _of_ours(side, taken, most, effort.parameters)]
    return [*figures, *_of_any(usual.name, taken[usual.name], effort.parameters)]


def in_turns(sides: list[Any], parameters: int, turns: int) -> dict[str, Taken]:
    """Let each side send, add and open, in turns of short blocks, so that what else the machine does hits all of them.

    Args:
        sides: each a `Side`.
        parameters: of a vector.
        turns: of each.
    """
    turns = min(turns, _MOST_CLIENTS)
    taken = {side.name: Taken() for side in sides}
    drawn, reals = np.random.default_rng(0), np.zeros(parameters)
    integers = {side.name: np.zeros(parameters, np.int64) for side in sides if isinstance(side, Bfv)}
    for turn in range(turns):
        values = drawn.uniform(-1, 1, parameters)
        reals += values
        for side in sides:
            opened = _turn(side, values, taken[side.name], is_timed=turn > 0)
            one = taken[side.name]
            one.error = max(one.error, float(np.abs(opened - reals / (turn + 1)).max()))
            if isinstance(side, Bfv):
                integers[side.name] += side.rounded(values)
                off = np.rint(opened * side.levels * (turn + 1)) - integers[side.name]
                one.steps = max(one.steps, float(np.abs(off).max()))
    return taken


def _turn(side: Side, values: Reals, taken: Taken, is_timed: bool) -> Reals:
    upload, encrypt = _timed(partial(side.encrypt, values))
    _, add = _timed(partial(side.add, upload))
    sums, write = _timed(side.write)
    opened, seconds = _timed(partial(side.open, sums, len(values)))
    taken.up, taken.down = sum(map(len, upload)), sum(map(len, sums))
    if is_timed:
        taken.encrypt.append(encrypt)
        taken.add.append(add)
        taken.write.append(write)
        taken.open.append(seconds)
    return opened


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    result = call()
    return result, time.perf_counter() - began


def _of_ours(side: Bfv, taken: Mapping[str, Taken], most: float, parameters: int) -> list[Figure]:
    own, usual = taken[side.name], taken[Ckks.name]
    ratio = median(ours / theirs for ours, theirs in zip(own.add, usual.add, strict=True))
    return [
        *_of_any(side.name, own, parameters, most),
        Figure(f"{side.name}: adding beside CKKS", ratio, "x", 1.0),
        Figure(f"{side.name}: error of a sum, in steps", own.steps, "", 0),
    ]


def _of_any(name: str, taken: Taken, parameters: int, most: float | None = None) -> list[Figure]:
    def per_million(seconds: list[float]) -> float:
        return median(seconds) * _MILLION / parameters

    return [
        Figure(f"{name}: up", taken.up / parameters, "B", most),
        Figure(f"{name}: down", taken.down / parameters, "B"),
        Figure(f"{name}: encrypt", per_million(taken.encrypt), "s"),
        Figure(f"{name}: server reads and adds", per_million(taken.add), "s"),
        Figure(f"{name}: server writes the sum", per_million(taken.write), "s"),
        Figure(f"{name}: open", per_million(taken.open), "s"),
        Figure(f"{name}: error of a mean in [-1, 1]", taken.error, ""),
    ]


def noise(effort: Effort) -> list[Figure]:
    """What is left of the noise budget of a sum over all clients, all of whose values are alike and extreme."""
    return [
        figure for clients in effort.clients for seeded in (False, True) for figure in _noise_of(clients, 16, seeded)
    ]


def _noise_of(clients: int, value_bits: int, seeded: bool) -> list[Figure]:
    parameters = choose(clients, value_bits, seeded=seeded)
    key, half = Key(parameters, parameters.values), 1 << value_bits - 1
    values = np.where(np.arange(parameters.values) % 3 == 0, -half, half - 1)
    totals, encryptor, decryptor = key.totals(), key.encryptor(), key.decryptor()
    for device in range(clients):
        totals.add(encrypt_vector(values, encryptor, key.tags, device, masks_of(device, 1)))
    (total,) = totals.without([mask for device in range(clients) for mask in masks_of(device, 1, -1)])
    opened = open_vector([total], decryptor, key.tags, Declared(range(clients), clients, len(values)))
    name = f"n = {clients:,}, {'seeded' if seeded else 'public-key'}"
    budget = decryptor.noise_budget(total[: key.scheme.ciphertext_bytes])
    return [
        Figure(f"{name}: budget in bits", budget, "", 1, at_least=True),
        Figure(f"{name}: error of the sum, in steps", float(np.abs(opened - clients * values).max()), "", 0),
    ]


def memory(effort: Effort) -> list[Figure]:
    """Peak memory of a server process that adds up the uploads of a large model, and whether the sum is exact."""
    seen = streamed(effort.model, effort.devices)
    return [
        Figure("server's peak memory", seen.peak / _MB, "MB", 2000),
        Figure("an upload", seen.upload / _MB, "MB"),
        Figure("reading and adding an upload", seen.add_s, "s"),
        Figure("error of the sum, in steps", seen.steps, "", 0),
    ]
