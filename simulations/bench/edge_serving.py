"""How many answers a served model gives, and how late the slowest come, to clients of gRPC on the same machine."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from propolis.protos import inference_pb2 as pb
from propolis.secure.errors import PropolisError
from propolis.serving.service import SERVICE

MODEL = "model"
_START_S, _STOP_S, _CALL_S = 60.0, 40.0, 30.0
_WARM_UP_S = 0.5


@dataclass(frozen=True, slots=True)
class Load:
    """What some clients saw who each ask again as soon as they are answered.

    Attributes:
        per_second: answers of all of them together.
        p50_ms: half of the answers came within.
        p99_ms: 99 of 100 answers came within.
    """

    per_second: float
    p50_ms: float
    p99_ms: float


def loads(model: Path, example: np.ndarray, clients: tuple[int, ...], seconds: float) -> dict[int, Load]:
    """Serve a model from a process of its own, and ask it one example at a time.

    Args:
        model: the ONNX file.
        example: (1, ...) float32 input.
        clients: how many ask at once, one number after the other.
        seconds: how long each number does.

    Returns:
        What was seen, by number of clients.
    """
    with served(model) as address:
        return {count: asyncio.run(_ask(address, _request(example), count, seconds)) for count in clients}


@contextmanager
def served(model: Path) -> Iterator[str]:
    """A process that serves the model; its address.

    Raises:
        PropolisError: it ended, or did not become ready in time.
    """
    command = [sys.executable, "-m", "propolis", "serve", "--model", f"{MODEL}={model}", "--metrics", "none"]
    address = f"127.0.0.1:{_free_port()}"
    with subprocess.Popen([*command, "--listen", address], stderr=subprocess.DEVNULL) as process:
        try:
            with grpc.insecure_channel(address) as channel:
                _wait_until_ready(channel, process)
            yield address
            process.send_signal(signal.SIGTERM)
            process.wait(_STOP_S)
        finally:
            process.kill()


def _wait_until_ready(channel: grpc.Channel, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until and process.poll() is None:
        try:
            grpc.channel_ready_future(channel).result(timeout=1)
            return
        except grpc.FutureTimeoutError:
            continue
    raise PropolisError("the server to measure did not become ready")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _request(example: np.ndarray) -> bytes:
    tensor = pb.ModelInferRequest.InferInputTensor(name="input", datatype="FP32", shape=example.shape)
    request = pb.ModelInferRequest(model_name=MODEL, inputs=[tensor], raw_input_contents=[example.tobytes()])
    data: bytes = request.SerializeToString()
    return data


async def _ask(address: str, request: bytes, clients: int, seconds: float) -> Load:
    async with grpc.aio.insecure_channel(address) as channel:
        infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")  # bytes in and out: the clients are not what is measured
        await asyncio.gather(*(_client(infer, request, time.perf_counter() + _WARM_UP_S) for _ in range(clients)))
        began = time.perf_counter()
        times = await asyncio.gather(*(_client(infer, request, began + seconds) for _ in range(clients)))
        took = time.perf_counter() - began
    answers = np.concatenate(times)
    p50, p99 = np.percentile(answers, (50, 99)) * 1000
    return Load(len(answers) / took, float(p50), float(p99))


async def _client(infer: Any, request: bytes, until: float) -> list[float]:
    """Ask, and ask again; seconds that each answer took."""
    times: list[float] = []
    while not times or time.perf_counter() < until:
        asked = time.perf_counter()
        await infer(request, timeout=_CALL_S)
        times.append(time.perf_counter() - asked)
    return times
