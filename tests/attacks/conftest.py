"""The attacks on secure aggregation are tried on sums of vectors, and on sums of ciphertexts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from protocol import over_ciphertexts

# Modules whose rounds are those of `protocol.Cohort`.
_SUITE = (
    *("test_binding", "test_differencing", "test_forward_secrecy", "test_late_and_broken_updates"),
    *("test_roster_and_keys", "test_sets", "test_shares", "test_two_time_pads"),
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of what is particular to vectors says so with the mark `of_vectors`."""
    name, marked = metafunc.module.__name__.rpartition(".")[2], metafunc.definition.get_closest_marker("of_vectors")
    if name in _SUITE and marked is None:
        metafunc.parametrize("summed", ["vectors", "ciphertexts"], indirect=True)


@pytest.fixture(autouse=True)
def summed(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is summed in a test."""
    token = over_ciphertexts.set(getattr(request, "param", "vectors") == "ciphertexts")
    yield
    over_ciphertexts.reset(token)
