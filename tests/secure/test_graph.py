"""The neighbour graph keeps its promises, checked with exact arithmetic and with scipy."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, comb

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.errors import UsageError
from propolis.secure.graph import NeighbourGraph, Sharing, sharing

SECURITY, CORRECTNESS = 2.0**-40, 2.0**-30
# devices, corrupted, dropped
SPARSE = [(1000, 0.1, 0.25), (1000, 0.05, 0.1), (1000, 0.05, 0.25), (1000, 0.1, 0.1), (65, 0.05, 0.1), (200, 0.2, 0.1)]


def tail(population: int, marked: int, drawn: int, at_least: int) -> float:
    """P[X >= at_least] when `drawn` of `population` are drawn, of which `marked` count: a quotient of integers."""
    hits = range(max(at_least, 0), min(drawn, marked) + 1)
    return sum(comb(marked, i) * comb(population - marked, drawn - i) for i in hits) / comb(population, drawn)


def keeps_promises(devices: int, bad: int, gone: int, sharing: Sharing) -> bool:
    """Whether the three promises of `propolis.secure.graph.sharing` hold."""
    degree, threshold = sharing.degree, sharing.threshold
    connected = devices * ((bad + gone) / devices) ** (degree / 2) <= SECURITY
    private = devices * tail(devices - 1, bad, degree, threshold) <= SECURITY
    correct = devices * tail(devices - 1, gone, degree, degree - threshold + 1) <= CORRECTNESS
    return connected and private and correct


def reachable(graph: NeighbourGraph, start: int, removed: set[int]) -> set[int]:
    seen, waiting = {start}, [start]
    while waiting:
        new = set(graph.neighbours(waiting.pop())) - seen - removed
        seen |= new
        waiting.extend(new)
    return seen


@pytest.mark.parametrize("devices", range(2, 65))
def test_small_cohorts_are_complete(devices: int) -> None:
    degree = devices - 1
    assert sharing(devices, 0.1, 0.25) == Sharing(degree, 2 * degree // 3 + 1)


@pytest.mark.parametrize("devices", [2, 64, 65, 1000])
def test_against_a_malicious_server_every_cohort_is_complete(devices: int) -> None:
    degree = devices - 1
    assert sharing(devices, 0.05, 0.1, malicious=True) == Sharing(degree, 2 * degree // 3 + 1)


@pytest.mark.parametrize(("devices", "corrupted", "dropped"), SPARSE)
def test_large_cohorts_get_the_smallest_degree_and_largest_threshold_that_keep_the_promises(
    devices: int, corrupted: float, dropped: float
) -> None:
    bad, gone = ceil(corrupted * devices), ceil(dropped * devices)
    chosen = sharing(devices, corrupted, dropped)
    assert chosen.degree < devices - 1
    assert chosen.degree % 2 == 0
    assert 2 * chosen.threshold > chosen.degree  # two disjoint sets of t neighbours must not exist
    assert keeps_promises(devices, bad, gone, chosen)
    assert not keeps_promises(devices, bad, gone, replace(chosen, threshold=chosen.threshold + 1))
    for degree in range(2, chosen.degree, 2):
        smaller = [Sharing(degree, threshold) for threshold in range(degree // 2 + 1, degree + 1)]
        assert not any(keeps_promises(devices, bad, gone, each) for each in smaller)


@pytest.mark.parametrize(("devices", "corrupted", "dropped"), SPARSE)
def test_scipy_agrees_about_the_bounds(devices: int, corrupted: float, dropped: float) -> None:
    hypergeom = pytest.importorskip("scipy.stats").hypergeom
    chosen = sharing(devices, corrupted, dropped)
    bad, gone = ceil(corrupted * devices), ceil(dropped * devices)
    assert devices * hypergeom.sf(chosen.threshold - 1, devices - 1, bad, chosen.degree) <= SECURITY
    spare = chosen.degree - chosen.threshold
    assert devices * hypergeom.sf(spare, devices - 1, gone, chosen.degree) <= CORRECTNESS


def test_what_no_sparse_graph_can_promise_gets_the_complete_one() -> None:
    assert sharing(100, 0.5, 0.5) == Sharing(99, 67)
    assert sharing(70, 0.3, 0.3) == Sharing(69, 47)


@pytest.mark.parametrize("malicious", [False, True])
@pytest.mark.parametrize("devices", [5, 10, 33, 64])
def test_more_corrupted_devices_than_a_complete_graph_stands_are_a_mistake(devices: int, malicious: bool) -> None:
    """Together they hold t shares of a secret, or with half of the honest t on each side of a lie."""
    degree, threshold = devices - 1, 2 * (devices - 1) // 3 + 1
    for bad in range(devices):
        safe = bad + (degree - bad) // 2 < threshold if malicious else bad < threshold
        if safe:
            assert sharing(devices, (bad + 0.5) / devices, 0.1, malicious) == Sharing(degree, threshold)
        else:
            with pytest.raises(UsageError, match=f"{bad} corrupted of {devices} devices"):
                sharing(devices, (bad + 0.5) / devices, 0.1, malicious)


@pytest.mark.parametrize(
    ("devices", "corrupted", "dropped"),
    [(1, 0.1, 0.1), (0, 0.1, 0.1), (10, 1.0, 0.1), (10, 0.1, 1.0), (10, -0.1, 0.1), (10, 0.1, float("nan"))],
)
def test_impossible_cohorts_are_a_mistake(devices: int, corrupted: float, dropped: float) -> None:
    with pytest.raises(UsageError, match="at least 2 devices and shares in"):
        sharing(devices, corrupted, dropped)


@given(st.sets(st.integers(0, 2**20), min_size=2, max_size=60), st.integers(1, 30), st.binary(max_size=32))
@settings(max_examples=60, deadline=None)
def test_neighbours_are_mutual_regular_and_connected(cohort: set[int], half: int, seed: bytes) -> None:
    degree = min(2 * half, len(cohort) - 1)
    graph = NeighbourGraph(cohort, degree, seed)
    for index in cohort:
        neighbours = graph.neighbours(index)
        assert list(neighbours) == sorted(set(neighbours) & cohort)
        assert index not in neighbours
        assert len(neighbours) == degree
        assert all(index in graph.neighbours(each) for each in neighbours)
    assert reachable(graph, min(cohort), set()) == cohort


def test_a_large_graph_stays_connected_without_the_lost() -> None:
    chosen = sharing(1000, 0.1, 0.25)
    graph = NeighbourGraph(range(1000), chosen.degree, b"seed")
    lost = set(range(350))
    assert reachable(graph, 999, lost) == set(range(350, 1000))
    stay = [len(set(graph.neighbours(index)) - set(range(250))) for index in range(1000)]
    assert min(stay) >= chosen.threshold


def test_the_seed_and_the_cohort_alone_decide_the_graph() -> None:
    cohort = range(100)
    one, other = NeighbourGraph(cohort, 10, b"one"), NeighbourGraph(reversed(cohort), 10, b"one")
    assert all(one.neighbours(index) == other.neighbours(index) for index in cohort)
    another = NeighbourGraph(cohort, 10, b"two")
    same = sum(len(set(one.neighbours(index)) & set(another.neighbours(index))) for index in cohort)
    assert same < 200  # about 100 of 1000 by chance
