"""The command ``propolis export``. What is heavy loads inside of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from propolis.model_files import figures_of, require_exporter
from propolis.secure.errors import UsageError

if TYPE_CHECKING:
    from propolis.convert import Quantization
    from propolis.export import Origin


DataFlag = Annotated[Path | None, typer.Option("--data", help="Folder with the data, where the task reads one.")]
Int8Flag = Annotated[bool, typer.Option("--int8", help="Also a model in int8, and what it costs in accuracy.")]
CalibrateFlag = Annotated[
    int, typer.Option("--calibrate", help="With --int8: training examples that set its ranges.", min=1)
]
SevenBitsFlag = Annotated[
    bool, typer.Option("--seven-bits", help="With --int8: smaller weights, for processors without VNNI.")
]
CALIBRATION_EXAMPLES = 512


def export_command(
    task: Annotated[str, typer.Option("--task", help="The task that the model solves: built-in, or MODULE:CLASS.")],
    model: Annotated[Path, typer.Option("--model", metavar="FILE", help="Its weights: a run's model.safetensors.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the ONNX files.")],
    data: DataFlag = None,
    int8: Int8Flag = False,
    calibrate: CalibrateFlag = CALIBRATION_EXAMPLES,
    seven_bits: SevenBitsFlag = False,
    name: Annotated[str, typer.Option("--name", help="Name that it is served under; the task's by default.")] = "",
    version: Annotated[str, typer.Option("--version", help="Version that it is served under.")] = "1",
    round_: Annotated[int | None, typer.Option("--round", help="Round that it is of, for its metadata.", min=0)] = None,
    parent: Annotated[str, typer.Option("--parent", help="Model that training started from, for its metadata.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
) -> None:
    """Make ONNX files of a trained model, compared with torch on the task's own data."""
    require_exporter()
    require_int8(int8, seven_bits)
    try:
        weights = model.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {model}: {error.strerror}") from None
    from propolis.secure.he.messages import is_encrypted_model

    if is_encrypted_model(weights):
        raise UsageError(f"{model} is encrypted: propolis client open exports it, on a device that has the key")

    from propolis.convert import Quantization
    from propolis.export import Origin, digest_of

    origin = Origin(name or task.rpartition(":")[2], version, task, digest_of(weights), round_, parent)
    result = _export(origin, weights, data, out, Quantization(calibrate, seven_bits) if int8 else None)
    typer.echo(json.dumps(result) if as_json else figures_of(result["models"], result["max_difference"]))


def require_int8(int8: bool, seven_bits: bool) -> None:
    """Raises UsageError where a flag of the model in int8 stands without it."""
    if seven_bits and not int8:
        raise UsageError("--seven-bits is of the model in int8: give --int8 too")


def _export(
    origin: Origin, weights: bytes, data: Path | None, out: Path, quantization: Quantization | None
) -> dict[str, Any]:
    """Write the files, and return what there is to say about them."""
    from propolis.convert import convert
    from propolis.storage import write_atomically
    from propolis.task import check_task, load_task

    task = load_task(origin.task, data)
    converted = convert(task, check_task(task), weights, origin, quantization)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in converted.files.items():
        write_atomically(out / name, content)
    figures = {
        name: {"file": str(out / name), "bytes": len(content), **converted.metrics[name]}
        for name, content in converted.files.items()
    }
    named = {"name": origin.name, "version": origin.version, "task": origin.task, "digest": origin.digest}
    return {**named, "max_difference": converted.difference, "models": figures}
