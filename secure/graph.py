"""Who shares masks with whom: the neighbour graph of Bell et al. (CCS 2020), and how many shares a secret needs.

Every device computes the graph by itself from what all of them know, so the server cannot choose it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log, log2

import numpy as np
from numpy.typing import NDArray

from propolis.secure import labels
from propolis.secure.errors import UsageError

# Up to this many devices everybody is everybody's neighbour.
LARGEST_COMPLETE = 64
# Beyond this many neighbours a sparse graph saves nothing worth having.
_LARGEST_SPARSE = 1000

# The chance of a bad graph is at most 2^-SECURITY_BITS, that of a round lost to drop-outs within the assumed
# fraction at most 2^-CORRECTNESS_BITS (sigma and eta of Bell et al.).
SECURITY_BITS, CORRECTNESS_BITS = 40, 30


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a device's secrets are shared.

    Attributes:
        degree: k, the neighbours of each device.
        threshold: t, the shares out of k that give a secret.
    """

    degree: int
    threshold: int


@lru_cache(maxsize=256)
def sharing(devices: int, corrupted: float, dropped: float, malicious: bool = False) -> Sharing:
    """Degree and threshold for a cohort.

    The complete graph, with t = floor(2k/3) + 1, up to 64 devices and always against a malicious server. Above, the
    smallest even k for which some t keeps three promises (Bell et al., section 3 and appendix): no device has t
    corrupted neighbours; every device keeps t neighbours that stay; the ring of neighbours stays connected
    without the corrupted and the dropped. Of the thresholds that do, the largest. Where no k up to a thousand does,
    the complete graph.

    Args:
        devices: n, at least 2.
        corrupted: assumed share of the devices that collude with the server, in [0, 1).
        dropped: assumed share that drops out at any exchange, in [0, 1).
        malicious: protect against a server that shows devices different views.

    Raises:
        UsageError: fewer than two devices, a share outside of [0, 1), or so many corrupted that no graph helps.
    """
    if devices < 2 or not (0 <= corrupted < 1 and 0 <= dropped < 1):
        raise UsageError(f"need at least 2 devices and shares in [0, 1), got {devices}, {corrupted}, {dropped}")
    if not malicious and devices > LARGEST_COMPLETE:
        bad, gone = ceil(corrupted * devices), ceil(dropped * devices)
        for degree in range(2, min(devices - 1, _LARGEST_SPARSE + 1), 2):
            # Sampling without replacement: a run of k/2 lost devices on the ring is what can cut it.
            if log2(devices) + degree / 2 * log2(max((bad + gone) / devices, 2**-SECURITY_BITS)) > -SECURITY_BITS:
                continue
            if (threshold := _largest_safe(devices, bad, gone, degree)) is not None:
                return Sharing(degree, threshold)
    return _complete(devices, int(corrupted * devices), malicious)


def _complete(devices: int, bad: int, malicious: bool) -> Sharing:
    """Everybody is everybody's neighbour; of two devices none can be corrupted, so shares are rounded down here."""
    degree = devices - 1
    threshold = 2 * degree // 3 + 1
    # A server that lies needs t of the k - c honest neighbours on each side of a lie, with its c on both.
    if threshold <= bad or (malicious and 2 * threshold <= degree + bad):
        raise UsageError(f"{bad} corrupted of {devices} devices are more than any neighbour graph stands")
    return Sharing(degree, threshold)


class NeighbourGraph:
    """The graph of one round.

    A ring in an order that the seed decides; each device's neighbours are the k/2 before and after it. With
    k = n - 1 everybody is a neighbour of everybody.

    Args:
        cohort: the devices, n of them.
        degree: k.
        seed: binds the order to the round and the cohort.
    """

    def __init__(self, cohort: Iterable[int], degree: int, seed: bytes) -> None:
        self._degree = degree
        self._order = sorted(cohort, key=lambda index: labels.digest(labels.GRAPH, seed, index.to_bytes(8, "big")))
        self._place = {index: place for place, index in enumerate(self._order)}
        self._neighbours: dict[int, tuple[int, ...]] = {}

    def neighbours(self, index: int) -> tuple[int, ...]:
        """The neighbours of a device, in rising order."""
        if index not in self._neighbours:
            self._neighbours[index] = self._around(index)
        return self._neighbours[index]

    def _around(self, index: int) -> tuple[int, ...]:
        count, place = len(self._order), self._place[index]
        if self._degree >= count - 1:
            return tuple(sorted(other for other in self._order if other != index))
        steps = range(1, self._degree // 2 + 1)
        return tuple(sorted(self._order[(place + way * step) % count] for step in steps for way in (-1, 1)))


def _largest_safe(devices: int, bad: int, gone: int, degree: int) -> int | None:
    """The largest t out of k such that nobody has t corrupted neighbours, or fewer than t that stay.

    Both but for probabilities of 2^-sigma and 2^-eta, by a union bound over the devices.
    """
    corrupted = log2(devices) + _log2_tails(devices - 1, bad, degree)
    lost = log2(devices) + _log2_tails(devices - 1, gone, degree)
    for threshold in range(degree, degree // 2, -1):
        if lost[degree - threshold + 1] <= -CORRECTNESS_BITS:
            return threshold if corrupted[threshold] <= -SECURITY_BITS else None
    return None


def _log2_tails(population: int, marked: int, drawn: int) -> NDArray[np.float64]:
    """log2 P[X >= x] for x = 0..drawn + 1 and hypergeometric X: `drawn` of `population`, of which `marked` count."""
    hits = np.arange(max(0, drawn - (population - marked)), min(drawn, marked) + 1)
    ways = _log_choose(marked, hits) + _log_choose(population - marked, drawn - hits)
    masses = np.full(drawn + 2, -np.inf)
    masses[hits] = (ways - _log_choose(population, np.array(drawn))) / log(2)
    return np.logaddexp2.accumulate(masses[::-1])[::-1]


def _log_choose(n: int, k: NDArray[np.int64]) -> NDArray[np.float64]:
    logs = _log_factorials(n)
    chosen: NDArray[np.float64] = logs[n] - logs[k] - logs[n - k]
    return chosen


@lru_cache(maxsize=8)
def _log_factorials(n: int) -> NDArray[np.float64]:
    """The logarithms of 0!, 1!, .. n!."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
