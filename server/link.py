"""The server's end of the link: a thread with gRPC, one long stream per device, mutual TLS."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc
from flwr.app.user_config import UserConfigValue
from grpc_health.v1 import health_pb2, health_pb2_grpc

from propolis.link.certificates import Tls
from propolis.link.frames import Farewell, Reason, Welcome, decode_frame, encode_frame, farewell
from propolis.link.health import Health
from propolis.link.options import METHOD, SERVER_OPTIONS, SERVICE, listen
from propolis.secure.errors import PeerError, UsageError
from propolis.server.delivery import Delivery
from propolis.server.enroll import Enrolment, make_enrolment_server
from propolis.server.membership import Membership
from propolis.server.post import Post
from propolis.server.streams import Streams

_START_S = 30.0
_SWEEP_S = 0.25
_log = logging.getLogger("propolis.link")


@dataclass(frozen=True, slots=True)
class LinkOptions:
    """How a link listens, and what it tells the devices.

    Attributes:
        listen: HOST:PORT for the devices' streams; port 0 takes a free one.
        run_id: of the run.
        run_config: Flower's run configuration.
        beat_seconds: each side is heard at least this often; three missed beats end a stream.
        largest_message: bytes of a reply.
        enroll: HOST:PORT for enrolment; None enrols nobody.
    """

    listen: str
    run_id: int
    run_config: Mapping[str, UserConfigValue]
    beat_seconds: int = 10
    largest_message: int = 4 * 2**30
    enroll: str | None = None


class LinkServer:
    """Accepts the devices of a federation, and moves what is in a `Post` to and from them.

    Use it as a context manager; its own thread runs meanwhile.

    Args:
        options: addresses and what the devices are told.
        tls: the server's certificate and key, and the authority that devices' certificates must be of.
        membership: who may connect; looked at again several times a second.
        post: the requests and replies.
        enrolment: answers newcomers, where `options` names an address for it.
        delivery: gives devices the models that are released.

    Raises:
        UsageError: on entering: an address cannot be listened on.
    """

    def __init__(
        self,
        options: LinkOptions,
        tls: Tls,
        membership: Membership,
        post: Post,
        enrolment: Enrolment | None = None,
        delivery: Delivery | None = None,
    ) -> None:
        self._options, self._tls, self._post = options, tls, post
        self._enrolment, self._delivery = enrolment, delivery
        self._streams = Streams(_welcome(options, post), membership, post)
        self._loop = asyncio.new_event_loop()
        self._stop: asyncio.Future[Farewell] = self._loop.create_future()
        self._thread = threading.Thread(target=self._work, name="propolis-link", daemon=True)
        self._started = threading.Event()
        self._error: BaseException | None = None
        self.port = self.enroll_port = 0

    def __enter__(self) -> Self:
        _raise_file_limit()
        self._thread.start()
        if not self._started.wait(_START_S):
            raise UsageError(f"the link did not start within {_START_S:g} s")
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        over = kind is None
        reason = farewell(Reason.RUN_OVER, "the run is complete") if over else farewell(Reason.SHUTDOWN, "")
        self.stop(reason)

    def stop(self, frame: Farewell) -> None:
        """Say farewell to every device and end the thread."""

        def resolve() -> None:
            if not self._stop.done():
                self._stop.set_result(frame)

        with suppress(RuntimeError):  # the loop has ended by itself
            self._loop.call_soon_threadsafe(resolve)
        self._thread.join(_START_S)

    @property
    def is_up(self) -> bool:
        """Whether devices can connect."""
        return self._thread.is_alive()

    def wait_for_devices(self, count: int, seconds: float) -> int:
        """Wait until so many devices are connected, or the time is over; how many are."""
        return self._post.wait_for_nodes(count, time.monotonic() + seconds)

    def wake(self, node_ids: Iterable[int]) -> None:
        """There is something to send to these devices; called from any thread."""
        with suppress(RuntimeError):  # nobody is there any more: the requests expire
            self._loop.call_soon_threadsafe(self._streams.wake, node_ids)

    def _work(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:
            self._error = error
            self._post.died(error)
            if self._started.is_set():
                _log.exception("the link has failed")
        finally:
            self._started.set()
            self._loop.run_until_complete(_end_tasks())
            self._loop.close()

    async def _serve(self) -> None:
        server = grpc.aio.server(options=SERVER_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._streams.connect)  # without a serialiser frames are bytes
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler}),))
        if self._delivery is not None:
            server.add_generic_rpc_handlers((self._delivery.handlers(),))
        status = Health()
        health_pb2_grpc.add_HealthServicer_to_server(status, server)
        credentials = grpc.ssl_server_credentials(
            [(self._tls.private_key, self._tls.certificate)], self._tls.authority, require_client_auth=True
        )
        self.port = listen(server, self._options.listen, credentials)
        servers = [server]
        if self._enrolment is not None and self._options.enroll:
            enroller, self.enroll_port = make_enrolment_server(self._enrolment, self._options.enroll, self._tls)
            servers.append(enroller)
        for each in servers:
            await each.start()
        for service in ("", SERVICE):
            await status.set(service, health_pb2.HealthCheckResponse.SERVING)
        self._started.set()
        sweeper = asyncio.create_task(self._sweep())
        try:
            await asyncio.wait((sweeper, self._stop), return_when=asyncio.FIRST_COMPLETED)
            if sweeper.done():
                sweeper.result()
        finally:
            await status.enter_graceful_shutdown()
            await self._streams.end_all(self._stop.result() if self._stop.done() else farewell(Reason.SHUTDOWN, ""))
            sweeper.cancel()
            for each in servers:
                await each.stop(grace=0.2)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                self._streams.sweep()
                if self._delivery is not None and self._delivery.refresh():
                    self._streams.tell_news()
            except OSError:  # a full disk, or no file left to open: it may pass
                _log.exception("cannot look after the streams")


def _welcome(options: LinkOptions, post: Post) -> Welcome:
    config = json.dumps(dict(options.run_config)).encode()
    welcome = Welcome(post.process, options.beat_seconds, options.largest_message, options.run_id, config, ())
    try:
        decode_frame(encode_frame(welcome))
    except PeerError as error:
        raise UsageError(f"devices would refuse the run's configuration: {error}") from None
    return welcome


async def _end_tasks() -> None:
    """Calls that were still answered when the server stopped: a loop that closes over them complains."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
    await asyncio.get_running_loop().shutdown_default_executor()


def _raise_file_limit() -> None:
    """A thousand devices are a thousand open files: take as many as this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
