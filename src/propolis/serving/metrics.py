"""Counts of what a server did, under Triton's names, for Prometheus.

The names are those of Triton's documentation ("Metrics"), without the suffix ``_total`` that newer counters have, so
that dashboards made for Triton work. That is why their type is given as unknown.
"""

from __future__ import annotations

import socket
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from propolis.link.address import Address
from propolis.secure.errors import UsageError
from propolis.serving.faults import Fault

if TYPE_CHECKING:
    from prometheus_client import Metric

_COUNTERS = {
    "nv_inference_request_success": "Requests that were answered",
    "nv_inference_request_failure": "Requests that were not, by reason",
    "nv_inference_count": "Examples that were computed",
    "nv_inference_exec_count": "Runs of the model, each of a batch",
    "nv_inference_request_duration_us": "Time of answered requests, from arrival to answer",
    "nv_inference_queue_duration_us": "Time that answered requests waited",
    "nv_inference_compute_input_duration_us": "Time that making batches of requests took",
    "nv_inference_compute_infer_duration_us": "Time that the model ran, once for each request of a batch",
    "nv_inference_compute_output_duration_us": "Time that taking batches apart took",
}
_PENDING = "nv_inference_pending_request_count"
_REASONS = {
    Fault.BUSY: "REJECTED",
    Fault.STOPPING: "REJECTED",
    Fault.EXPIRED: "CANCELED",
    Fault.FAILED: "BACKEND",
}
_CLOSE_S = 5.0
_MOST_CONNECTIONS = 16

Labels = tuple[tuple[str, str], ...]


class ModelMetrics:
    """The counts of one model's version; another thread may read them while they grow."""

    def __init__(self, name: str, version: str, pending: Callable[[], int] = lambda: 0) -> None:
        self.labels: Labels = (("model", name), ("version", version))
        self.pending = pending
        self.counts: dict[tuple[str, Labels], float] = defaultdict(float)
        for counter in _COUNTERS:
            if counter != "nv_inference_request_failure":
                self.counts[counter, self.labels] = 0

    def count(self, counter: str, value: float = 1) -> None:
        """Add to ``nv_inference_<counter>``."""
        self.counts[f"nv_inference_{counter}", self.labels] += value

    def count_time(self, what: str, seconds: float) -> None:
        """Add to ``nv_inference_<what>_duration_us``."""
        self.count(f"{what}_duration_us", seconds * 1e6)

    def count_failure(self, fault: Fault | None) -> None:
        """A request that was not answered; None where its caller went away."""
        reason = "CANCELED" if fault is None else _REASONS.get(fault, "OTHER")
        self.counts["nv_inference_request_failure", (*self.labels, ("reason", reason))] += 1


class Metrics:
    """All models' counts, as prometheus-client collects them."""

    def __init__(self) -> None:
        self._models: dict[Labels, ModelMetrics] = {}

    def add(self, model: ModelMetrics) -> None:
        """Show the counts of a model; a newer one of the same name and version takes its place."""
        self._models[model.labels] = model

    def remove(self, model: ModelMetrics) -> None:
        """Show the counts of a model no more, unless another one has taken its place."""
        if self._models.get(model.labels) is model:
            del self._models[model.labels]

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client.registry.Collector."""
        from prometheus_client import Metric

        models = list(self._models.values())
        counts = [item for model in models for item in list(model.counts.items())]
        for name, documentation in _COUNTERS.items():
            metric = Metric(name, documentation, "unknown")
            for (counter, labels), value in counts:
                if counter == name:
                    metric.add_sample(name, dict(labels), value)
            yield metric
        pending = Metric(_PENDING, "Requests that wait", "gauge")
        for model in models:
            pending.add_sample(_PENDING, dict(model.labels), model.pending())
        yield pending


class _Server(ThreadingMixIn, WSGIServer):
    """A thread for each connection, a few at once, and none for long."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: Address, limit_s: float) -> None:
        (self.address_family, *_, found), *_ = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        self._limit_s, self._places = limit_s, threading.BoundedSemaphore(_MOST_CONNECTIONS)
        super().__init__((str(found[0]), int(found[1])), _Silent)

    def process_request(self, request: Any, client_address: Any) -> None:
        """In a thread, where there is a place."""
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """See socketserver.ThreadingMixIn."""
        end = threading.Timer(self._limit_s, _hang_up, (request,))
        end.daemon = True
        end.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            end.cancel()
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A caller that is gone, or was hung up on, is no event."""


class _Silent(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Nothing."""


def _hang_up(request: socket.socket) -> None:
    with suppress(OSError):  # it has ended by itself
        request.shutdown(socket.SHUT_RDWR)


class MetricsServer:
    """Answers ``GET /metrics`` over HTTP from threads of its own.

    Args:
        metrics: what to show.
        address: HOST:PORT; port 0 takes a free one.
        limit_s: how long a connection may last.

    Raises:
        UsageError: the address cannot be listened on, or prometheus-client is missing.
    """

    def __init__(self, metrics: Metrics, address: Address, limit_s: float = 10.0) -> None:
        try:
            from prometheus_client import CollectorRegistry, make_wsgi_app
        except ImportError:
            raise UsageError("metrics need prometheus-client: pip install 'propolis[serve]'") from None
        registry = CollectorRegistry()
        registry.register(metrics)
        try:
            self._server = _Server(address, limit_s)
        except OSError as error:
            raise UsageError(f"cannot listen on {address}: {error.strerror or error}") from None
        self._server.set_app(make_wsgi_app(registry))
        self._thread = threading.Thread(target=self._server.serve_forever, name="propolis-metrics", daemon=True)
        self._thread.start()
        self.port: int = self._server.server_port

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_CLOSE_S)
