"""The command ``propolis export``. What is heavy loads inside of it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from propolis.secure.errors import UsageError

FLOAT32_FILE, INT8_FILE = "model.onnx", "model.int8.onnx"
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def export_command(
    task: Annotated[str, typer.Option("--task", help="The task that the model solves: built-in, or MODULE:CLASS.")],
    model: Annotated[Path, typer.Option("--model", metavar="FILE", help="Its weights: a run's model.safetensors.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the ONNX files.")],
    data: Annotated[Path | None, typer.Option("--data", help="Folder with the data, where the task reads one.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Also a model in int8, and what it costs in accuracy.")] = False,
    calibrate: Annotated[
        int, typer.Option("--calibrate", help="With --int8: training examples that set its ranges.", min=1)
    ] = 512,
    seven_bits: Annotated[
        bool, typer.Option("--seven-bits", help="With --int8: smaller weights, for processors without VNNI.")
    ] = False,
    name: Annotated[str, typer.Option("--name", help="Name that it is served under; the task's by default.")] = "",
    version: Annotated[str, typer.Option("--version", help="Version that it is served under.")] = "1",
    round_: Annotated[int | None, typer.Option("--round", help="Round that it is of, for its metadata.", min=0)] = None,
    parent: Annotated[str, typer.Option("--parent", help="Model that training started from, for its metadata.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Make ONNX files of a trained model, compared with torch on the task's own data."""
    if missing := [package for package in _NEEDED if find_spec(package) is None]:
        raise UsageError(f"export needs {missing[0]}: pip install 'propolis[export]'")
    if seven_bits and not int8:
        raise UsageError("--seven-bits is of the model in int8: give --int8 too")
    try:
        weights = model.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {model}: {error.strerror}") from None

    from propolis.server.export import Origin, digest_of

    origin = Origin(name or task.rpartition(":")[2], version, task, digest_of(weights), round_, parent)
    result = _export(origin, weights, data, out, (calibrate, seven_bits) if int8 else None)
    typer.echo(json.dumps(result) if as_json else _summary(result))


def _export(
    origin: Any, weights: bytes, data: Path | None, out: Path, quantization: tuple[int, bool] | None
) -> dict[str, Any]:
    """Write the files, and return what there is to say about them."""
    from propolis.server.export import evaluate_onnx, export_float32, load_trained, quantize_int8, spread_inputs
    from propolis.storage import write_atomically
    from propolis.task import check_task, load_task

    task = load_task(origin.task, data)
    sets = check_task(task)
    exported = export_float32(task, load_trained(task, weights), origin)
    files = {FLOAT32_FILE: exported.data}
    if quantization is not None:
        examples, seven_bits = quantization
        files[INT8_FILE] = quantize_int8(
            exported.data, origin, spread_inputs(sets.train, examples), seven_bits=seven_bits
        )
    figures = {
        name: {"file": str(out / name), "bytes": len(content), **evaluate_onnx(task, content, sets.test)}
        for name, content in files.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(out / name, content)
    named = {"name": origin.name, "version": origin.version, "task": origin.task, "digest": origin.digest}
    return {**named, "max_difference": exported.difference, "models": figures}


def _summary(result: dict[str, Any]) -> str:
    from propolis.server.size import format_bytes

    lines = []
    for figures in result["models"].values():
        metrics = ", ".join(f"{k} {v:.4f}" for k, v in sorted(figures.items()) if k not in ("file", "bytes"))
        lines.append(f"{figures['file']}: {format_bytes(figures['bytes'])}, {metrics}")
    return "\n".join([*lines, f"largest difference from torch: {result['max_difference']:.2g}"])
