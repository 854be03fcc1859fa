"""What encoding and decoding cost in processor time, and the model's next step; run as a module, it prints JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, TypeVar

import numpy as np

from propolis.secure.codec.broadcast import apply, step_towards
from propolis.secure.codec.encoding import LARGEST_NORM, SEED_BYTES, Encoding, Shapes
from propolis.secure.codec.pipeline import Pipeline
from propolis.secure.codec.profiles import PROFILES, Profile
from propolis.secure.codec.scale import Scale, scaled
from propolis.secure.ring import Vector
from propolis.simulations.bench.process import time_module

T = TypeVar("T")

_REPEATS = 7
_DEVIATION = 0.01
# Between two devices' updates, as much as trainings show.
_CORRELATION = 0.1
_ROWS = 1000


def measure_speed(dimension: int, devices: int) -> dict[str, Any]:
    """The costs by codec, in milliseconds per million parameters, from a process of its own."""
    timing = time_module("propolis.simulations.bench.codec_speed", (str(dimension), str(devices)))
    measured: dict[str, Any] = json.loads(timing.output)
    return measured


def encoding_of(profile: Profile, shapes: Shapes) -> Encoding:
    """A round's encoding with all the arrays on the grid, which is still to be chosen."""
    return Encoding(
        rotated=profile.rotated,
        pruned=False,
        width=profile.width,
        step=1.0,
        levels=1,
        clip=LARGEST_NORM,
        density=profile.density,
        keep=profile.keep,
        seed=bytes(SEED_BYTES),
        max_weight=1.0,
        weight_key="num-examples",
        quantized=tuple(sorted(shapes)),
        exact=(),
    )


def codec_cost(codec: str, dimension: int, devices: int) -> dict[str, float]:
    """Medians for a model of one matrix, in milliseconds per million parameters and client.

    Returns:
        On the client: `support` (which coordinates travel), `encode` and `pack`. On the server, per client: `unpack`
        (and add), and its share of `decode`. And `total`, the sum of the medians.
    """
    profile, shapes = PROFILES[codec], {"matrix": (-(-dimension // _ROWS), _ROWS)}
    size = shapes["matrix"][0] * _ROWS
    change = (np.random.default_rng(0).standard_normal(size) * _DEVIATION).astype(np.float32)
    scale = Scale(1.0, _DEVIATION * size**0.5, _DEVIATION / profile.density**0.5, _CORRELATION)
    encoding = scaled(encoding_of(profile, shapes), profile, scale, devices, shapes)
    rounds = [_one(encoding, devices, shapes, change.copy(), i % devices) for i in range(_REPEATS)]
    costs = {name: median(each[name] for each in rounds) * 1e3 / (size / 1e6) for name in rounds[0]}
    costs["decode"] /= devices
    return {**costs, "total": sum(costs.values())}


def step_cost(coarseness: float, dimension: int) -> dict[str, float]:
    """Medians of the model's next version and of its way to a device, in milliseconds per million parameters."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(dimension).astype(np.float32)
    target = values + rng.standard_normal(dimension).astype(np.float32) * np.float32(_DEVIATION)
    pace = (coarseness * _DEVIATION,)
    steps, applied = [], []
    for _ in range(_REPEATS):
        (delta, _), seconds = _timed(lambda: step_towards(values, target, pace, (dimension,), None))
        steps.append(seconds)
        applied.append(_timed(lambda delta=delta: apply(values, delta, (dimension,)))[1])  # type: ignore[misc]
    unit = 1e3 / (dimension / 1e6)
    return {"step": median(steps) * unit, "apply": median(applied) * unit, "bytes": len(delta.symbols) / dimension}


def _one(encoding: Encoding, devices: int, shapes: Shapes, change: Any, place: int) -> dict[str, float]:
    """Processor seconds of one device's stages, and of the server's."""
    ring, rng = encoding.grid.ring, np.random.default_rng(place)
    pipeline, support = _timed(lambda: Pipeline(encoding, devices, shapes, {}))
    encoded, encode = _timed(lambda: pipeline.encode(change, place, rng))
    packed, pack = _timed(lambda: ring.pack(encoded.vector))
    total = ring.zeros(pipeline.size)
    _, unpack = _timed(lambda: _fold(total, ring.unpack(packed, pipeline.size)))
    _, decode = _timed(lambda: pipeline.decode_sum(ring.reduce(total)))
    return {"support": support, "encode": encode, "pack": pack, "unpack": unpack, "decode": decode}


def _fold(total: Vector, vector: Vector) -> None:
    np.add(total, vector, out=total)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    began = time.process_time()  # of all threads, so as one core would have needed; others on the machine do not count
    done = work()
    return done, time.process_time() - began


def _measure(dimension: int, devices: int) -> Mapping[str, Any]:
    costs = {codec: codec_cost(codec, dimension, devices) for codec in ("dense", "thin")}
    steps = {codec: step_cost(PROFILES[codec].broadcast, dimension) for codec in ("dense", "thin")}
    return {"dimension": dimension, "devices": devices, "codec": costs, "broadcast": steps}


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]), int(sys.argv[2]))))
