"""The server process around the service: its port, TLS, metrics, and an end that finishes what waits."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from propolis.link.address import Address
from propolis.link.certificates import Tls, fault_of, load_tls, not_for_a_server
from propolis.link.health import Health
from propolis.link.options import listen
from propolis.secure.errors import UsageError
from propolis.serving.batching import Batcher, Batching
from propolis.serving.metrics import Metrics, MetricsServer
from propolis.serving.model import Model
from propolis.serving.refresh import Refresh
from propolis.serving.service import SERVICE, Admit, InferenceService

DRAIN_S = 30.0
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_OTHER_CALLS = 64  # that may be under way beside those that wait for a model
_CONNECTIONS_FOR_ALL = 4  # that it takes to have all calls under way
_MOST_CONNECTIONS = 512
_AGE_S, _AGE_GRACE_S = 600, 120
_PING_S, _PING_TIMEOUT_S = 30, 20
_log = logging.getLogger("propolis.serving")


@dataclass(frozen=True, slots=True)
class ServingOptions:
    """How a server listens and computes.

    Attributes:
        listen: address of the service; port 0 takes a free one.
        metrics: address of ``/metrics``; None for none.
        batching: of every model.
        largest_message: bytes of a request, and of an answer.
        require_certificate: with TLS: answer only who shows a certificate of the same authority.
        drain_s: how long an end waits for requests under way.
    """

    listen: Address
    metrics: Address | None = None
    batching: Batching = field(default_factory=Batching)
    largest_message: int = 4 * 2**20
    require_certificate: bool = False
    drain_s: float = DRAIN_S


class InferenceServer:
    """Serves models in the running event loop, from `start` to `stop`.

    Args:
        options: how.
        tls: certificate and key that it shows; None for no TLS.
        admit: asked about the certificate of every caller; None answers whoever can connect.
    """

    def __init__(self, options: ServingOptions, tls: Tls | None = None, admit: Admit | None = None) -> None:
        self._options, self._tls = options, tls
        self._service = InferenceService(admit)
        self._metrics = Metrics()
        self._metrics_server: MetricsServer | None = None
        self._health = Health()
        self._server: grpc.aio.Server | None = None
        self.port = self.metrics_port = 0

    async def start(self, models: Sequence[Model]) -> None:
        """Listen, and serve these models.

        Raises:
            UsageError: two have one name, an address cannot be listened on, or TLS is not as it must be.
        """
        if len({model.name for model in models}) != len(models):
            raise UsageError("two models have one name: give each its own")
        for model in models:
            await self.install(model)
        if self._options.metrics is not None:
            self._metrics_server = MetricsServer(self._metrics, self._options.metrics)
            self.metrics_port = self._metrics_server.port
        self._server = self._listening(len(models))
        await self._server.start()
        self._service.is_ready = True
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        _log.info("serving", extra={"port": self.port, "metrics_port": self.metrics_port or None})

    async def install(self, model: Model) -> None:
        """Serve a model; one of the same name answers what it was asked already, and is forgotten."""
        batcher = Batcher(model, self._options.batching)
        self._metrics.add(batcher.metrics)
        before = self._service.put(batcher)
        _log.info("model ready", extra={"model": model.name, "version": model.version})
        if before is not None:
            await before.close(self._options.drain_s)
            self._metrics.remove(before.metrics)

    async def stop(self) -> None:
        """Refuse new requests, finish those under way within `drain_s`, and end."""
        self._service.is_ready = False
        await self._health.enter_graceful_shutdown()
        drained = self._service.close(self._options.drain_s)  # at once: those under way may wait for a batch to fill
        await (asyncio.gather(self._server.stop(self._options.drain_s), drained) if self._server else drained)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.close)

    def _listening(self, models: int) -> grpc.aio.Server:
        batching = self._options.batching
        calls = max(1, models) * (batching.queue + batching.largest) + _OTHER_CALLS
        server = grpc.aio.server(
            options=_grpc_options(self._options.largest_message, calls), maximum_concurrent_rpcs=calls
        )
        server.add_generic_rpc_handlers((self._service.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        self.port = self._bind(server)
        return server

    def _bind(self, server: grpc.aio.Server) -> int:
        address, tls = self._options.listen, self._tls
        if tls is None:
            if not is_loopback(address):
                _log.warning("inputs and outputs are not encrypted: --tls does it", extra={"listen": str(address)})
            return listen(server, str(address))
        credentials = grpc.ssl_server_credentials(
            [(tls.private_key, tls.certificate)], tls.authority, self._options.require_certificate
        )
        return listen(server, str(address), credentials)


def _grpc_options(largest_message: int, calls: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", largest_message),
        ("grpc.max_send_message_length", largest_message),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # gRPC would inflate a message before it measures it
        ("grpc.so_reuseport", 0),  # a port in use is an error
        ("grpc.server_handshake_timeout_ms", 10_000),
        # A call counts from its first byte, whether its message comes or not: no connection may have all of them, and
        # none lives for ever. A client connects again by itself, and goes on meanwhile.
        ("grpc.max_concurrent_streams", max(1, calls // _CONNECTIONS_FOR_ALL)),
        # Or gRPC refuses, at random, a caller that has as many under way as it may and begins one as another ends.
        ("grpc.http.overload_protection", 0),
        ("grpc.max_allowed_incoming_connections", _MOST_CONNECTIONS),
        ("grpc.max_connection_age_ms", _AGE_S * 1000),
        ("grpc.max_connection_age_grace_ms", _AGE_GRACE_S * 1000),
        ("grpc.keepalive_time_ms", _PING_S * 1000),  # who is gone without a word
        ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_S * 1000),
    ]


def is_loopback(address: Address) -> bool:
    """Whether only this machine reaches it."""
    return address.host in _LOOPBACK


def load_server_tls(folder: Path, passphrase: bytes | None = None) -> Tls:
    """The certificate and key in a folder, as `propolis.link.certificates.load_tls` reads them, and still valid.

    Raises:
        UsageError: one is missing, damaged, expired or a device's, or others may read the key.
    """
    tls = load_tls(folder, passphrase)
    if (fault := fault_of(tls, time.time()) or not_for_a_server(tls)) is not None:
        raise UsageError(f"{folder}: {fault}")
    return tls


async def serve(
    models: Sequence[Model], options: ServingOptions, tls: Tls | None = None, refresh: Refresh | None = None
) -> None:
    """Serve these models until the process gets SIGTERM or SIGINT; see `serving` for the arguments."""
    stopped = asyncio.Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(sign, stopped.set)
    async with serving(models, options, tls, refresh):
        await stopped.wait()
        _log.info("stopping: what waits is finished")


@asynccontextmanager
async def serving(
    models: Sequence[Model],
    options: ServingOptions,
    tls: Tls | None = None,
    refresh: Refresh | None = None,
    admit: Admit | None = None,
) -> AsyncIterator[InferenceServer]:
    """A server that answers meanwhile.

    Args:
        models: to begin with.
        options: how.
        tls: certificate and key that it shows; None for no TLS.
        refresh: where models come from that are served in place of these; None for nowhere.
        admit: asked about every caller; see `InferenceServer`.

    Raises:
        UsageError: as `InferenceServer.start` does.
    """
    server, refreshing = InferenceServer(options, tls, admit), None
    try:
        await server.start(models)
        if refresh is not None:
            refreshing = asyncio.create_task(refresh.keep(server.install))
        yield server
    finally:
        if refreshing is not None:
            refreshing.cancel()
        await server.stop()
