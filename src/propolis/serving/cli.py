"""The commands that run models, in the cloud and on a device. What is heavy loads inside of them."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from propolis.secure.errors import UsageError

if TYPE_CHECKING:
    from propolis.serving.model import Model
    from propolis.serving.refresh import Refresh
    from propolis.serving.server import ServingOptions

LISTEN, METRICS = "127.0.0.1:8001", "127.0.0.1:8002"
_LARGEST_MB = 1024
_NOWHERE = "none"

ListenFlag = Annotated[str, typer.Option("--listen", metavar="HOST:PORT", help="Where callers connect (gRPC).")]
MetricsFlag = Annotated[
    str, typer.Option("--metrics", metavar="HOST:PORT", help="Where Prometheus reads /metrics (HTTP), or none.")
]
MaxBatchFlag = Annotated[
    int, typer.Option("--max-batch", help="Examples that are computed at once, and at most in a request.", min=1)
]
MaxDelayFlag = Annotated[
    float, typer.Option("--max-delay-ms", help="Milliseconds to wait for a batch to fill.", min=0, max=60_000)
]
QueueFlag = Annotated[int, typer.Option("--queue", help="Requests that may wait for a model; more are refused.", min=1)]
ThreadsFlag = Annotated[int, typer.Option("--threads", help="Threads that each model computes with.", min=1, max=1024)]
LargestMessageFlag = Annotated[
    int, typer.Option("--largest-message", help="Largest request and answer, in MiB.", min=1, max=_LARGEST_MB)
]
TlsFlag = Annotated[Path | None, typer.Option("--tls", metavar="DIR", help="Folder with tls.key, tls.pem and ca.pem.")]
RequireCertificateFlag = Annotated[
    bool, typer.Option("--require-certificate", help="With --tls: callers show one of the same authority.")
]
TlsPassphraseFlag = Annotated[
    Path | None, typer.Option("--passphrase-file", help="With --tls: file with the passphrase of the key.")
]
LogFormatFlag = Annotated[
    str, typer.Option("--log-format", help="How the log is written to standard error: text or json.")
]


@dataclass(frozen=True, slots=True)
class ServingFlags:
    """What the flags say that commands share which serve; the attributes are called as those are."""

    listen: str
    metrics: str
    max_batch: int
    max_delay_ms: float
    queue: int
    largest_message: int
    tls: Path | None
    require_certificate: bool
    passphrase_file: Path | None

    def __post_init__(self) -> None:
        if self.require_certificate and self.tls is None:
            raise UsageError("--require-certificate is for TLS: give --tls too")
        if self.passphrase_file is not None and self.tls is None:
            raise UsageError("--passphrase-file is for the key in --tls: give --tls too")
        require_number("--max-delay-ms", self.max_delay_ms)

    def begin(self, log_format: str) -> None:
        """Log in this format, before the seconds that loading takes; raises UsageError."""
        from propolis.logs import configure_logging

        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its log would stand beside our own
        configure_logging(log_format)  # type: ignore[arg-type]  # which it checks

    def run(self, models: Sequence[Model], refresh: Refresh | None = None) -> None:
        """Serve until the process gets SIGTERM or SIGINT; raises UsageError where a flag's value is not usable."""
        import asyncio

        from propolis.link.keys import passphrase_of
        from propolis.serving.server import load_server_tls, serve

        shown = load_server_tls(self.tls, passphrase_of(self.passphrase_file)) if self.tls else None
        asyncio.run(serve(models, self._options(), shown, refresh))

    def _options(self) -> ServingOptions:
        from propolis.link.address import Address
        from propolis.serving.batching import Batching
        from propolis.serving.server import ServingOptions

        largest = self.largest_message * 2**20
        held = max(Batching().queue_bytes, 4 * largest)
        return ServingOptions(
            Address.parse(self.listen),
            None if self.metrics == _NOWHERE else Address.parse(self.metrics),
            Batching(self.max_batch, self.max_delay_ms / 1000, self.queue, held),
            largest,
            self.require_certificate,
        )


def require_number(flag: str, value: float) -> None:
    """Raise UsageError for what is no number, which no bound of a flag keeps out."""
    if math.isnan(value):
        raise UsageError(f"{flag} {value}: expected a number")


def name_and_file(text: str) -> tuple[str, Path]:
    """NAME=FILE in its two parts; raises UsageError."""
    name, found, file = text.partition("=")
    if not name or not found or not file:
        raise UsageError(f"--model '{text}': expected NAME=FILE.onnx")
    return name, Path(file)


def load_files(named: Sequence[tuple[str, Path]], threads: int) -> list[Model]:
    """The models in these files under these names; raises UsageError."""
    from propolis.serving.model import load_model_file

    return [load_model_file(file, name, threads=threads) for name, file in named]
