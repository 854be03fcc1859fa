"""The server publishes no two sums over one model whose difference is a few devices' updates."""

from __future__ import annotations

import numpy as np
import pytest
from secure_app import MODEL, Hive, outcome_of

from propolis.secure.errors import TooFewPeersError

OTHER = {name: array + np.float32(1) for name, array in MODEL.items()}
KINDS = ["train", "evaluate"]


def published(hive: Hive, nodes: list[int], kind: str = "train", model: dict[str, np.ndarray] | None = None) -> bool:
    """Whether a sum over these nodes is published; if not, then no share was asked for."""
    asked = len(hive.wire.asked("unmask"))
    try:
        return outcome_of(hive.round(kind, model or MODEL, nodes)).survivors == len(nodes)
    except TooFewPeersError as error:
        said = str(error)
    assert "differ by fewer than" in said
    assert len(hive.wire.asked("unmask")) == asked
    return False


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("second", "allowed"),
    [
        ([1, 2, 3, 4, 5, 6], True),
        ([1, 2, 3, 4, 5], False),
        ([1, 2, 3, 4], False),
        ([1, 2, 3], True),
        ([1, 2, 3, 4, 5, 6, 7], False),
        ([1, 2, 3, 4, 5, 7], False),
        ([1, 2, 3, 4, 7, 8], True),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], True),
        ([7, 8, 9], True),
    ],
    ids=str,
)
def test_two_sums_over_one_model_are_over_the_same_devices_or_differ_by_enough(
    kind: str, second: list[int], allowed: bool
) -> None:
    hive = Hive(9)
    assert published(hive, [1, 2, 3, 4, 5, 6], kind)
    assert published(hive, second, kind) is allowed


@pytest.mark.parametrize(("fewest", "allowed"), [(3, True), (4, True), (5, False)])
def test_how_many_is_enough_is_the_federations_to_say(fewest: int, allowed: bool) -> None:
    hive = Hive(9, min_difference=fewest)
    assert published(hive, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert published(hive, [1, 2, 3, 4, 5]) is allowed


def test_every_sum_before_counts_and_not_the_last_alone() -> None:
    hive = Hive(9)
    assert published(hive, [1, 2, 3, 4, 5, 6])
    assert published(hive, [1, 2, 3, 7, 8, 9])
    assert not published(hive, [1, 2, 3, 4, 5])


def test_what_was_refused_does_not_count() -> None:
    hive = Hive(9)
    assert published(hive, [1, 2, 3, 4, 5, 6])
    assert not published(hive, [1, 2, 3, 4, 5])
    assert published(hive, [1, 2, 3, 4, 5, 6])
    assert published(hive, [1, 2, 3])  # three of the first, two of the refused


def test_another_model_is_another_matter() -> None:
    hive = Hive(6)
    assert published(hive, [1, 2, 3, 4, 5, 6])
    assert published(hive, [1, 2, 3, 4, 5], model=OTHER)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_are_sums_over_different_things(kind: str) -> None:
    hive, (other,) = Hive(6), set(KINDS) - {kind}
    assert published(hive, [1, 2, 3, 4, 5, 6], kind)
    assert published(hive, [1, 2, 3, 4, 5], other)
    assert not published(hive, [1, 2, 3, 4, 5], kind)


@pytest.mark.parametrize("exchange", ["hello", "prepare", "upload"])
def test_it_is_the_devices_alive_that_count_and_not_those_asked(exchange: str) -> None:
    hive = Hive(6)
    assert published(hive, [1, 2, 3, 4, 5, 6])
    hive.wire.lose = lambda asked, node: (asked, node) == ("hello" if exchange == "hello" else exchange, 6)
    hive.grid._directory._keys.pop(6)  # so that it has to say hello again
    with pytest.raises(TooFewPeersError, match="differ by fewer than 3"):
        hive.round()
    assert len(hive.wire.asked("unmask")) == 6


def test_a_retry_with_the_devices_of_before_is_published() -> None:
    hive, gone = Hive(6), [6]
    assert published(hive, [1, 2, 3, 4, 5, 6])
    hive.wire.lose = lambda asked, node: asked == "upload" and node in gone and gone.pop() == node
    assert outcome_of(hive.round()).survivors == 6


def test_a_model_that_comes_back_is_remembered() -> None:
    hive = Hive(6)
    assert published(hive, [1, 2, 3, 4, 5, 6])
    assert published(hive, [1, 2, 3, 4, 5, 6], model=OTHER)
    assert not published(hive, [1, 2, 3, 4, 5])
