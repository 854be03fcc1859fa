"""Versions of a registry become ONNX files, all at once or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Command
from registries import model_file
from safetensors.torch import save

from harness import Blobs
from propolis.secure.errors import PropolisError, UsageError
from propolis.server import convert, export
from propolis.server.convert import GOLDEN_EXAMPLES, Quantization
from propolis.server.convert_version import convert_version
from propolis.server.registry import Registry
from propolis.server.registry_records import Lineage, Version
from propolis.serving.golden import Golden
from propolis.serving.model import load_model

TASK, SMALL = "harness:Blobs", Quantization(64)
FILES = ["model.onnx", "model.int8.onnx", "golden.npz"]


def trained() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    task = Blobs()
    model, examples = task.model(), task.data().train
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(100):
        inputs, labels = examples.batch(torch.randint(len(examples), (32,)), torch.device("cpu"))
        optimizer.zero_grad()
        task.loss(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.state_dict()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """With version 1, whose run is known, and version 2, which was made from it and is of no known task."""
    made = Registry.make(tmp_path / "registry")
    (tmp_path / "blobs.safetensors").write_bytes(save(trained()))
    made.register("blobs", tmp_path / "blobs.safetensors", Lineage(round=3, configuration={"task": TASK}))
    made.register("blobs", tmp_path / "blobs.safetensors", Lineage(parent=1))
    return made


def converted(registry: Registry, quantization: Quantization | None = SMALL) -> Version:
    return convert_version(registry, registry.version("blobs", 1), TASK, quantization=quantization)[0]


def test_a_version_gets_its_files_their_figures_and_a_golden_batch(registry: Registry) -> None:
    version = converted(registry)
    assert [(each.name, each.kind) for each in version.artifacts] == list(
        zip(FILES, ["onnx", "int8", "golden"], strict=True)
    )
    assert [(each.data, each.artifact) for each in version.evaluations] == [(TASK, name) for name in FILES[:2]]
    for evaluation in version.evaluations:
        assert (evaluation.metrics["accuracy"] or 0) > 0.7
    golden = Golden.from_bytes(registry.artifact(version, "golden.npz"))
    given = golden.inputs["input"]
    test = Blobs().data().test.inputs[:].numpy()
    assert len(given) == GOLDEN_EXAMPLES
    assert all(any(np.array_equal(row, real) for real in test) for row in given), "real inputs, none made up"
    assert list(golden.outputs) == FILES[:2]
    for name in FILES[:2]:
        model = load_model(registry.artifact(version, name))
        assert (model.name, model.version) == ("blobs", "1")
        assert model.metadata["propolis.digest"] == version.digest
        assert model.metadata["propolis.round"] == "3"
        assert golden.difference(model, name) < 1e-6
    assert golden.difference(load_model(registry.artifact(version, FILES[1])), FILES[0]) > 1e-6, "int8 is another model"


def test_without_int8_there_is_none(registry: Registry) -> None:
    version = converted(registry, None)
    assert [each.name for each in version.artifacts] == ["model.onnx", "golden.npz"]


def test_a_model_names_the_version_that_it_was_made_from(registry: Registry) -> None:
    version = convert_version(registry, registry.version("blobs", 2), TASK)[0]
    model = load_model(registry.artifact(version, "model.onnx"))
    assert model.metadata["propolis.parent"] == registry.version("blobs", 1).digest


def test_a_task_that_is_unknown_or_another_ones_is_said(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it is not known which task blobs 2 solves: say so with --task"):
        convert_version(registry, registry.version("blobs", 2))
    other = registry.register("blobs", model_file(tmp_path), Lineage(configuration={"task": TASK}))
    with pytest.raises(UsageError, match="these are not weights of the task's model"):
        convert_version(registry, other, TASK)


def test_a_failure_at_the_last_file_leaves_nothing(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise UsageError("cannot be quantized")

    monkeypatch.setattr(convert, "quantize_int8", fails)
    with pytest.raises(UsageError, match="cannot be quantized"):
        converted(registry)
    version = registry.version("blobs", 1)
    assert (version.artifacts, version.evaluations) == ((), ())
    assert registry.sweep(grace=0) == []


def test_a_file_that_computes_something_else_is_not_kept(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LARGEST_DIFFERENCE", -1.0)
    with pytest.raises(PropolisError, match="the ONNX model differs from torch"):
        converted(registry)
    assert registry.version("blobs", 1).artifacts == ()


def test_from_weights_to_files_on_the_command_line(
    registry: Registry, propolis: Command, mistake: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]), prepend=os.pathsep)
    there = ("--registry", "registry")
    assert "say so with --task" in mistake("models", "convert", "blobs", 2, *there)
    assert "which is code: if you trust it, give --task" in mistake("models", "convert", "blobs", 1, *there)
    assert "give --int8 too" in mistake("models", "convert", "blobs", 1, "--seven-bits", *there)
    done = propolis("models", "convert", "blobs", 2, "--task", TASK, *there)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first.startswith("model.onnx: ")
    assert "accuracy 0." in first
    assert second.startswith("largest difference from torch: ")
    assert third == "kept with blobs 2: model.onnx, golden.npz"
    again = propolis("models", "convert", "blobs", 2, *there)
    assert again.stdout == "blobs 2 has its files already: model.onnx, golden.npz\n"
    assert "blobs 2 has model.onnx without model.int8.onnx" in mistake(
        "models", "convert", "blobs", 2, "--int8", *there
    )
    shown = json.loads(propolis("models", "show", "blobs", 2, "--json", *there).stdout)
    assert [each["name"] for each in shown["artifacts"]] == ["model.onnx", "golden.npz"]
    assert shown["releases"] == []
    verified = propolis("models", "verify", "blobs", 2, *there)
    assert verified.stdout.endswith("and so are model.onnx, golden.npz\n")
    wrote = propolis("models", "export", "blobs", 2, "--file", "model.onnx", "--out", "m.onnx", *there)
    assert wrote.stdout == "model.onnx of blobs 2 is in m.onnx\n"
    assert (tmp_path / "m.onnx").read_bytes() == registry.artifact(registry.version("blobs", 2), "model.onnx")
    no_file = mistake("models", "export", "blobs", 2, "--file", "x", "--out", "y", *there)
    assert "blobs 2 has no file 'x'" in no_file
    assert not (tmp_path / "y").exists()


def test_what_is_not_installed_is_said(registry: Registry, tmp_path: Path) -> None:

    code = (
        "import importlib.util as u\nfound = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'onnx' else found(name, *a)\n"
        "from propolis.cli import main; main()"
    )
    words = ["models", "convert", "blobs", "1", "--registry", str(tmp_path / "registry")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "pip install 'propolis[export]'" in done.stderr
