"""The device's end of the link: one outbound connection that is made again for ever, and an app that stays loaded."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from propolis.client.diagnose import why_unreachable
from propolis.client.jobs import Job, Jobs
from propolis.client.runner import AppRunner, Worker
from propolis.link.certificates import DeviceName, Tls
from propolis.link.frames import (
    PROCESS_BYTES,
    Beat,
    Farewell,
    News,
    Reason,
    Welcome,
    decode_frame,
    encode_frame,
    farewell,
)
from propolis.link.options import DEVICE_OPTIONS, METHOD_PATH, credentials_of
from propolis.link.spool import Spools
from propolis.link.transfers import Body
from propolis.secure.errors import PeerError, PropolisError, Refusal, StorageError
from propolis.secure.wire import FORMAT_VERSION

_WELCOME_S, _FAREWELL_S = 20.0, 1.0
_MISSED_BEATS = 3
_REUNION_S = 30.0
# A connection that lasts as long was a good one; after shorter ones the pauses grow, or a thousand devices that are
# welcomed and lost again would knock all the time.
_STABLE_S = 10.0
# After these there is nothing to try again.
_FINAL = frozenset({Reason.REPLACED, Reason.IDENTITY, Reason.VERSION})
_log = logging.getLogger("propolis.link")


class RefusedByServerError(PropolisError):
    """The server does not take this device, and will not."""


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """How a device connects.

    Attributes:
        server: HOST:PORT.
        once: end with the run.
        patience: with `once`, seconds without a connection after which it is given up.
        longest_pause: seconds between two attempts at most.
        largest_message: bytes of a request.
    """

    server: str
    once: bool = False
    patience: float = 60.0
    longest_pause: float = 30.0
    largest_message: int = 4 * 2**30


class Agent:
    """One device on the link.

    Args:
        options: where the server is, and how long to try.
        tls: the device's certificate and key, and the authority that the server's certificate must be of.
        runner: the app.
        worker: the thread it runs in; the agents of one process may share it.
        spools: where requests go as they arrive.
        news: hears when there may be a model to fetch, within so many seconds.
    """

    def __init__(
        self,
        options: AgentOptions,
        tls: Tls,
        runner: AppRunner,
        worker: Worker,
        spools: Spools,
        news: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._news = news
        self._options, self._tls, self._runner, self._worker = options, tls, runner, worker
        name = DeviceName.of(tls.certificate)
        self._jobs = Jobs(os.urandom(PROCESS_BYTES), name.node_id, options.largest_message, spools)
        self._waker = asyncio.Event()
        self._stopped = asyncio.Event()
        self._heard = time.monotonic()
        self._said = ""
        self.connections = 0

    def stop(self) -> None:
        """End soon; called on the agent's own loop."""
        self._stopped.set()
        self._waker.set()

    async def run(self) -> None:
        """Serve until stopped, or with `once` until a run is over.

        Raises:
            RefusedByServerError: the server will not take this device, or with `once`, could not be reached in time.
        """
        attempt, gone_since = 0, time.monotonic()
        while not self._stopped.is_set():
            welcomed_before, began = self.connections, time.monotonic()
            last = await self._session()
            if self.connections > welcomed_before:
                gone_since = time.monotonic()
            if time.monotonic() - began > _STABLE_S:
                attempt = 0
            if last.reason in _FINAL:
                raise RefusedByServerError(f"the server at {self._options.server} refused this device: {last.detail}")
            if self._options.once and last.reason == Reason.RUN_OVER:
                return
            if self._options.once and time.monotonic() - gone_since > self._options.patience:
                raise RefusedByServerError(f"gave up after {self._options.patience:g} s: {last.detail}")
            pause = min(self._options.longest_pause, 0.25 * 2.0 ** min(attempt, 16)) * random.uniform(0.5, 1.0)  # noqa: S311
            attempt += 1
            self._say(last, pause)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), pause)

    def _say(self, last: Farewell, pause: float) -> None:
        """Why there is no connection: once for each reason in a row."""
        if self._stopped.is_set():
            return
        line = f"{last.name.lower().replace('_', ' ')}: {last.detail}" if last.reason else last.detail
        level = logging.DEBUG if line == self._said else logging.WARNING
        _log.log(level, "not connected: %s; trying again in %.1f s", line, pause)
        self._said = line

    async def _session(self) -> Farewell:
        """One connection from beginning to end; what ended it."""
        credentials = credentials_of(self._tls)
        async with grpc.aio.secure_channel(self._options.server, credentials, options=DEVICE_OPTIONS) as channel:
            call = channel.stream_stream(METHOD_PATH)()
            try:
                return await self._introduce(call)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return await self._end_of(call)
            except TimeoutError:
                return farewell(Reason.UNSPECIFIED, "the server said nothing")
            except (PeerError, StorageError) as error:
                return farewell(Reason.UNSPECIFIED, str(error))
            finally:
                call.cancel()

    async def _end_of(self, call: Any) -> Farewell:
        """Why a connection that nobody said farewell on has ended."""
        try:
            code, detail = await asyncio.wait_for(asyncio.gather(call.code(), call.details()), _FAREWELL_S)
        except TimeoutError:
            code, detail = grpc.StatusCode.UNAVAILABLE, ""
        if code is grpc.StatusCode.OK:
            return farewell(Reason.UNSPECIFIED, "the server closed the connection")
        if code is grpc.StatusCode.UNAVAILABLE:
            address, tls = self._options.server, self._tls
            found = await asyncio.get_running_loop().run_in_executor(None, why_unreachable, address, tls, time.time())
            return farewell(Reason.UNSPECIFIED, found)
        return farewell(Reason.UNSPECIFIED, f"the connection ended: {detail or code.name}")

    async def _introduce(self, call: Any) -> Farewell:
        await call.write(encode_frame(self._jobs.hello(time.time(), FORMAT_VERSION)))
        data = await asyncio.wait_for(call.read(), _WELCOME_S)
        if data is grpc.aio.EOF:
            await call.code()
            raise grpc.aio.AioRpcError(
                await call.code(), grpc.aio.Metadata(), grpc.aio.Metadata(), await call.details()
            )
        match decode_frame(data):
            case Welcome() as welcome:
                self._welcomed(welcome)
            case Farewell() as last:
                return last
            case other:
                raise PeerError(Refusal.PHASE, f"expected a Welcome, got a {type(other).__name__}")
        return await self._converse(call, welcome)

    def _welcomed(self, welcome: Welcome) -> None:
        try:
            config = json.loads(welcome.run_config)
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict) or any(not isinstance(v, (bool, int, float, str)) for v in config.values()):
            raise PeerError(Refusal.MALFORMED, "the run configuration is no table of scalars")
        self._jobs.welcomed(welcome)
        self._worker.submit(partial(self._runner.run_is, welcome.run_id, config))
        self.connections += 1
        self._said = ""
        # Whatever there was while nobody was connected; where all connect again at once, they do not all ask at once.
        self._news(_REUNION_S if self.connections > 1 else 0.0)
        _log.info("connected", extra={"server": self._options.server})

    async def _converse(self, call: Any, welcome: Welcome) -> Farewell:
        self._heard = time.monotonic()
        reader = asyncio.create_task(self._read(call))
        writer = asyncio.create_task(self._write(call, welcome.beat_seconds))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
            if not reader.done():  # our own end; or the connection broke, and the reader knows why
                writer.result()
                return farewell(Reason.UNSPECIFIED, "stopped")
            return reader.result()
        finally:
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(self, call: Any) -> Farewell:
        while (data := await call.read()) is not grpc.aio.EOF:
            self._heard = time.monotonic()
            frame = decode_frame(data)
            if isinstance(frame, Farewell):
                return frame
            if isinstance(frame, News):
                self._news(frame.spread_ms / 1000)
                continue
            self._jobs.receive(frame)
            self._start_jobs()
            self._waker.set()
        return await self._end_of(call)

    async def _write(self, call: Any, beat: float) -> None:
        while not self._stopped.is_set():
            frame = self._jobs.next_frame()
            if frame is None:
                try:
                    await asyncio.wait_for(self._waker.wait(), beat / 2)
                    self._waker.clear()
                    continue
                except TimeoutError:
                    frame = Beat()
                    if time.monotonic() - self._heard > _MISSED_BEATS * beat:
                        raise PeerError(Refusal.PHASE, "the server is silent") from None
            await call.write(encode_frame(frame))
        with suppress(TimeoutError):
            await asyncio.wait_for(call.write(encode_frame(farewell(Reason.SHUTDOWN, ""))), _FAREWELL_S)

    def _start_jobs(self) -> None:
        loop = asyncio.get_running_loop()
        while (job := self._jobs.next_job()) is not None:
            self._worker.submit(partial(self._work, job, loop))

    def _work(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        """In the worker's thread: let the app answer, and hand its reply over."""
        reply = None
        try:
            if not job.is_void and job.request is not None:
                reply = self._runner.answer(job.request.header(), job.request.parts())
        except ValueError as error:
            _log.warning("dropped a request: %s", error)
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._finished, job, reply)

    def _finished(self, job: Job, reply: Body | None) -> None:
        self._jobs.finished(job, reply)
        self._waker.set()
