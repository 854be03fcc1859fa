"""The link over a bad network: it may take longer, but nothing is lost, and nobody waits for the one who is."""

from __future__ import annotations

import resource
import socket
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from linked import WAIT_S, Link, Raw, link_of

from propolis.simulations.faults import Faults, Proxy

MB = 10**6
_FEWEST, _MOST = 2_000, 10_000


def adding_app(step: float) -> ClientApp:
    """Adds to every value, so that the mean tells who took part."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        values = message.content.array_records["arrays"].to_numpy_ndarrays()[0] + np.float32(step)
        content = RecordDict({"arrays": ArrayRecord([values]), "metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    return app


def through(link: Link, faults: Faults) -> Proxy:
    return Proxy("127.0.0.1", link.server.port, faults)


def values_of(size: int) -> np.ndarray:
    """So many bytes that nothing can make smaller."""
    return np.random.default_rng(0).standard_normal(size // 4, dtype=np.float32)


def echoed(replies: list[Message]) -> np.ndarray:
    (reply,) = replies
    assert not reply.has_error()
    return reply.content.array_records["a"].to_numpy_ndarrays()[0]


def pulled(link: Link, message_id: str) -> list[Message]:
    """The reply to a request, when it has come."""
    replies: list[Message] = []

    def has_come() -> bool:
        replies.extend(link.grid.pull_messages([message_id]))
        return bool(replies)

    link.wait_until(has_come)
    return replies


def test_a_job_ends_with_all_devices_over_a_network_that_delays_cuts_and_reads_slowly(tmp_path: Path) -> None:
    rounds = 5
    bad = Faults(latency_s=0.2, cuts_per_s=0.05, seed=3089)  # the first two connections live for three seconds
    slow_reader = Faults(bytes_per_s=0.2 * MB, ways=("down",))
    with Link(tmp_path, 3, beat_seconds=2) as link, through(link, bad) as proxy, through(link, slow_reader) as slow:
        for index, address in enumerate((proxy.address, proxy.address, slow.address)):
            link.start(index, address=address, app=adding_app(index + 1))
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
        start = ArrayRecord([np.zeros(50_000, np.float32)])
        result = strategy.start(grid=link.grid, initial_arrays=start, num_rounds=rounds, timeout=2 * WAIT_S)
        (mean,) = result.arrays.to_numpy_ndarrays()
        np.testing.assert_allclose(mean, 2.0 * rounds, rtol=1e-5)  # of steps 1, 2 and 3
        assert proxy.counters.cuts > 0, "the network was not bad at all"


def test_a_silent_device_costs_one_deadline_and_not_the_run(tmp_path: Path) -> None:
    with Link(tmp_path, 4) as link:
        link.start(0, 1, 2)
        honest = set(link.grid.get_node_ids())
        silent = Raw(link, link.tls(3))
        silent.hello(link.node_id(3))
        link.wait_until(lambda: len(link.grid.get_node_ids()) == 4)
        first = [reply for reply in link.exchange(timeout=1.0) if not reply.has_error()]
        assert {reply.metadata.src_node_id for reply in first} == honest
        for _ in range(3):  # each would be without one of its replies if it waited for the silent one
            assert set(link.grid.get_node_ids()) == honest
            replies = link.exchange()
            assert {reply.metadata.src_node_id for reply in replies} == honest
            assert not any(reply.has_error() for reply in replies)
        silent.close()


def test_heartbeats_keep_a_stream_alive_that_needs_longer_for_one_message(tmp_path: Path) -> None:
    values = values_of(2 * MB)  # four seconds each way: more than three heartbeats
    with Link(tmp_path, 1, beat_seconds=1) as link, through(link, Faults(bytes_per_s=0.5 * MB)) as proxy:
        link.start(0, address=proxy.address)
        np.testing.assert_array_equal(echoed(link.exchange(values)), values)
        assert (proxy.counters.connections, proxy.counters.open) == (1, 1)


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_message_that_is_cut_half_way_goes_on_and_does_not_start_over(tmp_path: Path, way: str) -> None:
    values = values_of(4 * MB)

    def crossed(proxy: Proxy) -> int:
        return proxy.counters.bytes_up if way == "up" else proxy.counters.bytes_down

    with Link(tmp_path, 1) as link, through(link, Faults(bytes_per_s=2.0 * MB)) as proxy:
        link.start(0, address=proxy.address)
        (message_id,) = link.grid.push_messages(link.messages(values))
        link.wait_until(lambda: crossed(proxy) > values.nbytes // 2)
        assert proxy.cut() == 1
        np.testing.assert_array_equal(echoed(pulled(link, message_id)), values)
        assert values.nbytes < crossed(proxy) < 1.2 * values.nbytes


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def many() -> int:
    """How many connections this process can hold both ends of."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(_MOST, (most - 1000) // 2)
    if count < _FEWEST:
        pytest.skip(f"needs {2 * _FEWEST + 1000} open files, {most} are allowed")
    return count


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
def test_connections_without_a_handshake_keep_nobody_out_and_are_given_up(tmp_path: Path, many: int) -> None:
    with link_of(tmp_path, 2) as link, ExitStack() as idle:
        before = open_files()
        for _ in range(many):
            idle.enter_context(socket.create_connection(("127.0.0.1", link.server.port), timeout=WAIT_S))
        replies = link.exchange()
        assert [reply.has_error() for reply in replies] == [False, False]
        # Our own ends stay open until the end of the test: the server has to close its own by itself.
        link.wait_until(lambda: open_files() < before + many + 50, 2 * WAIT_S)
        link.start(0)
