"""A server of inference in a thread, and inputs for it as Triton's client takes them."""

from __future__ import annotations

import asyncio
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from propolis.link.address import Address
from propolis.link.certificates import Tls
from propolis.serving.model import Model
from propolis.serving.server import InferenceServer, ServingOptions

DEADLINE_S = 20.0
ANYWHERE = Address("127.0.0.1", 0)


class Running:
    """A server in a thread of its own, with what a client needs to reach it."""

    def __init__(self, server: InferenceServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server, self._loop = server, loop

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE_S)

    def metrics(self) -> dict[str, float]:
        url = f"http://127.0.0.1:{self.server.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as reply:
            lines = reply.read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


@contextmanager
def running(*models: Model, tls: Tls | None = None, **options: Any) -> Iterator[Running]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def make() -> InferenceServer:
        server = InferenceServer(ServingOptions(ANYWHERE, ANYWHERE, **options), tls)
        await server.start(models)
        return server

    try:
        server = asyncio.run_coroutine_threadsafe(make(), loop).result(DEADLINE_S)
        try:
            yield Running(server, loop)
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(DEADLINE_S)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(DEADLINE_S)
        loop.close()


def tensor(name: str, datatype: str, array: np.ndarray) -> triton.InferInput:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)
