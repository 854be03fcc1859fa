from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from harness import COUNTING_APP
from propolis.messages import RECORD, protocol_record
from propolis.secure.secagg.states import Exchange
from propolis.server.exchange import exchange
from propolis.settings import Settings
from propolis.simulations.dropout import DropoutGrid, steps_of
from propolis.simulations.local import LocalGrid


def ask(grid: LocalGrid | DropoutGrid, nodes: list[int], what: str = "count") -> list[Message]:
    content = RecordDict({"config": ConfigRecord({"what": what})})
    messages = [Message(content, dst_node_id=node, message_type="train") for node in nodes]
    return list(grid.send_and_receive(messages, timeout=60))


def numbers(replies: list[Message], key: str) -> list[object]:
    return [reply.content.metric_records["metrics"][key] for reply in replies]


@pytest.mark.parametrize("workers", [0, 2])
def test_contexts_are_each_devices_own_and_last(workers: int) -> None:
    with LocalGrid(COUNTING_APP, 4, workers=workers) as grid:
        assert list(grid.get_node_ids()) == [1, 2, 3, 4]
        ask(grid, [1, 2])
        replies = ask(grid, [1, 2, 3])
        assert numbers(replies, "calls") == [2, 2, 1]
        assert numbers(replies, "partition") == [0, 1, 2]
        assert numbers(replies, "partitions") == [4, 4, 4]


def test_a_device_always_meets_its_own_worker() -> None:
    with LocalGrid(COUNTING_APP, 6, workers=2) as grid:
        first, second = (numbers(ask(grid, [1, 2, 3, 4, 5, 6]), "pid") for _ in range(2))
    assert first == second
    assert len(set(first)) == 2
    assert first[0::2] == [first[0]] * 3
    assert os.getpid() not in first


@pytest.mark.parametrize("workers", [0, 1])
def test_what_an_app_raises_is_an_error_reply(workers: int) -> None:
    with LocalGrid(COUNTING_APP, 2, workers=workers) as grid:
        (reply,) = ask(grid, [2], "raise")
        assert reply.has_error()
        assert reply.error.reason == "ValueError: asked to"
        assert reply.metadata.src_node_id == 2
        assert numbers(ask(grid, [2]), "calls") == [1]


def test_a_worker_that_dies_costs_its_devices_and_no_wait() -> None:
    with LocalGrid(COUNTING_APP, 4, workers=2) as grid:
        began = time.monotonic()
        replies = ask(grid, [1, 2], "die")
        assert [reply.error.reason for reply in replies] == ["the worker process of this device died"] * 2
        assert numbers(ask(grid, [3]), "calls") == [1]  # another process has taken its place
        assert time.monotonic() - began < 60


def test_a_device_that_hangs_costs_one_deadline_and_its_worker() -> None:
    with LocalGrid(COUNTING_APP, 2, workers=2) as grid:
        ask(grid, [1, 2])
        content = RecordDict({"config": ConfigRecord({"what": "hang"})})
        began = time.monotonic()
        (reply,) = exchange(grid, [Message(content, dst_node_id=1, message_type="train")], timeout=1.0)
        assert reply.error.reason == "the device did not answer in time; its worker was ended"
        assert time.monotonic() - began < 30
        assert numbers(ask(grid, [1]), "calls") == [1]
        assert numbers(ask(grid, [2]), "calls") == [2]


def test_workers_end_with_the_process_that_they_work_for() -> None:
    code = (
        "import os, sys; from harness import COUNTING_APP; from propolis.simulations.local import LocalGrid\n"
        "from flwr.app import ConfigRecord, Message, RecordDict\n"
        "if __name__ == '__main__':\n"
        "    grid = LocalGrid(COUNTING_APP, 1, workers=1)\n"
        "    content = RecordDict({'config': ConfigRecord({'what': 'count'})})\n"
        "    (reply,) = grid.send_and_receive([Message(content, dst_node_id=1, message_type='train')], timeout=60)\n"
        "    print(reply.content.metric_records['metrics']['pid'], flush=True)\n"
        "    os._exit(9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    worker = int(done.stdout)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{worker}").exists()


def test_a_device_shares_no_memory_with_the_server_or_another_device() -> None:
    content = RecordDict({"config": ConfigRecord({"what": "scribble"})})
    grid = LocalGrid(COUNTING_APP, 2)
    messages = [Message(content, dst_node_id=node, message_type="train") for node in (1, 2)]
    replies = list(grid.send_and_receive(messages, timeout=60))
    assert content.config_records["config"]["what"] == "scribble"
    assert numbers(replies, "calls") == [1, 1]


def test_a_device_works_when_its_reply_is_pulled() -> None:
    done: list[int] = []
    grid = LocalGrid(partial(recording_app, done), 3)
    messages = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in (1, 2, 3)]
    replies = iter(grid.pull_messages(grid.push_messages(messages)))
    assert done == []
    next(replies)
    assert done == [1]


def recording_app(done: list[int]) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        done.append(context.node_id)
        return Message(RecordDict({"metrics": MetricRecord({"x": 1})}), reply_to=message)

    return app


STEPS = steps_of(Settings(protection="secagg"))


def lost(probability: float, step: int, steps: Sequence[str] = STEPS, seed: int = 0, rounds: int = 200) -> int:
    """Devices lost at the given step over many rounds of ten devices."""
    grid = DropoutGrid(LocalGrid(COUNTING_APP, 10), probability, seed, steps)
    total = 0
    for number in range(rounds):
        grid.round_started(number, 0)
        outgoing = [message_to(grid, node_id, steps[step]) for node_id in range(1, 11)]
        total += sum(reply.has_error() for reply in grid.send_and_receive(outgoing))
    return total


def message_to(grid: DropoutGrid, node_id: int, step: str) -> Message:
    kind, _, exchange = step.partition(" ")
    content = RecordDict({"config": ConfigRecord({"what": "count"})})
    if exchange:
        content[RECORD] = protocol_record(Exchange[exchange.upper()], b"")
    return grid.create_message(content, kind, node_id, "")


def test_a_round_has_the_steps_that_its_protection_asks_for() -> None:
    assert steps_of(Settings()) == ["train"]
    assert steps_of(Settings(evaluate_fraction=1.0)) == ["train", "evaluate"]
    assert STEPS == ["train hello", "train prepare", "train upload", "train unmask"]
    lying = steps_of(Settings(protection="secagg", malicious=True, evaluate_fraction=1.0))
    assert lying[3] == "train confirm"
    assert len(lying) == 10


def test_devices_are_lost_with_the_given_chance_at_a_uniform_exchange() -> None:
    assert lost(0.0, 0, rounds=5) == 0
    assert 480 < lost(0.3, 0, ["train"]) < 720  # 2,000 draws at 0.3: six standard deviations
    assert 100 < lost(0.3, 0) < 200  # a quarter of them are lost at the first of four
    assert 480 < lost(0.3, 3) < 720  # all of them by the last


def test_losses_depend_on_the_seed_alone() -> None:
    assert lost(0.3, 1, seed=1, rounds=20) == lost(0.3, 1, seed=1, rounds=20)


def test_a_lost_device_never_hears_of_it() -> None:
    inner = LocalGrid(COUNTING_APP, 10)
    grid = DropoutGrid(inner, 0.5, seed=3)
    grid.round_started(1, 0)
    replies = ask(grid, list(range(1, 11)))
    gone = [reply.metadata.src_node_id for reply in replies if reply.has_error()]
    assert 0 < len(gone) < 10
    assert numbers(ask(inner, gone), "calls") == [1] * len(gone)
