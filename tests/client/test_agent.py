"""Devices on a real link: what reaches the app, what leaves the device, and how long it keeps trying."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from linked import RUN_ID, WAIT_S, Link, echo_app, link_of

from propolis.client.agent import RefusedByServerError
from propolis.client.runner import AppRunner, Worker
from propolis.flower import part_content, part_metadata, set_identity
from propolis.link.frames import Reason, farewell
from propolis.secure.errors import UsageError
from propolis.server.link_grid import LinkGrid


def app_of(train: object) -> ClientApp:
    app = ClientApp()
    app.train()(train)  # type: ignore[arg-type]
    app.evaluate()(train)  # type: ignore[arg-type]
    return app


def metrics(message: Message, **values: float) -> Message:
    return Message(RecordDict({"m": MetricRecord(dict(values))}), reply_to=message)


def test_arrays_of_every_size_come_back_as_they_went(tmp_path: Path) -> None:
    arrays = {
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5),
        "large": np.random.default_rng(0).normal(size=3_000_000).astype(np.float32),
        "flags": np.array([True, False]),
    }
    content = RecordDict({"a": ArrayRecord({k: Array(v) for k, v in arrays.items()}), "c": ConfigRecord({"b": b""})})
    with link_of(tmp_path, 2) as link:
        messages = [Message(content, node, "train") for node in link.grid.get_node_ids()]
        for reply in link.grid.send_and_receive(messages=messages, timeout=WAIT_S):
            (record,) = reply.content.array_records.values()
            for name, array in arrays.items():
                np.testing.assert_array_equal(record[name].numpy(), array)
            assert reply.content.config_records["c"] == {"b": b""}


def test_the_app_has_the_runs_configuration_and_the_devices_own(tmp_path: Path) -> None:
    seen: list[Context] = []

    def train(message: Message, context: Context) -> Message:
        seen.append(context)
        context.state["calls"] = MetricRecord({"n": len(seen)})
        return metrics(message, calls=len(seen))

    with Link(tmp_path, 1) as link:
        link.start(0, app=app_of(train))
        for _ in range(2):
            link.exchange()
    assert seen[0] is seen[1]
    assert (seen[0].run_id, seen[0].node_id) == (RUN_ID, link.node_id(0))
    assert (dict(seen[0].run_config), seen[0].node_config["folder"]) == ({"rate": 0.5}, str(link.device(0)))


def test_heartbeats_go_on_while_the_app_trains(tmp_path: Path) -> None:
    def train(message: Message, context: Context) -> Message:
        time.sleep(4.5)  # more than three heartbeats
        return metrics(message, done=1)

    with Link(tmp_path, 1, beat_seconds=1) as link:
        link.start(0, app=app_of(train))
        (reply,) = link.exchange()
        assert not reply.has_error()
        assert link.devices.agents[0].connections == 1


def test_what_an_app_raises_stays_in_the_devices_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def train(message: Message, context: Context) -> Message:
        if "exit" in message.content.config_records["c"]:
            raise SystemExit(3)
        raise ValueError("patient 17 has no age")

    with Link(tmp_path, 1) as link:
        link.start(0, app=app_of(train))
        for word, name in (("n", "ValueError"), ("exit", "SystemExit")):
            content = RecordDict({"c": ConfigRecord({word: 1})})
            message = Message(content, link.node_id(0), "train")
            (reply,) = link.grid.send_and_receive(messages=[message], timeout=WAIT_S)
            assert reply.error.reason == f"the app raised {name}; the device's log says more"
    assert "patient 17 has no age" in caplog.text


def test_a_flower_strategy_runs_unmodified(tmp_path: Path) -> None:
    def train(message: Message, context: Context) -> Message:
        arrays = message.content.array_records["arrays"]
        moved = ArrayRecord({name: Array(array.numpy() + 1) for name, array in arrays.items()})
        return Message(
            RecordDict({"arrays": moved, "metrics": MetricRecord({"num-examples": 10, "loss": 0.5})}), reply_to=message
        )

    with Link(tmp_path, 3) as link:
        for index in range(3):
            link.start(index, app=app_of(train))
        result = FedAvg(min_available_nodes=3).start(
            link.grid, initial_arrays=ArrayRecord({"w": Array(np.zeros(5))}), num_rounds=2
        )
    np.testing.assert_allclose(result.arrays["w"].numpy(), np.full(5, 2.0))


def test_devices_come_back_to_a_server_that_was_started_again(tmp_path: Path) -> None:
    release = threading.Event()

    def train(message: Message, context: Context) -> Message:
        release.wait(WAIT_S)
        return metrics(message, done=1)

    with Link(tmp_path, 2) as link:
        link.start(0, app=app_of(train))
        link.start(1)
        port = link.server.port
        link.grid.push_messages(link.messages())  # answered to a server that is no more
        link.stop_server()
        release.set()
        link.start_server(port)
        link.wait_until(lambda: len(link.grid.get_node_ids()) == 2)
        assert [reply.has_error() for reply in link.exchange()] == [False, False]
        assert [agent.connections for agent in link.devices.agents] == [2, 2]


def test_a_request_goes_to_the_next_process_of_a_device_that_died(tmp_path: Path) -> None:
    stuck = threading.Event()

    def hang(message: Message, context: Context) -> Message:
        stuck.set()
        time.sleep(WAIT_S)
        return metrics(message, done=0)

    with Link(tmp_path, 1) as link:
        link.start(0, app=app_of(hang))
        ids = list(link.grid.push_messages(link.messages()))
        stuck.wait(WAIT_S)
        link.devices.stop(0)
        link.devices.start(link.device(0), link.address)
        replies: list[Message] = []
        link.wait_until(lambda: bool(replies.extend(link.grid.pull_messages(ids)) or replies))
        assert not replies[0].has_error()


def test_a_device_that_missed_a_deadline_is_asked_again_when_it_is_free(tmp_path: Path) -> None:
    release = threading.Event()

    def train(message: Message, context: Context) -> Message:
        release.wait(WAIT_S)
        return metrics(message, done=1)

    with Link(tmp_path, 2) as link:
        link.start(0, app=app_of(train))
        link.start(1)
        replies = link.exchange(timeout=0.5)
        assert [reply.metadata.src_node_id for reply in replies if not reply.has_error()] == [link.node_id(1)]
        link.wait_until(lambda: link.grid.get_node_ids() == [link.node_id(1)])
        began = time.monotonic()
        assert len(link.exchange()) == 1
        assert time.monotonic() - began < WAIT_S / 2  # nobody waited for the other
        release.set()
        link.wait_until(lambda: len(list(link.grid.get_node_ids())) == 2)
        assert [reply.has_error() for reply in link.exchange()] == [False, False]


def test_with_once_a_device_ends_with_the_run_and_without_it_waits_for_the_next(tmp_path: Path) -> None:
    with Link(tmp_path, 2) as link:
        link.start(0, once=True)
        link.start(1)
        link.server.stop(farewell(Reason.RUN_OVER, "the run is complete"))
        assert link.devices.futures[0].result(WAIT_S) is None
        port = link.server.port
        link.start_server(port)
        link.wait_until(lambda: link.grid.get_node_ids() == [link.node_id(1)])


def test_with_once_a_device_gives_up_and_says_why(tmp_path: Path) -> None:
    with Link(tmp_path, 1) as link:
        which = link.devices.start(link.device(0), "127.0.0.1:1", once=True, patience=0.5)
        with pytest.raises(RefusedByServerError, match=r"gave up after 0\.5 s: cannot connect to 127\.0\.0\.1:1"):
            link.devices.futures[which].result(WAIT_S)


def test_a_message_for_another_device_is_dropped() -> None:
    """As a server that mixes up its devices would send it: no app sees it."""
    set_identity(RUN_ID)
    runner = AppRunner(echo_app(), 77, {})
    runner.run_is(RUN_ID, {})
    mine, anothers = (Message(RecordDict(), node, "train") for node in (77, 78))
    assert runner.answer(part_metadata(mine) + part_content(mine.content).header, ()).total > 0
    for header in (part_metadata(anothers), b"\xff" * 9):
        with pytest.raises(ValueError, match=r"another device|no message"):
            runner.answer(header, ())


def test_devices_of_one_process_may_share_a_worker(tmp_path: Path) -> None:
    worker = Worker()
    with Link(tmp_path, 3) as link:
        link.start(0, 1, 2, worker=worker)
        assert isinstance(link.grid, LinkGrid)
        assert len(link.exchange()) == 3


def test_an_app_that_answers_no_message_costs_its_request_alone(tmp_path: Path) -> None:
    calls: list[int] = []

    def train(message: Message, context: Context) -> Message:
        calls.append(len(calls))
        return None if len(calls) == 1 else metrics(message, done=1)  # type: ignore[return-value]

    with Link(tmp_path, 1) as link:
        link.start(0, app=app_of(train))
        assert [reply.error.reason for reply in link.exchange()] == [
            "the app raised TypeError; the device's log says more"
        ]
        assert [reply.has_error() for reply in link.exchange()] == [False]


def test_a_reply_with_too_much_besides_its_arrays_is_an_error(tmp_path: Path) -> None:
    def train(message: Message, context: Context) -> Message:
        return Message(RecordDict({"m": MetricRecord({"x": [0.5] * 200_000})}), reply_to=message)

    with Link(tmp_path, 1) as link:
        link.start(0, app=app_of(train))
        (reply,) = link.exchange()
        assert "ValueError" in reply.error.reason
        assert link.devices.agents[0].connections == 1
        content = RecordDict({"m": MetricRecord({"x": [0.5] * 200_000})})
        with pytest.raises(UsageError, match="put large values into arrays"):
            link.grid.push_messages([Message(content, link.node_id(0), "train")])


def test_a_device_that_trains_ends_at_once_when_it_is_told_to(tmp_path: Path) -> None:
    """As a process: Python cannot end the thread that trains, and must not wait for it either."""
    (tmp_path / "slow_app.py").write_text(
        "import time\nimport torch\nfrom flwr.clientapp import ClientApp\napp = ClientApp()\n"
        "@app.train()\ndef train(message, context):\n    print('at work', flush=True)\n"
        "    while True: torch.ones(300, 300) @ torch.ones(300, 300)\n"
    )
    with Link(tmp_path / "federation", 1) as link:
        command = [*(sys.executable, "-m", "propolis", "client", "run", "--dir", str(link.device(0)))]
        command += ["--server", link.address, "--app", "slow_app:app"]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        link.wait_until(lambda: bool(link.grid.get_node_ids()))
        link.grid.push_messages(link.messages())
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 130
