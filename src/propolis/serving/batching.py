"""Dynamic batching: requests that wait at the same time are computed together.

One worker per model takes what waits, in order, up to the largest batch. While it computes, others gather, so batches
grow with the load and a lone caller waits for nobody, unless a delay says how long a batch may be waited for.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from propolis.serving.faults import Fault, InferenceError
from propolis.serving.metrics import ModelMetrics
from propolis.serving.model import Model
from propolis.worker import Worker

Arrays = Mapping[str, np.ndarray]
_Answer = dict[str, np.ndarray] | InferenceError
_STOP_S = 2.0
_log = logging.getLogger("propolis.serving")


@dataclass(frozen=True, slots=True)
class Batching:
    """How requests become batches.

    Attributes:
        largest: examples that are computed at once, and the most that one request may have.
        delay_s: how long the oldest request may wait for a batch to become full.
        queue: requests that may wait; more are refused.
        queue_bytes: that requests may hold until they are answered; one alone may hold more.
    """

    largest: int = 32
    delay_s: float = 0.0
    queue: int = 256
    queue_bytes: int = 256 * 2**20


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    inputs: Arrays
    size: int
    arrived: float
    deadline: float | None  # as time.monotonic() has it
    answer: asyncio.Future[dict[str, np.ndarray]]

    @property
    def kind(self) -> tuple[tuple[int, ...], ...]:
        """Requests of one kind can be put together: all sizes but the first are equal."""
        return tuple(self.inputs[name].shape[1:] for name in sorted(self.inputs))


@dataclass(frozen=True, slots=True)
class _Computed:
    answers: list[_Answer]
    runs: int  # of the model that gave answers
    seconds: tuple[float, float, float]  # making the batch, running the model, taking it apart


class Batcher:
    """A model with its queue and its worker; belongs to the event loop that it is made in.

    Args:
        model: that computes.
        batching: how.
    """

    def __init__(self, model: Model, batching: Batching) -> None:
        self.model = model
        self.metrics = ModelMetrics(model.name, model.version, lambda: len(self._waiting))
        self._batching = batching
        self._waiting: deque[_Request] = deque()
        self._arrived = asyncio.Event()
        self._held = 0  # bytes of the requests without an answer
        self._is_closing = False
        self._thread = Worker("propolis-model")
        self._worker = asyncio.get_running_loop().create_task(self._work())

    async def infer(self, inputs: Arrays, deadline: float | None = None, beside: int = 0) -> dict[str, np.ndarray]:
        """The model's outputs for one request.

        Args:
            inputs: arrays by name.
            deadline: as `time.monotonic` has it; a request that has waited until then is not computed.
            beside: bytes that the caller keeps for it besides the inputs.

        Raises:
            InferenceError: the inputs do not fit the model, too many requests wait, the deadline passed, the batcher
                closes, or the model fails.
        """
        arrived = time.monotonic()
        try:
            outputs = await self._enqueue(inputs, arrived, deadline, beside)
        except InferenceError as error:
            self.metrics.count_failure(error.fault)
            raise
        except asyncio.CancelledError:
            self.metrics.count_failure(None)
            raise
        self.metrics.count("request_success")
        self.metrics.count_time("request", time.monotonic() - arrived)
        return outputs

    def _enqueue(
        self, inputs: Arrays, arrived: float, deadline: float | None, beside: int
    ) -> asyncio.Future[dict[str, np.ndarray]]:
        size, largest = self.model.require(inputs), self._batching.largest
        if size > largest:
            raise InferenceError(Fault.INVALID, f"{size} examples: expected at most {largest} in a request")
        if self._is_closing:
            raise InferenceError(Fault.STOPPING, "the server is stopping")
        if len(self._waiting) >= self._batching.queue:
            raise InferenceError(Fault.BUSY, f"{len(self._waiting)} requests wait already: try again later")
        held = beside + sum(array.nbytes for array in inputs.values())
        if self._held and self._held + held > self._batching.queue_bytes:
            raise InferenceError(Fault.BUSY, f"requests of {self._held} bytes wait already: try again later")
        answer: asyncio.Future[dict[str, np.ndarray]] = asyncio.get_running_loop().create_future()
        request = _Request(inputs, size, arrived, deadline, answer)
        answer.add_done_callback(lambda _: self._forget(request, held))
        self._held += held
        self._waiting.append(request)
        self._arrived.set()
        return answer

    def _forget(self, request: _Request, held: int) -> None:
        """Give the place of a request to others as soon as it has its answer, or its caller is gone."""
        self._held -= held
        if request.answer.cancelled():
            with suppress(ValueError):  # the worker has taken it
                self._waiting.remove(request)

    async def close(self, seconds: float) -> None:
        """Refuse new requests, and finish those that wait, for as long as `seconds`."""
        self._is_closing = True
        self._arrived.set()
        done, _ = await asyncio.wait([self._worker], timeout=seconds)
        if not done:
            self._worker.cancel()
        for request in self._waiting:
            _fail(request, InferenceError(Fault.STOPPING, "the server is stopping"))
        self._waiting.clear()
        self._thread.close()
        if not done:  # a process that ends beside a run is aborted by the runtime
            self.model.stop()
            await self._thread.ended(_STOP_S)
        self.metrics.pending = lambda: 0  # the counts stay, the model need not

    async def _work(self) -> None:
        """Compute batch after batch, until it closes and nobody waits."""
        while await self._wait_for_batch():
            batch = self._take()
            if batch:
                await self._compute(batch)

    async def _wait_for_batch(self) -> bool:
        """Wait until a batch may begin; false when there will be none."""
        while not self._waiting:
            if self._is_closing:
                return False
            self._arrived.clear()
            await self._arrived.wait()
        begins = self._waiting[0].arrived + self._batching.delay_s
        while not self._is_closing and not self._is_full() and (left := begins - time.monotonic()) > 0:
            self._arrived.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left)
        return True

    def _is_full(self) -> bool:
        """Whether those that wait for an answer make up a largest batch; of a model that takes none, one does."""
        waiting = sum(request.size for request in self._waiting if not request.answer.done())
        return waiting >= self._batching.largest or not self.model.is_batched

    def _take(self) -> list[_Request]:
        """The next requests that go together; whoever has gone or is too late is left out."""
        batch: list[_Request] = []
        size = 0
        while self._waiting and (not batch or self._goes_with(batch[0], size, self._waiting[0])):
            request = self._waiting.popleft()
            if request.deadline is not None and time.monotonic() >= request.deadline:
                _fail(request, InferenceError(Fault.EXPIRED, "the deadline passed while the request waited"))
            if not request.answer.done():
                batch.append(request)
                size += request.size
        return batch

    def _goes_with(self, first: _Request, size: int, other: _Request) -> bool:
        fits = self.model.is_batched and size + other.size <= self._batching.largest
        return other.answer.done() or (fits and other.kind == first.kind)

    async def _compute(self, batch: Sequence[_Request]) -> None:
        began = time.monotonic()
        parts = [(request.inputs, request.size) for request in batch]
        try:
            computed = await self._thread.run(compute, self.model, parts)
        except asyncio.CancelledError:
            for request in batch:
                _fail(request, InferenceError(Fault.STOPPING, "the server stopped before the model had ended"))
            raise
        answered = [request for request, answer in zip(batch, computed.answers, strict=True) if _give(request, answer)]
        self.metrics.count("exec_count", computed.runs)
        self.metrics.count("count", sum(request.size for request in answered))
        self.metrics.count_time("queue", sum(began - request.arrived for request in answered))
        for what, seconds in zip(("compute_input", "compute_infer", "compute_output"), computed.seconds, strict=True):
            self.metrics.count_time(what, seconds * len(answered))


def compute(model: Model, parts: Sequence[tuple[Arrays, int]]) -> _Computed:
    """The model's answer to each of these requests, computed together.

    Where that fails, each is computed alone: nobody pays for another caller's inputs.

    Args:
        model: that computes.
        parts: inputs and number of examples of each request.
    """
    try:
        return _compute_together(model, parts)
    except Exception as error:  # whatever it is: the worker goes on, and everybody gets an answer
        return _Computed([_failure(error)], 0, (0, 0, 0)) if len(parts) == 1 else _compute_each(model, parts)


def _compute_together(model: Model, parts: Sequence[tuple[Arrays, int]]) -> _Computed:
    times = [time.perf_counter()]
    joined = parts[0][0] if len(parts) == 1 else _joined(parts)
    times.append(time.perf_counter())
    outputs = model.run(joined)
    times.append(time.perf_counter())
    answers: list[_Answer] = [outputs] if len(parts) == 1 else _split(outputs, [size for _, size in parts])
    times.append(time.perf_counter())
    return _Computed(answers, 1, (times[1] - times[0], times[2] - times[1], times[3] - times[2]))


def _failure(error: Exception) -> InferenceError:
    if isinstance(error, InferenceError):
        return error
    _log.error("a request could not be computed", exc_info=error)
    return InferenceError(Fault.FAILED, f"the server fails on this request: {type(error).__name__}")


def _compute_each(model: Model, parts: Sequence[tuple[Arrays, int]]) -> _Computed:
    alone = [compute(model, [part]) for part in parts]
    runs = sum(computed.runs for computed in alone)
    return _Computed([computed.answers[0] for computed in alone], runs, (0, max(c.seconds[1] for c in alone), 0))


def _joined(parts: Sequence[tuple[Arrays, int]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([inputs[name] for inputs, _ in parts]) for name in parts[0][0]}


def _split(outputs: Arrays, sizes: Sequence[int]) -> list[_Answer]:
    if any(array.ndim == 0 or len(array) != sum(sizes) for array in outputs.values()):
        raise InferenceError(Fault.FAILED, "the model does not give one output for each example")
    ends = np.cumsum(sizes)
    return [
        {name: array[end - size : end] for name, array in outputs.items()}
        for end, size in zip(ends, sizes, strict=True)
    ]


def _give(request: _Request, answer: _Answer) -> bool:
    """Hand an answer to who waits for it; whether it is one, and somebody does."""
    if isinstance(answer, InferenceError):
        _fail(request, answer)
    elif not request.answer.done():
        request.answer.set_result(answer)
        return True
    return False


def _fail(request: _Request, error: InferenceError) -> None:
    if not request.answer.done():
        request.answer.set_exception(error)
