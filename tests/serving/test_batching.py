"""Dynamic batching: what goes together, what is refused, and what is not computed at all."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from onnx_models import WEIGHTS, copying, linear, mixed

from propolis.serving.batching import Batcher, Batching
from propolis.serving.faults import Fault, InferenceError
from propolis.serving.model import Model, load_model

DEADLINE_S = 20.0


class Gate:
    """A model that computes when it is let, and keeps what it was given."""

    def __init__(self, model: Model) -> None:
        self.model, self.open, self.sizes = model, threading.Event(), list[int]()
        self.fails: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        assert self.open.wait(DEADLINE_S)
        if isinstance(self.fails, Exception):
            raise self.fails
        self.sizes.append(len(next(iter(inputs.values()))))
        return self.model.run(inputs)


def ones(count: int, width: int = 4) -> dict[str, np.ndarray]:
    return {"input": np.full((count, width), count, np.float32)}


def counts(batcher: Batcher) -> dict[str, float]:
    found: dict[str, float] = {}
    for (name, labels), value in batcher.metrics.counts.items():
        reason = dict(labels).get("reason")
        found[name.removeprefix("nv_inference_") + (f" {reason}" if reason else "")] = value
    return found


async def gated(batching: Batching, data: bytes = b"") -> tuple[Batcher, Gate]:
    gate = Gate(load_model(data or linear()))
    return Batcher(gate, batching), gate  # type: ignore[arg-type]


async def busy(batcher: Batcher) -> asyncio.Task[Any]:
    """A first request, which the worker has taken and computes."""
    first = asyncio.create_task(batcher.infer(ones(1)))
    while batcher._waiting or not first.get_coro():
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)
    assert not batcher._waiting
    return first


def within(coroutine: Any) -> Any:
    async def limited() -> Any:
        async with asyncio.timeout(DEADLINE_S):
            return await coroutine

    return asyncio.run(limited())


def test_requests_that_wait_together_are_computed_together() -> None:
    async def run() -> None:
        batcher, gate = await gated(Batching(largest=8))
        first = await busy(batcher)
        others = [asyncio.create_task(batcher.infer(ones(size))) for size in (2, 1, 4, 3)]
        await asyncio.sleep(0.02)
        gate.open.set()
        for size, answer in zip((1, 2, 1, 4, 3), await asyncio.gather(first, *others), strict=True):
            assert np.array_equal(answer["output"], ones(size)["input"] @ WEIGHTS)
        assert gate.sizes == [1, 7, 3]  # the last one would have made it nine
        await batcher.close(DEADLINE_S)
        found = counts(batcher)
        assert (found["request_success"], found["count"], found["exec_count"]) == (5, 11, 3)
        assert found["queue_duration_us"] > 0
        assert found["compute_infer_duration_us"] > 0

    within(run())


def test_a_delay_lets_a_batch_fill_and_a_full_one_does_not_wait() -> None:
    async def run() -> None:
        batcher, gate = await gated(Batching(largest=4, delay_s=DEADLINE_S * 2))
        gate.open.set()
        await asyncio.gather(*(batcher.infer(ones(1)) for _ in range(4)))
        assert gate.sizes == [4]
        lone = asyncio.create_task(batcher.infer(ones(1)))
        done, _ = await asyncio.wait([lone], timeout=0.1)
        assert not done
        await batcher.close(DEADLINE_S)  # which waits for no batch to fill
        assert (await lone)["output"].shape == (1, 2)

    within(run())


def test_after_the_delay_a_lone_request_is_computed() -> None:
    async def run() -> None:
        batcher, gate = await gated(Batching(largest=4, delay_s=0.05))
        gate.open.set()
        began = time.monotonic()
        await batcher.infer(ones(1))
        assert time.monotonic() - began >= 0.05
        await batcher.close(DEADLINE_S)

    within(run())


def test_a_full_queue_refuses_and_recovers() -> None:
    async def run() -> None:
        batcher, gate = await gated(Batching(queue=2))
        first = await busy(batcher)
        waiting = [asyncio.create_task(batcher.infer(ones(1))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(InferenceError, match="2 requests wait already") as caught:
            await batcher.infer(ones(1))
        assert caught.value.fault is Fault.BUSY
        gate.open.set()
        await asyncio.gather(first, *waiting)
        assert (await batcher.infer(ones(1)))["output"].shape == (1, 2)
        assert counts(batcher)["request_failure REJECTED"] == 1
        await batcher.close(DEADLINE_S)

    within(run())


def test_who_has_gone_or_is_too_late_is_not_computed() -> None:
    async def run() -> None:
        batcher, gate = await gated(Batching())
        first = await busy(batcher)
        gone = asyncio.create_task(batcher.infer(ones(5)))
        late = asyncio.create_task(batcher.infer(ones(6), deadline=time.monotonic() + 0.01))
        patient = asyncio.create_task(batcher.infer(ones(2), deadline=time.monotonic() + DEADLINE_S))
        await asyncio.sleep(0.03)
        gone.cancel()
        gate.open.set()
        with pytest.raises(InferenceError, match="deadline") as caught:
            await late
        assert caught.value.fault is Fault.EXPIRED
        await asyncio.gather(first, patient)
        assert gate.sizes == [1, 2]
        await batcher.close(DEADLINE_S)
        assert counts(batcher)["request_failure CANCELED"] == 2

    within(run())


def test_one_callers_bad_inputs_cost_nobody_else() -> None:
    async def run() -> None:
        batcher, gate = await gated(Batching(delay_s=0.05), mixed())
        gate.open.set()
        row = {"mask": np.ones(1, bool), "default": np.zeros(1, np.float32)}
        rows = [{"index": np.array([index]), **row} for index in (0, 9, 2)]
        answers = await asyncio.gather(*map(batcher.infer, rows), return_exceptions=True)
        assert [answers[i]["output"].tolist() for i in (0, 2)] == [[10.0], [30.0]]  # type: ignore[index]
        assert isinstance(answers[1], InferenceError)
        assert answers[1].fault is Fault.FAILED
        await batcher.close(DEADLINE_S)
        found = counts(batcher)
        assert (found["request_success"], found["request_failure BACKEND"], found["exec_count"]) == (2, 1, 2)

    within(run())


def test_requests_of_other_shapes_are_another_batch() -> None:
    async def run() -> None:
        batcher, gate = await gated(Batching(delay_s=0.05), copying(TensorProto.FLOAT))
        gate.open.set()
        widths = (3, 3, 5)
        answers = await asyncio.gather(*(batcher.infer(ones(1, width)) for width in widths))
        assert [answer["output"].shape for answer in answers] == [(1, width) for width in widths]
        assert gate.sizes == [2, 1]
        await batcher.close(DEADLINE_S)

    within(run())


def test_a_model_that_takes_no_batches_gets_one_request_at_a_time() -> None:
    async def run() -> None:
        batcher, gate = await gated(Batching(delay_s=DEADLINE_S * 2), linear(batch=2))
        gate.open.set()
        await asyncio.gather(*(batcher.infer(ones(2)) for _ in range(3)))
        assert gate.sizes == [2, 2, 2]
        await batcher.close(DEADLINE_S)

    within(run())


def test_a_request_over_the_largest_batch_is_refused() -> None:
    async def run() -> None:
        batcher, _ = await gated(Batching(largest=3))
        with pytest.raises(InferenceError, match="4 examples: expected at most 3 in a request") as caught:
            await batcher.infer(ones(4))
        assert caught.value.fault is Fault.INVALID
        await batcher.close(DEADLINE_S)

    within(run())


def test_closing_finishes_what_waits_and_refuses_the_rest() -> None:
    async def run() -> None:
        batcher, gate = await gated(Batching(largest=1))
        first = await busy(batcher)
        waiting = [asyncio.create_task(batcher.infer(ones(1))) for _ in range(3)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(batcher.close(DEADLINE_S))
        await asyncio.sleep(0.02)
        with pytest.raises(InferenceError, match="stopping") as caught:
            await batcher.infer(ones(1))
        assert caught.value.fault is Fault.STOPPING
        gate.open.set()
        await asyncio.gather(first, *waiting, closing)
        assert len(gate.sizes) == 4

    within(run())


def test_closing_ends_although_the_model_does_not() -> None:
    async def run() -> None:
        batcher, gate = await gated(Batching(largest=1))
        tasks = [await busy(batcher), asyncio.create_task(batcher.infer(ones(1)))]
        await asyncio.sleep(0)
        await batcher.close(0.05)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [getattr(answer, "fault", None) for answer in answers] == [Fault.STOPPING] * 2
        gate.open.set()

    within(run())


def test_whatever_fails_is_answered_and_the_next_ones_are_computed(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        batcher, gate = await gated(Batching(delay_s=0.05))
        gate.open.set()
        gate.fails = MemoryError()
        for count in (1, 2):
            asked = [batcher.infer(ones(1)) for _ in range(count)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            assert [getattr(answer, "fault", None) for answer in answers] == [Fault.FAILED] * count
        gate.fails = None
        assert (await batcher.infer(ones(1)))["output"].shape == (1, 2)
        await batcher.close(DEADLINE_S)

    within(run())
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [MemoryError] * 3


@pytest.mark.parametrize("odd", [np.float32(1), np.zeros((1, 2), np.float32)])
def test_who_cannot_be_answered_together_is_answered_alone(odd: np.ndarray) -> None:
    """A model that says to be batched, and gives one output for all that are in a batch."""

    class Odd(Gate):
        def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"output": np.asarray(odd)} if len(inputs["input"]) > 1 else super().run(inputs)

    async def run() -> None:
        gate = Odd(load_model(linear()))
        gate.open.set()
        batcher = Batcher(gate, Batching(delay_s=0.05))  # type: ignore[arg-type]
        answers = await asyncio.gather(*(batcher.infer(ones(1)) for _ in range(3)))
        assert [answer["output"].tolist() for answer in answers] == [(ones(1)["input"] @ WEIGHTS).tolist()] * 3
        assert gate.sizes == [1, 1, 1]
        await batcher.close(DEADLINE_S)

    within(run())


def test_bytes_that_wait_are_bounded_besides_their_number() -> None:
    async def run() -> None:
        batcher, gate = await gated(Batching(queue_bytes=160))
        first = await busy(batcher)  # 16 bytes
        more = [asyncio.create_task(batcher.infer(ones(4)))]  # 64
        await asyncio.sleep(0)
        with pytest.raises(InferenceError, match="requests of 80 bytes wait already") as caught:
            await batcher.infer(ones(4), beside=17)
        assert caught.value.fault is Fault.BUSY
        more.append(asyncio.create_task(batcher.infer(ones(4), beside=16)))
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(first, *more)
        assert (await batcher.infer(ones(11)))["output"].shape == (11, 2), "one alone may hold more"
        await batcher.close(DEADLINE_S)

    within(run())


def test_who_has_gone_leaves_the_place_to_others() -> None:
    async def run() -> None:
        batcher, gate = await gated(Batching(queue=2))
        first = await busy(batcher)
        gone = [asyncio.create_task(batcher.infer(ones(1))) for _ in range(2)]
        await asyncio.sleep(0)
        for each in gone:
            each.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        await asyncio.sleep(0)
        others = [asyncio.create_task(batcher.infer(ones(1))) for _ in range(2)]
        await asyncio.sleep(0)
        gate.open.set()
        await asyncio.gather(first, *others)
        assert gate.sizes == [1, 2]
        await batcher.close(DEADLINE_S)

    within(run())
