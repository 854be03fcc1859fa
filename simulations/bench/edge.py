"""``propolis bench edge``: one trained model in torch, ONNX Runtime and int8, on one thread, and served."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from propolis.client.train import LocalTrainer, TrainConfig
from propolis.export import Origin, evaluate_onnx, export_float32, quantize_int8, spread_inputs
from propolis.serving.model import load_model
from propolis.simulations.bench.edge_serving import loads
from propolis.simulations.bench.link import Part
from propolis.simulations.bench.link_parts import Figure
from propolis.simulations.bench.tasks import ConvolutionalFashionMnist, LargeConvolutionalFashionMnist
from propolis.task import Task

TORCH, FLOAT32, INT8 = "torch, eager", "ONNX Runtime, float32", "ONNX Runtime, int8"
PACKAGES = ("torch", "onnx", "onnxruntime", "grpcio", "propolis")
CLIENTS = (1, 8, 64)
_LEAST_SPEEDUP, _MOST_POINTS_LOST = 4.0, 0.2
_BLOCKS, _WARM_UP = 20, 50

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is done for a figure.

    Attributes:
        steps: batches of 64 that a model is trained with.
        calls: with one example, of each engine.
        seconds: that each number of clients asks.
        calibration: examples that int8's ranges are taken from.
    """

    steps: int = 1800
    calls: int = 6000
    seconds: float = 5.0
    calibration: int = 512


@dataclass(frozen=True, slots=True)
class Latency:
    """Of calls with one example, in microseconds."""

    p50_us: float
    p99_us: float


def side_by_side(engines: Mapping[str, Call], calls: int) -> dict[str, Latency]:
    """Time every engine, in turns of short blocks, so that what else the machine does hits all of them.

    Args:
        engines: what to call, by name.
        calls: of each.
    """
    times: dict[str, list[float]] = {name: [] for name in engines}
    for call in engines.values():
        _timed(call, _WARM_UP)
    for _ in range(_BLOCKS):
        for name, call in engines.items():
            times[name] += _timed(call, max(1, calls // _BLOCKS))
    return {name: Latency(*(np.percentile(taken, (50, 99)) * 1e6).tolist()) for name, taken in times.items()}


def _timed(call: Call, count: int) -> list[float]:
    clock, times = time.perf_counter, []
    for _ in range(count):
        began = clock()
        call()
        times.append(clock() - began)
    return times


def trained(task: Task, steps: int) -> nn.Module:
    """The task's model after some batches of all of its training data."""
    torch.manual_seed(0)
    trainer = LocalTrainer(task, torch.device("cpu"))
    config = TrainConfig(optimizer="adam", steps=steps, batch_size=64, lr=1e-3)
    trainer.train(task.data().train, config, seed=0)
    return trainer.model.eval()


def engines_of(task: Task, effort: Effort) -> tuple[nn.Module, bytes, bytes]:
    """One trained model three times: in torch, in ONNX, and in int8."""
    origin = Origin("bench", "1", "fashion-mnist", "")
    model = trained(task, effort.steps)
    whole = export_float32(task, model, origin).data
    return model, whole, quantize_int8(whole, origin, spread_inputs(task.data().train, effort.calibration))


def latencies(model: nn.Module, whole: bytes, small: bytes, example: torch.Tensor, calls: int) -> dict[str, Latency]:
    """Of one example, on one thread."""
    torch.set_num_threads(1)
    inputs = {"input": example.numpy()}
    engines: dict[str, Call] = {TORCH: partial(model, example)}
    engines |= {name: partial(load_model(data).run, inputs) for name, data in ((FLOAT32, whole), (INT8, small))}
    with torch.inference_mode():
        return side_by_side(engines, calls)


def measure(task: Task, effort: Effort) -> list[Figure]:
    """All figures of one task's model."""
    model, whole, small = engines_of(task, effort)
    test = task.data().test
    example = test.batch(torch.arange(1), torch.device("cpu"))[0]
    with torch.inference_mode():
        accuracy = {TORCH: task.evaluate(model, test)["accuracy"]}
    accuracy |= {n: evaluate_onnx(task, data, test)["accuracy"] for n, data in ((FLOAT32, whole), (INT8, small))}
    size = {TORCH: 4 * sum(p.numel() for p in model.parameters()), FLOAT32: len(whole), INT8: len(small)}
    taken = latencies(model, whole, small, example, effort.calls)
    figures = [figure for name in taken for figure in _figures_of(name, taken[name], accuracy[name], size[name])]
    return [*figures, *_compared(taken, accuracy), *_served(small, example.numpy(), effort.seconds)]


def _figures_of(name: str, taken: Latency, accuracy: float, size: int) -> list[Figure]:
    return [
        Figure(f"{name}: median", taken.p50_us, "us"),
        Figure(f"{name}: 99 of 100 within", taken.p99_us, "us"),
        Figure(f"{name}: size", size / 1e6, "MB"),
        Figure(f"{name}: accuracy", accuracy * 100, "%"),
    ]


def _compared(taken: Mapping[str, Latency], accuracy: Mapping[str, float]) -> list[Figure]:
    return [
        Figure("float32 beside torch: faster", taken[TORCH].p50_us / taken[FLOAT32].p50_us, "x"),
        Figure("int8 beside torch: faster", taken[TORCH].p50_us / taken[INT8].p50_us, "x", _LEAST_SPEEDUP, True),
        Figure("int8: accuracy lost", (accuracy[TORCH] - accuracy[INT8]) * 100, "points", _MOST_POINTS_LOST),
    ]


def _served(data: bytes, example: np.ndarray, seconds: float) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(data)
        seen = loads(path, example, CLIENTS, seconds)
    return [
        figure
        for clients, load in seen.items()
        for figure in (
            Figure(f"int8 served to {clients} at once: answers", load.per_second, "/s"),
            Figure(f"int8 served to {clients} at once: median", load.p50_ms, "ms"),
            Figure(f"int8 served to {clients} at once: 99 of 100 within", load.p99_ms, "ms"),
        )
    ]


def parts(effort: Effort, data: Path | None = None) -> dict[str, tuple[str, Part]]:
    """What is measured, as `propolis.simulations.bench.link.run_benchmark` takes it."""
    tasks: dict[str, Task] = {"cnn": ConvolutionalFashionMnist(data), "large": LargeConvolutionalFashionMnist(data)}
    return {name: (_title(task), partial(measure, task, effort)) for name, task in tasks.items()}


def _title(task: Task) -> str:
    return f"CNN of {sum(p.numel() for p in task.model().parameters()):,} parameters, Fashion-MNIST"
