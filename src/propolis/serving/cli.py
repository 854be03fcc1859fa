"""The commands that run models, in the cloud and on a device. What is heavy loads inside of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from propolis.secure.errors import UsageError

if TYPE_CHECKING:
    from propolis.serving.model import Model

_LARGEST_MB = 1024
_NOWHERE = "none"


def serve_command(
    models: Annotated[
        list[str], typer.Option("--model", metavar="NAME=FILE", help="An ONNX file and its name; may be repeated.")
    ],
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Where callers connect (gRPC).")
    ] = "127.0.0.1:8001",
    metrics: Annotated[
        str, typer.Option("--metrics", metavar="HOST:PORT", help="Where Prometheus reads /metrics (HTTP), or none.")
    ] = "127.0.0.1:8002",
    max_batch: Annotated[
        int, typer.Option("--max-batch", help="Examples that are computed at once, and at most in a request.", min=1)
    ] = 32,
    max_delay_ms: Annotated[
        float, typer.Option("--max-delay-ms", help="Milliseconds to wait for a batch to fill.", min=0, max=60_000)
    ] = 0,
    queue: Annotated[
        int, typer.Option("--queue", help="Requests that may wait for a model; more are refused.", min=1)
    ] = 256,
    threads: Annotated[
        int, typer.Option("--threads", help="Threads that each model computes with.", min=1, max=1024)
    ] = 1,
    largest_message: Annotated[
        int, typer.Option("--largest-message", help="Largest request and answer, in MiB.", min=1, max=_LARGEST_MB)
    ] = 4,
    tls: Annotated[
        Path | None, typer.Option("--tls", metavar="DIR", help="Folder with tls.key, tls.pem and ca.pem.")
    ] = None,
    require_certificate: Annotated[
        bool,
        typer.Option("--require-certificate", help="With --tls: callers show one of the same authority."),
    ] = False,
    passphrase_file: Annotated[
        Path | None, typer.Option("--passphrase-file", help="With --tls: file with the passphrase of the key.")
    ] = None,
    log_format: Annotated[
        str, typer.Option("--log-format", help="How the log is written to standard error: text or json.")
    ] = "text",
) -> None:
    """Answer requests for inference (Open Inference Protocol v2, as Triton and KServe), until SIGTERM or Ctrl-C."""
    if require_certificate and tls is None:
        raise UsageError("--require-certificate is for TLS: give --tls too")
    named = [_name_and_file(text) for text in models]

    import asyncio

    from propolis.link.address import Address
    from propolis.link.keys import passphrase_of
    from propolis.logs import configure_logging

    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its log would stand beside our own
    configure_logging(log_format)  # type: ignore[arg-type]  # which it checks
    from propolis.serving.batching import Batching
    from propolis.serving.server import ServingOptions, load_server_tls, serve

    options = ServingOptions(
        Address.parse(listen),
        None if metrics == _NOWHERE else Address.parse(metrics),
        Batching(max_batch, max_delay_ms / 1000, queue),
        largest_message * 2**20,
        require_certificate,
    )
    shown = load_server_tls(tls, passphrase_of(passphrase_file)) if tls else None
    asyncio.run(serve(_load(named, threads), options, shown))


def _name_and_file(text: str) -> tuple[str, Path]:
    name, found, file = text.partition("=")
    if not name or not found or not file:
        raise UsageError(f"--model '{text}': expected NAME=FILE.onnx")
    return name, Path(file)


def _load(named: list[tuple[str, Path]], threads: int) -> list[Model]:
    from propolis.serving.model import load_model_file

    return [load_model_file(file, name, threads=threads) for name, file in named]


def predict_command(
    model: Annotated[Path, typer.Option("--model", metavar="FILE", help="The ONNX file.")],
    inputs: Annotated[
        Path, typer.Option("--input", metavar="FILE", help="Its inputs: .npy, or .json by name or as nested lists.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the outputs there: .npy or .json.")
    ] = None,
    threads: Annotated[int, typer.Option("--threads", help="Threads to compute with.", min=1, max=1024)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Compute a model's outputs for the inputs in a file."""
    from propolis.serving.model import load_model_file
    from propolis.serving.predict import as_lists, predict, require_ending, write_outputs

    if output is not None:
        require_ending(output, "--output")
    outputs = predict(load_model_file(model, threads=threads), inputs)
    if output is not None:
        write_outputs(outputs, output)
    if as_json:
        typer.echo(json.dumps(as_lists(outputs)))
        return
    for name, array in outputs.items():
        typer.echo(f"{name}: {array.dtype} {list(array.shape)}\n{array}")
    if output is not None:
        typer.echo(f"outputs in {output}")
