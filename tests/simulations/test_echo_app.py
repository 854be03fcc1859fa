from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from propolis.flower import message_from_bytes, message_to_bytes
from propolis.simulations.bench import echo_app
from propolis.simulations.local import LocalGrid


def run(out: Path, grid: LocalGrid, **changes: float) -> None:
    config = {"exchanges": 3, "parameters": 1000, "nodes": 4, "timeout": 30.0, **changes, "out": str(out)}
    echo_app.main(grid, Context(1, 0, {}, RecordDict(), config))


def load_echo() -> ClientApp:
    return echo_app.client_app


@pytest.mark.parametrize("parameters", [0, 1000])
def test_each_exchange_is_timed(tmp_path: Path, parameters: int) -> None:
    with LocalGrid(load_echo, 4) as grid:
        run(tmp_path / "out.json", grid, parameters=parameters)
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures["nodes"] == 4
    assert len(figures["seconds"]) == 3
    assert all(seconds > 0 for seconds in figures["seconds"])


def test_it_waits_for_the_nodes_and_no_longer_than_it_may(tmp_path: Path) -> None:
    with LocalGrid(load_echo, 3) as grid, pytest.raises(TimeoutError, match="expected 4 nodes, 3 are connected"):
        run(tmp_path / "out.json", grid, timeout=0.2)
    assert not (tmp_path / "out.json").exists()


def test_it_asks_as_many_nodes_as_it_is_told(tmp_path: Path) -> None:
    with LocalGrid(load_echo, 9) as grid:
        run(tmp_path / "out.json", grid)
    assert json.loads((tmp_path / "out.json").read_text())["nodes"] == 4


class Liar(LocalGrid):
    """Changes one value of one reply."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        first, *rest = super().send_and_receive(messages, timeout=timeout)
        data = message_to_bytes(first)
        return [message_from_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]), *rest]


class Loser(LocalGrid):
    """Loses one reply."""

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return list(super().send_and_receive(messages, timeout=timeout))[1:]


def test_another_answer_is_no_measurement(tmp_path: Path) -> None:
    with Liar(load_echo, 4) as grid, pytest.raises(RuntimeError, match="something else"):
        run(tmp_path / "out.json", grid)


def test_a_lost_answer_is_no_measurement(tmp_path: Path) -> None:
    with Loser(load_echo, 4) as grid, pytest.raises(TimeoutError, match="expected 4 replies, 3 came"):
        run(tmp_path / "out.json", grid)


def test_a_failed_node_is_no_measurement() -> None:
    app = ClientApp()  # knows no message at all
    with LocalGrid(lambda: app, 2) as grid, pytest.raises(RuntimeError, match="node 1 failed"):
        echo_app.exchange(grid, [1, 2], RecordDict(), time.monotonic() + 30)
