"""A version of a registry gets the files that are served, beside the weights that it has."""

from __future__ import annotations

from pathlib import Path

from propolis.convert import Converted, Quantization, convert
from propolis.export import INPUT, Origin
from propolis.model_files import FLOAT32_FILE, INT8_FILE
from propolis.secure.errors import UsageError
from propolis.secure.manifest import Kind
from propolis.server.evaluation import data_name
from propolis.server.golden_inputs import GoldenChoice, GoldenFrom, golden_inputs, require_golden_choice
from propolis.server.registry import Registry
from propolis.server.registry_files import NewArtifact
from propolis.server.registry_records import Version
from propolis.serving.golden import GOLDEN_FILE, Golden
from propolis.task import BUILT_IN, check_task, load_task

_KINDS = {FLOAT32_FILE: Kind.ONNX, INT8_FILE: Kind.INT8, GOLDEN_FILE: Kind.GOLDEN}


def convert_version(
    registry: Registry,
    version: Version,
    task: str | None = None,
    data: Path | None = None,
    quantization: Quantization | None = None,
    golden: GoldenChoice = GoldenFrom.DEFAULT,
) -> tuple[Version, Converted]:
    """Attach the ONNX files of a version to it, with a golden batch and their evaluations, all or none.

    Args:
        registry: that the version is in.
        version: without such files.
        task: reference of the one that it solves; that of its run by default, if that is built in.
        data: folder with the task's data.
        quantization: of a model in int8; None for none.
        golden: what the golden batch is made of.

    Raises:
        UsageError: it is encrypted; it must be said what the golden batch is made of and is not, or the file with its
            inputs is not usable; the task is not known or not the model's, or the model cannot be converted.
        PropolisError: the file computes something else than torch does.
        StorageError: the files could not be stored.
    """
    version.require_readable("to convert it")
    registry.require_authentic(version)
    reference = task or task_of(version)
    require_golden_choice(golden, reference, data)
    made = load_task(reference, data)
    sets = check_task(made)
    inputs = golden_inputs(golden, sets)
    weights = b"".join(registry.read(version))
    converted = convert(made, sets, weights, _origin(registry, version, reference), quantization)
    files = dict(converted.files)
    if inputs is not None:
        files[GOLDEN_FILE] = converted.golden(inputs).to_bytes()
    new = [NewArtifact(name, _KINDS[name], content) for name, content in files.items()]
    return registry.attach_all(version, new, converted.metrics, data_name(reference, data)), converted


def attach_inputs(
    registry: Registry, version: Version, task: str | None, data: Path | None, golden: GoldenChoice
) -> Version:
    """Attach a golden batch without outputs to a version whose model only devices can run.

    Args:
        registry: that the version is in.
        version: encrypted, without a golden batch.
        task: see `convert_version`.
        data: see `convert_version`.
        golden: where the inputs are.

    Raises:
        UsageError: the task is not known, or there are no such inputs.
        StorageError: they could not be stored.
    """
    registry.require_authentic(version)
    inputs = golden_inputs(golden, check_task(load_task(task or task_of(version), data)))
    if inputs is None:
        return version
    return registry.attach(version, GOLDEN_FILE, Kind.GOLDEN, Golden({INPUT: inputs}, {}).to_bytes())


def task_of(version: Version) -> str:
    """The built-in task that a version's run solved.

    Raises:
        UsageError: it is not known, or is code that would run beside the registry's key because its database says so.
    """
    known = version.lineage.configuration.get("task")
    if not isinstance(known, str):
        raise UsageError(f"it is not known which task {version} solves: say so with --task")
    if known not in BUILT_IN:
        raise UsageError(f"{version} says that it solves {known[:200]!r}, which is code: if you trust it, give --task")
    return known


def _origin(registry: Registry, version: Version, task: str) -> Origin:
    lineage = version.lineage
    parent = registry.version(version.model, lineage.parent) if lineage.parent else None
    if parent is not None:
        registry.require_authentic(parent)
    made_from = "" if parent is None else parent.digest
    return Origin(version.model, str(version.version), task, version.digest, lineage.round, made_from)
