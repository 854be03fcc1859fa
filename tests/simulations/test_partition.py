from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from propolis.secure.errors import UsageError
from propolis.simulations.partition import Partition
from propolis.task import Examples


def examples(labels: list[int], users: list[int] | None = None) -> Examples:
    owners = None if users is None else np.array(users)
    return Examples(torch.zeros(len(labels), 1), torch.tensor(labels, dtype=torch.int64), owners)


LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=300)
KINDS = st.one_of(
    st.just("iid"),
    st.floats(0.01, 100).map(lambda alpha: f"dirichlet:{alpha}"),
    st.integers(1, 8).map(lambda classes: f"shards:{classes}"),
    st.just("natural"),
)


@settings(max_examples=300, deadline=None)
@given(KINDS, LABELS, st.integers(1, 40), st.integers(0, 2**40))
def test_every_example_goes_to_exactly_one_device_or_the_request_is_refused(
    kind: str, labels: list[int], clients: int, seed: int
) -> None:
    data = examples(labels, users=[label % 4 for label in labels])
    try:
        parts = Partition.parse(kind).split(data, clients, seed)
    except UsageError:
        return
    assert len(parts) == clients
    assert all(len(part) > 0 for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))


@settings(max_examples=50, deadline=None)
@given(KINDS, st.integers(0, 2**40))
def test_the_same_seed_gives_the_same_parts(kind: str, seed: int) -> None:
    data = examples([i % 7 for i in range(140)], users=[i % 10 for i in range(140)])
    try:
        first, second = (Partition.parse(kind).split(data, 10, seed) for _ in range(2))
    except UsageError:
        return
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 7), st.integers(7, 30), st.integers(0, 2**40))
def test_shards_hold_exactly_the_classes_asked_for(classes: int, clients: int, seed: int) -> None:
    labels = torch.arange(2100) % 7
    parts = Partition.parse(f"shards:{classes}").split(examples(labels.tolist()), clients, seed)
    assert {len(labels[torch.from_numpy(part)].unique()) for part in parts} == {classes}


def test_natural_keeps_each_user_whole() -> None:
    users = [i % 9 for i in range(90)]
    parts = Partition.parse("natural").split(examples([0] * 90, users), 4, seed=1)
    owners = [{users[i] for i in part} for part in parts]
    assert sum(map(len, owners)) == 9
    assert max(map(len, owners)) - min(map(len, owners)) <= 1


def test_small_alpha_is_more_skewed_than_large() -> None:
    data = examples([i % 10 for i in range(5000)])

    def skew(alpha: float) -> float:
        parts = Partition.parse(f"dirichlet:{alpha}").split(data, 10, seed=0)
        shares = [np.bincount(data.labels[torch.from_numpy(p)].numpy(), minlength=10) / len(p) for p in parts]
        return float(np.mean([share.max() for share in shares]))

    assert skew(0.05) > skew(0.5) > skew(50)


@pytest.mark.parametrize(
    ("kind", "count", "clients", "message"),
    [
        ("iid", 5, 6, "6 clients cannot share 5 examples"),
        ("natural", 50, 11, "11 clients cannot share 10 users"),
        ("shards:8", 70, 5, "shards:8 asks for more than the 7 classes"),
        ("shards:1", 70, 5, "5 clients with 1 classes each leave some of the 7 classes to nobody"),
        ("shards:7", 70, 20, "a class of 10 examples cannot serve 20 clients"),
    ],
)
def test_infeasible_requests_are_refused_with_the_numbers(kind: str, count: int, clients: int, message: str) -> None:
    data = examples([i % 7 for i in range(count)], users=[i % 10 for i in range(count)])
    with pytest.raises(UsageError) as caught:
        Partition.parse(kind).split(data, clients, seed=0)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "even", "dirichlet", "dirichlet:0", "dirichlet:-1", "dirichlet:inf",
                                  "dirichlet:1e308", "shards:0", "shards:x", "iid:3", "natural:1"])  # fmt: skip
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected iid, dirichlet:ALPHA, shards:CLASSES or natural"):
        Partition.parse(text)


def test_labels_that_are_no_classes_are_refused_where_classes_are_needed() -> None:
    regression = Examples(torch.zeros(10, 1), torch.zeros(10))
    with pytest.raises(UsageError, match="integer class labels"):
        Partition.parse("dirichlet:1").split(regression, 2, seed=0)
    assert len(Partition.parse("iid").split(regression, 2, seed=0)) == 2


def test_no_users_is_said() -> None:
    with pytest.raises(UsageError, match="name no users"):
        Partition.parse("natural").split(examples([0] * 10), 2, seed=0)
