"""What the benchmark of the link measures, part by part."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from propolis.simulations.bench.flower_link import exchange_times
from propolis.simulations.bench.link_crowd import READY
from propolis.simulations.bench.link_processes import Serving, attending, served, started, wait_until
from propolis.simulations.faults import Faults, Proxy
from propolis.simulations.federation import make_federation
from propolis.simulations.linked import write_linked_federation

_ECHO = "propolis.simulations.bench.echo_app"
_APPS = "propolis.simulations.bench.link_app"
_FLOWERS_DEADLINE_S = 400.0
_SETTLE_S = 2.0
_BEAT_S = 1
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that was measured.

    Attributes:
        name: what it is.
        value: in `unit`.
        unit: of the value.
        target: what it is to be.
        at_least: whether the target is the least that it may be; else it is the most.
    """

    name: str
    value: float
    unit: str
    target: float | None = None
    at_least: bool = False

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met, where there is one."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target


def side_by_side(devices: int, parameters: int, ours: int, flowers: int) -> tuple[float, float]:
    """Seconds of an exchange with echo devices, medians.

    Args:
        devices: processes of ours, and SuperNodes.
        parameters: float32 values that go to each of them and come back.
        ours: exchanges over our link.
        flowers: exchanges over Flower's.

    Returns:
        Ours, then Flower's.
    """
    serving = Serving(f"{_ECHO}:server_app", devices, {"exchanges": ours, "parameters": parameters})
    with (
        _federation(devices) as folder,
        served(folder, serving) as server,
        attending(folder, devices, server.address, f"{_ECHO}:client_app"),
    ):
        seconds = server.figures()["seconds"]
    return median(seconds), median(exchange_times(devices, parameters, flowers, _FLOWERS_DEADLINE_S))


def empty_exchange() -> list[Figure]:
    """Two devices, nothing to carry."""
    ours, flowers = side_by_side(devices=2, parameters=0, ours=500, flowers=3)
    return [
        Figure("ours, median", ours * 1e3, "ms", 10),
        Figure("Flower's, median", flowers * 1e3, "ms"),
        Figure("Flower's over ours", flowers / ours, "x", 500, at_least=True),
    ]


def model_exchange() -> list[Figure]:
    """Ten devices, a model of a million parameters there and back."""
    ours, flowers = side_by_side(devices=10, parameters=1_000_000, ours=11, flowers=2)
    return [
        Figure("ours, median", ours, "s"),
        Figure("Flower's, median", flowers, "s"),
        Figure("Flower's over ours", flowers / ours, "x"),
    ]


def crowd(devices: int = 1000, helpers: int = 2, idle_s: float = 5.0) -> list[Figure]:
    """Many devices at once, each with its own connection, in a few processes."""
    config = {"exchanges": 5, "idle": idle_s}
    serving = Serving(f"{_APPS}:crowd_server", devices, config, deadline_s=300)
    with _federation(devices) as folder, served(folder, serving) as server, ExitStack() as stack:
        crowds = []
        for number in range(helpers):
            first, end = (devices * n // helpers for n in (number, number + 1))
            arguments = [str(folder), str(first), str(end), server.address]
            log = folder / f"crowd-{number}.log"
            crowds.append(stack.enter_context(started("propolis.simulations.bench.link_crowd", arguments, log)))
        for each in crowds:
            wait_until(lambda each=each: READY in each.log.read_text(), each, 60)  # type: ignore[misc]
        time.sleep(_SETTLE_S)
        before, began = server.resident(), time.monotonic()
        for each in crowds:
            each.go()
        figures = server.figures()
    return [
        Figure("connected", figures["connected_at"] - began, "s"),
        Figure("empty exchange, median", median(figures["seconds"]), "s", 3),
        Figure("server's memory before", before / 1e6, "MB"),
        Figure("server's memory per idle device", (figures["resident"] - before) / devices / 1e3, "kB", 200),
    ]


def large_messages(devices: int = 4, parameters: int = 100_000_000) -> list[Figure]:
    """Replies of hundreds of megabytes at once, added up one at a time."""
    serving = Serving(f"{_APPS}:large_server", devices, {"parameters": parameters}, deadline_s=300)
    with (
        _federation(devices) as folder,
        served(folder, serving) as server,
        attending(folder, devices, server.address, f"{_APPS}:large_client"),
    ):
        figures = server.figures()
    size = parameters * _FLOAT_BYTES
    return [
        Figure("all summed up", figures["seconds"], "s"),
        Figure("server's memory grows by", figures["grown"] / 1e6, "MB", 3 * size / 1e6),
        Figure("in messages", figures["grown"] / size, "", 3),
    ]


def slow_line(parameters: int = 3_125_000, bytes_per_s: float = 1.25e6) -> list[Figure]:
    """One device behind a line that needs many heartbeats for a message, left alone and cut half-way."""
    size = parameters * _FLOAT_BYTES
    whole = _through_proxy(parameters, bytes_per_s, None)
    cut = _through_proxy(parameters, bytes_per_s, size // 2)
    return [
        Figure("heartbeat", _BEAT_S, "s"),
        Figure("arrived after", whole.seconds, "s"),
        Figure("streams", whole.streams, "", 1),
        Figure("bytes up over the message's", whole.bytes_up / size, "x"),
        Figure("cut half-way: arrived after", cut.seconds, "s"),
        Figure("cut half-way: streams", cut.streams, "", 2),
        Figure("cut half-way: bytes up", cut.bytes_up / size, "x", 1.2),
    ]


@dataclass(frozen=True, slots=True)
class _Crossing:
    """A message's way over a line: how long it took, in how many streams, and what was sent for it."""

    seconds: float
    streams: int
    bytes_up: int


def _through_proxy(parameters: int, bytes_per_s: float, cut_at: int | None) -> _Crossing:
    """Have a device send a message over a line, which is cut after so many bytes."""
    serving = Serving(f"{_APPS}:large_server", 1, {"parameters": parameters}, heartbeat=_BEAT_S, deadline_s=180)
    with (
        _federation(1) as folder,
        served(folder, serving) as server,
        Proxy("127.0.0.1", server.port, Faults(bytes_per_s=bytes_per_s)) as proxy,
        attending(folder, 1, proxy.address, f"{_APPS}:large_client"),
    ):
        if cut_at is not None:
            wait_until(lambda: proxy.counters.bytes_up >= cut_at, server.process, serving.deadline_s)
            proxy.cut()
        seconds = float(server.figures()["seconds"])
        return _Crossing(seconds, server.streams(), proxy.counters.bytes_up)


@contextmanager
def _federation(devices: int) -> Iterator[Path]:
    """The folder of a federation that lasts as long as the context."""
    with tempfile.TemporaryDirectory(prefix="propolis-") as name:
        folder = Path(name)
        write_linked_federation(make_federation(devices), folder)
        yield folder
