"""A registered model on a task's test set."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from propolis.secure.errors import UsageError
from propolis.server.registry import Registry
from propolis.server.registry_records import Version
from propolis.task import check_task, choose_device, load_task


def evaluate_version(
    registry: Registry, version: Version, task: str, data: str | None = None, device: str = "auto"
) -> Version:
    """Evaluate a version as the task does, and keep the figures with it, under the data set's name.

    Args:
        registry: that the version is in.
        version: to evaluate.
        task: built-in, or MODULE:CLASS; its name, and that of the folder `data`, are the data set's.
        data: folder with the task's data.
        device: that evaluates.

    Raises:
        UsageError: it is encrypted, the task or the data is not usable, or the model is not the task's; nothing has
            been kept.
    """
    version.require_readable("to evaluate it")
    made = load_task(task, data)
    test, on = check_task(made).test, choose_device(device)
    model = made.model()
    try:
        model.load_state_dict(load(b"".join(registry.read(version))))
    except (RuntimeError, SafetensorError) as error:
        raise UsageError(f"{version} is no model of task '{task}': {' '.join(str(error).split())[:300]}") from None
    with torch.no_grad():
        metrics = made.evaluate(model.to(on).eval(), test)
    return registry.add_evaluation(version, data_name(task, data), metrics)


def data_name(task: str, data: str | Path | None) -> str:
    """What a task's test set is called, from whatever folder it is read."""
    return task if data is None else f"{task}:{Path(data).resolve().name}"
