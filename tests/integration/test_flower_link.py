"""The benchmark's peer for real: Flower's own processes, started and ended."""

from __future__ import annotations

from pathlib import Path

import pytest

from propolis.secure.errors import PropolisError
from propolis.simulations.bench.flower_link import _processes_with, exchange_times

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="ends what it started through /proc")


@pytest.fixture(autouse=True)
def _scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary folder and a mark of our own, which what it starts inherits."""
    monkeypatch.setenv("PROPOLIS_TEST", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def nothing_is_left(folder: Path) -> bool:
    return not list(folder.iterdir()) and not _processes_with(f"PROPOLIS_TEST={folder}")


@pytest.mark.soak
def test_exchanges_are_timed_and_nothing_is_left(tmp_path: Path) -> None:
    seconds = exchange_times(nodes=2, parameters=1000, exchanges=1, deadline_s=240)
    assert len(seconds) == 1
    assert seconds[0] > 0
    assert nothing_is_left(tmp_path)


def test_too_little_time_is_one_clear_line_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(PropolisError, match="SuperLink did not start in time"):
        exchange_times(nodes=1, parameters=0, exchanges=1, deadline_s=0.0)
    assert nothing_is_left(tmp_path)
