"""`LocalGrid`: a Flower Grid whose devices live in this process, or in a few processes beside it."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Future, ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context, parent_process
from typing import Self

from flwr.app import Context, Message, RecordDict
from flwr.app.user_config import UserConfigValue
from flwr.clientapp import ClientApp

from propolis.flower import (
    failed_reply,
    message_from_bytes,
    message_to_bytes,
    serialized,
    set_message_id,
    unavailable_reply,
)
from propolis.server.exchange import OwnGrid

LoadApp = Callable[[], ClientApp]

_START_DEADLINE_S = 20.0


class LocalGrid(OwnGrid):
    """Simulated devices behind Flower's Grid interface.

    Every message is serialised on its way to a device and back, so a device shares no memory with the server or
    with another device. A device works when its reply is pulled, so a consumer that folds replies as it pulls
    them holds one at a time. Use it as a context manager where `workers` is not zero.

    Args:
        load_app: makes the ClientApp; called once in each process that runs devices. It must be picklable for
            workers.
        clients: number of devices; node ids are 1..clients, ``partition-id`` is the node id less one.
        workers: processes that run the devices, device i always in process i mod workers; 0 runs them in this one.
        run_id: of the run that the messages belong to.
    """

    def __init__(self, load_app: LoadApp, clients: int, *, workers: int = 0, run_id: int = 1) -> None:
        super().__init__(run_id)
        self._clients = clients
        self._pending: dict[str, tuple[float, Message]] = {}  # when its time is over, and the message
        self._runner = _Pool(load_app, clients, min(workers, clients)) if workers else _Inline(load_app, clients)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        self._runner.close()

    def get_node_ids(self) -> Iterable[int]:
        """1..clients: simulated devices are always connected."""
        return range(1, self._clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See `Grid.push_messages`."""
        now = time.monotonic()
        self._pending = {key: entry for key, entry in self._pending.items() if entry[0] > now}
        ids = []
        for message in messages:
            message_id = uuid.uuid4().hex
            set_message_id(message, message_id)
            self._pending[message_id] = (now + message.metadata.ttl, message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Run the devices that these messages went to, in order, and yield each reply when it is there."""
        outgoing = [self._pending.pop(message_id)[1] for message_id in message_ids if message_id in self._pending]
        yield from self._runner.replies(outgoing)


class _Devices:
    """The devices of one process: one ClientApp, one Flower context per device."""

    def __init__(self, load_app: LoadApp, clients: int) -> None:
        self._app = load_app()
        self._clients = clients
        self._contexts: dict[int, Context] = {}

    def answer(self, request: bytes) -> bytes:
        """One serialised message in, its reply out; what the ClientApp raises becomes an error reply."""
        message = message_from_bytes(request)
        try:
            reply = self._app(message, self._context(message))
        except Exception as error:
            reply = failed_reply(message, f"{type(error).__name__}: {error}")
        set_message_id(reply, uuid.uuid4().hex)
        return message_to_bytes(reply)

    def _context(self, message: Message) -> Context:
        node_id = message.metadata.dst_node_id
        if node_id not in self._contexts:
            node_config: dict[str, UserConfigValue] = {"partition-id": node_id - 1, "num-partitions": self._clients}
            self._contexts[node_id] = Context(message.metadata.run_id, node_id, node_config, RecordDict(), {})
        return self._contexts[node_id]


class _Inline:
    """Devices in this process."""

    def __init__(self, load_app: LoadApp, clients: int) -> None:
        self._load = partial(_Devices, load_app, clients)
        self._devices: _Devices | None = None

    def replies(self, messages: Iterable[Message]) -> Iterator[Message]:
        self._devices = self._devices or self._load()
        for parts in serialized(messages):
            yield message_from_bytes(self._devices.answer(b"".join(parts)))

    def close(self) -> None:
        self._devices = None


class _Pool:
    """Devices in worker processes: device i always meets worker i mod workers."""

    def __init__(self, load_app: LoadApp, clients: int, workers: int) -> None:
        self._workers = [_Worker(load_app, clients) for _ in range(workers)]

    def replies(self, messages: Iterable[Message]) -> Iterator[Message]:
        outgoing = list(messages)
        began = time.monotonic()
        running = []
        for message, parts in zip(outgoing, serialized(outgoing), strict=True):
            worker = self._workers[(message.metadata.dst_node_id - 1) % len(self._workers)]
            running.append((message, worker, worker.submit(b"".join(parts))))
        for message, worker, future in running:
            left = began + message.metadata.ttl - time.monotonic()
            try:
                yield message_from_bytes(future.result(timeout=max(0.0, left)))
            except (BrokenExecutor, CancelledError):
                worker.restart(future)
                yield unavailable_reply(message, "the worker process of this device died")
            except TimeoutError:
                worker.restart(future)
                yield unavailable_reply(message, "the device did not answer in time; its worker was ended")

    def close(self) -> None:
        for worker in self._workers:
            worker.end()


class _Worker:
    """One process with its devices; a new one takes its place when it dies or hangs."""

    def __init__(self, load_app: LoadApp, clients: int) -> None:
        self._start = partial(ProcessPoolExecutor, 1, get_context("forkserver"), _start_worker, (load_app, clients))
        self._executor = self._start()
        self._pid: Future[int] | None = None
        self._futures: set[Future[bytes]] = set()

    def submit(self, request: bytes) -> Future[bytes]:
        try:
            self._pid = self._pid or self._executor.submit(os.getpid)
            future = self._executor.submit(_answer_in_worker, request)
        except BrokenExecutor as error:  # it died earlier: the same outcome, found sooner
            future = Future()
            future.set_exception(error)
        self._futures = {other for other in self._futures if not other.done()} | {future}
        return future

    def restart(self, failed: Future[bytes]) -> None:
        """Replace the process, once for all the messages that it left unanswered."""
        if failed in self._futures:
            self.end()
            self._executor, self._pid, self._futures = self._start(), None, set()

    def end(self) -> None:
        """End the process, busy or not: it holds nothing that anybody needs."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        with suppress(BrokenExecutor, CancelledError, TimeoutError, ProcessLookupError):
            if self._pid is not None:
                os.kill(self._pid.result(timeout=_START_DEADLINE_S), signal.SIGKILL)


# A worker process serves one grid for its whole life; the executor gives its tasks no other place for state.
_worker_devices: _Devices | None = None


def _start_worker(load_app: LoadApp, clients: int) -> None:
    global _worker_devices
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us in order
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_devices = _Devices(load_app, clients)


def _end_with_parent() -> None:
    """End this process when the one that it works for is gone: nobody else would."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _answer_in_worker(request: bytes) -> bytes:
    if _worker_devices is None:
        raise RuntimeError("the worker was not started")
    return _worker_devices.answer(request)
