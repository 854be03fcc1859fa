from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from onnx_models import linear

from propolis.secure.errors import PropolisError
from propolis.simulations.bench.edge import CLIENTS, FLOAT32, INT8, TORCH, Effort, measure, parts, side_by_side
from propolis.simulations.bench.edge_serving import loads, served
from propolis.simulations.tasks.digits import Digits

QUICK = Effort(steps=200, calls=60, seconds=0.3, calibration=64)


def test_engines_take_turns() -> None:
    turns: list[str] = []

    def slow() -> None:
        turns.append("slow")
        time.sleep(0.002)

    taken = side_by_side({"slow": slow, "fast": lambda: turns.append("fast")}, 40)
    assert taken["slow"].p50_us >= 2000
    assert taken["slow"].p99_us >= taken["slow"].p50_us > taken["fast"].p50_us
    measured = turns[100:]  # after the warm-up
    assert len(measured) == 80
    assert measured[:4] == ["slow", "slow", "fast", "fast"]


def test_one_trained_model_is_measured_in_every_form() -> None:
    figures = {figure.name: figure for figure in measure(Digits(), QUICK)}
    accuracy = [figures[f"{name}: accuracy"].value for name in (TORCH, FLOAT32, INT8)]
    assert accuracy[0] == accuracy[1] > 80
    assert figures["int8: accuracy lost"].value == pytest.approx(accuracy[0] - accuracy[2])
    assert figures["int8: accuracy lost"].is_met == (accuracy[0] - accuracy[2] <= 0.2)
    medians = [figures[f"{name}: median"].value for name in (TORCH, INT8)]
    assert figures["int8 beside torch: faster"].value == pytest.approx(medians[0] / medians[1])
    assert figures[f"{TORCH}: size"].value == pytest.approx(4 * 9610 / 1e6)
    assert figures[f"{INT8}: size"].value < figures[f"{FLOAT32}: size"].value
    for clients in CLIENTS:
        assert figures[f"int8 served to {clients} at once: answers"].value > clients


def test_every_number_of_clients_is_answered(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(linear())
    # More than a connection may have under way at once: those wait, and nobody is refused.
    seen = loads(tmp_path / "m.onnx", np.ones((1, 4), np.float32), (1, 4, 64), 0.5)
    assert list(seen) == [1, 4, 64]
    for load in seen.values():
        assert load.per_second > 0
        assert 0 < load.p50_ms <= load.p99_ms


def test_a_server_that_ends_is_told(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(PropolisError, match="did not become ready"), served(tmp_path / "m.onnx"):
        pass


def test_both_models_are_measured() -> None:
    titles = [title for title, _ in parts(QUICK).values()]
    assert titles == [f"CNN of {count} parameters, Fashion-MNIST" for count in ("49,560", "421,642")]
