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
from propolis import convert, export
from propolis.convert import Quantization
from propolis.secure.errors import PropolisError, UsageError
from propolis.server import convert_cli
from propolis.server.convert_version import convert_version
from propolis.server.golden_inputs import GOLDEN_EXAMPLES, GoldenFrom
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


def test_inputs_of_somebodys_data_go_to_devices_only_when_they_are_asked_for(
    registry: Registry, tmp_path: Path
) -> None:
    version = registry.version("blobs", 1)
    with pytest.raises(
        UsageError, match=r"8 test inputs from .* would go to every device, .* or --golden-from-test-set"
    ):
        convert_version(registry, version, TASK, tmp_path)
    assert registry.version("blobs", 1) == version
    made, _ = convert_version(registry, version, TASK, tmp_path, golden=GoldenFrom.TEST_SET)
    assert len(golden_of(registry, made)) == 8
    made, _ = convert_version(registry, registry.version("blobs", 2), TASK, tmp_path, golden=GoldenFrom.NOWHERE)
    assert [each.name for each in made.artifacts] == ["model.onnx"]


@pytest.mark.parametrize("kind", ["npy", "json", "object.json", "npz"])
def test_a_golden_batch_may_be_of_inputs_in_a_file(registry: Registry, tmp_path: Path, kind: str) -> None:
    inputs = np.arange(12.0).reshape(3, 4)
    path = tmp_path / f"inputs.{kind}"
    if kind == "npy":
        np.save(path, inputs)
    elif kind == "npz":
        path.write_bytes(Golden({"input": inputs.astype(np.float32)}, {}).to_bytes())
    else:
        path.write_text(json.dumps({"input": inputs.tolist()} if kind == "object.json" else inputs.tolist()))
    made, _ = convert_version(registry, registry.version("blobs", 1), TASK, tmp_path, golden=path)
    assert np.array_equal(golden_of(registry, made), inputs.astype(np.float32))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[[1, 2]]", "has inputs of shape 1x2, the task's are nx4"),
        ("[]", "the task's are nx4"),
        ("5", "has inputs of shape one number"),
        ("[[1, 2, 3, NaN]]", "no finite numbers"),
        ('[["1", 2, 3, 4]]', "has no inputs for a golden batch"),
        ("[[1], [2, 3]]", "has no inputs for a golden batch"),
        ('{"other": 1}', "has no inputs for a golden batch"),
        ("{", "has no inputs for a golden batch"),
        (None, "cannot read"),
    ],
)
def test_a_file_without_the_tasks_inputs_is_refused_before_the_conversion(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, said: str
) -> None:
    monkeypatch.setattr(registry, "read", lambda _: pytest.fail("it was not refused before"))
    if content is not None:
        (tmp_path / "inputs.json").write_text(content)
    with pytest.raises(UsageError, match=said):
        convert_version(registry, registry.version("blobs", 1), TASK, golden=tmp_path / "inputs.json")


def golden_of(registry: Registry, version: Version) -> np.ndarray:
    return Golden.from_bytes(registry.artifact(version, "golden.npz")).inputs["input"]


def test_what_a_version_has_is_not_taken_for_what_another_request_wants(registry: Registry, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 4)))
    np.save(tmp_path / "b.npy", np.zeros((2, 4)))
    flags = {"task": TASK, "registry": str(tmp_path / "registry")}

    def convert(version: str, **more: object) -> None:
        convert_cli.convert_command("blobs", version, **flags, **more)  # type: ignore[arg-type]

    for version, seven_bits in (("1", True), ("2", False)):
        convert(version, int8=True, seven_bits=seven_bits, golden=tmp_path / "a.npy")
        convert(version, int8=True, seven_bits=seven_bits, golden=tmp_path / "a.npy")
        with pytest.raises(UsageError, match=f"made with{'' if seven_bits else 'out'} --seven-bits, and what"):
            convert(version, int8=True, seven_bits=not seven_bits)
        convert(version)
    with pytest.raises(UsageError, match=r"is of other inputs than .*b\.npy"):
        convert("1", golden=tmp_path / "b.npy")
    with pytest.raises(UsageError, match="blobs 1 has a golden batch"):
        convert("1", no_golden=True)
    with pytest.raises(UsageError, match="give one of --golden, --no-golden and"):
        convert("1", no_golden=True, golden_from_test_set=True)
    registry.register("blobs", tmp_path / "blobs.safetensors")
    convert("3", no_golden=True)
    with pytest.raises(UsageError, match="blobs 3 has no golden batch"):
        convert("3", golden_from_test_set=True)


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
    assert "8 inputs of the test set can be read by every device that gets a release" in done.stderr
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
