"""The command ``propolis serve``: models of files and of a registry. What is heavy loads inside of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from propolis.secure.errors import UsageError
from propolis.server.models_cli import RegistryFlag, open_named
from propolis.serving.cli import (
    LISTEN,
    METRICS,
    LargestMessageFlag,
    ListenFlag,
    LogFormatFlag,
    MaxBatchFlag,
    MaxDelayFlag,
    MetricsFlag,
    QueueFlag,
    RequireCertificateFlag,
    ServingFlags,
    ThreadsFlag,
    TlsFlag,
    TlsPassphraseFlag,
    load_files,
    name_and_file,
    require_number,
)

if TYPE_CHECKING:
    from propolis.server.serve import RegistryModels

_REFRESH_S = 10.0


def serve_command(
    models: Annotated[
        list[str],
        typer.Option(
            "--model",
            metavar="NAME=FILE|NAME[@VERSION]",
            help="A name and its ONNX file, or a model of --registry, at its champion, another alias or a number; "
            "may be repeated.",
        ),
    ],
    registry: RegistryFlag = None,
    prefer_int8: Annotated[
        bool | None,
        typer.Option("--prefer-int8/--prefer-float32", help="Of --registry: which file, where a version has both."),
    ] = None,
    refresh: Annotated[
        float | None,
        typer.Option(
            "--refresh",
            help=f"Of --registry: seconds between looks for another version, 0 for none; {_REFRESH_S:g} by default.",
            min=0,
            max=86_400,
        ),
    ] = None,
    listen: ListenFlag = LISTEN,
    metrics: MetricsFlag = METRICS,
    max_batch: MaxBatchFlag = 32,
    max_delay_ms: MaxDelayFlag = 0,
    queue: QueueFlag = 256,
    threads: ThreadsFlag = 1,
    largest_message: LargestMessageFlag = 4,
    tls: TlsFlag = None,
    require_certificate: RequireCertificateFlag = False,
    passphrase_file: TlsPassphraseFlag = None,
    log_format: LogFormatFlag = "text",
) -> None:
    """Answer requests for inference (Open Inference Protocol v2, as Triton and KServe), until SIGTERM or Ctrl-C."""
    flags = ServingFlags(
        listen, metrics, max_batch, max_delay_ms, queue, largest_message, tls, require_certificate, passphrase_file
    )
    named = [name_and_file(text) for text in models if "=" in text]
    others = [text for text in models if "=" not in text]
    if others and not registry:
        raise UsageError(f"--model '{others[0]}': expected NAME=FILE.onnx, or --registry too")
    every_s = _REFRESH_S if refresh is None else refresh
    require_number("--refresh", every_s)
    for flag, value in (("--prefer-int8", prefer_int8), ("--refresh", refresh)):
        if value is not None and not others:
            raise UsageError(f"{flag} is for models of --registry: give --model NAME too")
    flags.begin(log_format)
    kept = _of_registry(registry, others, bool(prefer_int8), threads) if others else None
    served = [*load_files(named, threads), *(kept.load() if kept else ())]

    from propolis.serving.refresh import Refresh

    flags.run(served, Refresh(kept.newer, every_s) if kept and every_s else None)


def _of_registry(registry: str | None, names: Sequence[str], prefers_int8: bool, threads: int) -> RegistryModels:
    opened = open_named(registry)

    from propolis.server.serve import RegistryModels, Wanted

    return RegistryModels(opened, [Wanted.parse(name) for name in names], prefers_int8, threads)
