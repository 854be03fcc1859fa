"""Newer models for a server that runs."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count

import numpy as np
import pytest
import tritonclient.grpc as triton
from inferring import DEADLINE_S, rows, tensor
from onnx_models import WEIGHTS, linear

from harness import free_port
from propolis.link.address import Address
from propolis.secure.errors import StorageError
from propolis.serving.model import Model, load_model
from propolis.serving.refresh import Refresh
from propolis.serving.server import ServingOptions, serve

OFTEN_S = 0.02


def version(number: int) -> Model:
    return replace(load_model(linear()), version=str(number))


def kept(newer: Callable[[], Sequence[Model]], until: Callable[[list[str]], bool]) -> list[str]:
    """The versions that are installed, until the condition holds for them."""
    installed: list[str] = []

    async def install(model: Model) -> None:
        installed.append(model.version)

    async def main() -> None:
        keeping = asyncio.create_task(Refresh(newer, OFTEN_S).keep(install))
        async with asyncio.timeout(DEADLINE_S):
            while not until(installed):
                await asyncio.sleep(OFTEN_S)
        keeping.cancel()

    asyncio.run(main())
    return installed


def test_what_is_newer_is_installed_in_order() -> None:
    offered = iter([[version(2)], [], [version(3), version(4)]])
    assert kept(lambda: next(offered, []), lambda installed: len(installed) == 3) == ["2", "3", "4"]


def test_a_failure_is_logged_once_in_a_row_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    failures = [StorageError("gone"), StorageError("gone"), OSError("broken"), None, StorageError("gone")]
    left = iter(failures)

    def newer() -> Sequence[Model]:
        failure = next(left, None)
        if failure is not None:
            raise failure
        return [version(2)]

    with caplog.at_level(logging.WARNING, "propolis.serving"):
        assert kept(newer, lambda installed: len(installed) == 2) == ["2", "2"]
    said = [record.__dict__["error"] for record in caplog.records]
    assert said == ["StorageError: gone", "OSError: broken", "StorageError: gone"]


def test_it_does_not_wait_for_a_call_that_never_returns() -> None:
    begun, released = threading.Event(), threading.Event()

    def newer() -> Sequence[Model]:
        begun.set()
        released.wait(DEADLINE_S)
        return []

    done = threading.Thread(target=kept, args=(newer, lambda _: begun.is_set()))
    done.start()
    done.join(DEADLINE_S / 2)
    ended = not done.is_alive()
    released.set()
    done.join(DEADLINE_S)
    assert ended


def test_a_server_changes_to_newer_models_without_a_request_lost() -> None:
    """`serve` as a whole: callers ask all the time while the model is replaced again and again."""
    url = f"127.0.0.1:{free_port()}"
    numbers, seen, enough = count(2), set[str](), threading.Event()

    def ask() -> None:
        with triton.InferenceServerClient(url) as client:
            while not enough.is_set():
                result = client.infer("linear", [tensor("input", "FP32", rows(2))], client_timeout=DEADLINE_S)
                assert np.allclose(result.as_numpy("output"), rows(2) @ WEIGHTS, atol=1e-6)
                seen.add(result.get_response().model_version)
                if len(seen) > 4:
                    enough.set()

    def callers() -> None:
        with triton.InferenceServerClient(url) as client:
            while not _ready(client):
                threading.Event().wait(OFTEN_S)
        with ThreadPoolExecutor(3) as pool:
            asked = [pool.submit(ask) for _ in range(3)]
            try:
                for each in asked:
                    each.result(DEADLINE_S)
            finally:
                enough.set()

    async def main() -> None:
        calling = asyncio.create_task(asyncio.to_thread(callers))
        calling.add_done_callback(lambda _: os.kill(os.getpid(), signal.SIGTERM))
        options = ServingOptions(Address.parse(url))
        await serve([version(1)], options, refresh=Refresh(lambda: [version(next(numbers))], OFTEN_S))
        await calling

    asyncio.run(main())
    assert len(seen) > 4


def _ready(client: triton.InferenceServerClient) -> bool:
    try:
        return bool(client.is_server_ready(client_timeout=1))
    except triton.InferenceServerException:
        return False
