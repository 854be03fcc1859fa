"""ONNX files of trained models: the same as torch within float32's own errors, in int8 nearly, and what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import Command
from safetensors.torch import save
from torch import Tensor, nn

from harness import Blobs
from propolis.export import (
    Origin,
    digest_of,
    evaluate_onnx,
    export_float32,
    load_trained,
    quantize_int8,
    require_same_outputs,
    spread_inputs,
)
from propolis.secure.errors import PropolisError, UsageError
from propolis.serving.model import load_model, require_self_contained
from propolis.simulations.tasks.digits import Digits
from propolis.task import Examples, Task

ORIGIN = Origin("mine", "7", "digits", "ab" * 32, round=30, parent="cd" * 32)


def trained(task: Task, steps: int = 150) -> nn.Module:
    torch.manual_seed(0)
    model, examples = task.model(), task.data().train
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        positions = torch.randint(len(examples), (32,))
        inputs, labels = examples.batch(positions, torch.device("cpu"))
        optimizer.zero_grad()
        task.loss(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()


class Pictures(Digits):
    """The digits as pictures, with a convolution and a norm that int8 must fold."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(128, 10),
        )  # fmt: skip


@pytest.fixture(scope="module")
def pictures() -> tuple[Task, nn.Module]:
    task = Pictures()
    return task, trained(task)


@pytest.mark.parametrize("task", [Blobs(), Digits(), Pictures()], ids=lambda task: type(task).__name__)
def test_the_file_computes_what_torch_does_for_any_batch(task: Task) -> None:
    model = trained(task, steps=20)
    exported = export_float32(task, model, ORIGIN)
    assert 0 <= exported.difference < 1e-4
    served = load_model(exported.data)
    assert served.is_batched
    for size in (1, 3, 50):
        inputs = task.data().test.inputs[torch.arange(size)]
        outputs = served.run({"input": inputs.numpy()})["output"]
        assert np.allclose(outputs, model(inputs).detach().numpy(), atol=1e-4)


def test_a_file_says_where_it_is_from(pictures: tuple[Task, nn.Module]) -> None:
    exported = export_float32(*pictures, ORIGIN)
    small = quantize_int8(exported.data, ORIGIN, spread_inputs(pictures[0].data().train, 64))
    for data in (exported.data, small):
        model = load_model(data)
        assert (model.name, model.version) == ("mine", "7")
        said = {key: value for key, value in model.metadata.items() if key.startswith("propolis.")}
        assert said.pop("propolis.seven-bits", None) == ("false" if data is small else None)
        assert {key.removeprefix("propolis."): value for key, value in said.items()} == {
            "name": "mine", "version": "7", "task": "digits", "digest": "ab" * 32,
            "round": "30", "parent": "cd" * 32, "input": "input", "output": "output",
        }  # fmt: skip
        require_self_contained(data)
        onnx.checker.check_model(onnx.load_model_from_string(data), full_check=True)


def test_the_same_model_gives_the_same_file(pictures: tuple[Task, nn.Module]) -> None:
    assert export_float32(*pictures, ORIGIN).data == export_float32(*pictures, ORIGIN).data


@pytest.mark.parametrize("seven_bits", [False, True])
def test_int8_is_smaller_per_channel_and_nearly_as_accurate(pictures: tuple[Task, nn.Module], seven_bits: bool) -> None:
    task, model = pictures
    exported = export_float32(task, model, ORIGIN)
    small = quantize_int8(exported.data, ORIGIN, spread_inputs(task.data().train, 256), seven_bits)
    test = task.data().test
    whole = evaluate_onnx(task, exported.data, test)
    assert whole["accuracy"] > 0.9
    assert evaluate_onnx(task, small, test)["accuracy"] >= whole["accuracy"] - 0.02
    graph = onnx.load_model_from_string(small).graph
    int8 = [t for t in graph.initializer if t.data_type == onnx.TensorProto.INT8 and len(t.dims) > 1]
    weights = {tuple(tensor.dims): onnx.numpy_helper.to_array(tensor) for tensor in int8}
    assert set(weights) == {(8, 1, 3, 3), (10, 128)}
    peaks = np.abs(weights[8, 1, 3, 3].astype(int)).max(axis=(1, 2, 3))
    assert set(peaks) == {64 if seven_bits else 127}  # every channel uses its whole range
    operators = {node.op_type for node in graph.node}
    assert "BatchNormalization" not in operators
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators


def test_a_file_that_computes_something_else_is_refused(pictures: tuple[Task, nn.Module]) -> None:
    task, model = pictures
    served = load_model(export_float32(task, model, ORIGIN).data)
    other, inputs = Pictures().model().eval(), task.data().test.inputs[torch.arange(4)]
    with pytest.raises(PropolisError, match=r"the ONNX model differs from torch by .* where 0\.000.* may be"):
        require_same_outputs(other, served, inputs)
    broken = load_trained(task, save({name: tensor * torch.nan for name, tensor in model.state_dict().items()}))
    with pytest.raises(PropolisError, match="differs from torch by nan"):
        require_same_outputs(broken, served, inputs)


class Branching(Blobs):
    """A model whose path depends on its input's values, which no file can follow."""

    def model(self) -> nn.Module:
        class Model(nn.Linear):
            def forward(self, inputs: Tensor) -> Tensor:
                return super().forward(inputs) if float(inputs.sum()) > 0 else inputs[:, :2]

        return Model(4, 2)


def test_a_model_that_cannot_be_exported_is_one_line() -> None:
    with pytest.raises(UsageError, match="this model cannot be exported to ONNX") as caught:
        export_float32(Branching(), Branching().model().eval(), ORIGIN)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model_are_refused() -> None:
    with pytest.raises(UsageError, match=r"not weights of the task's model: .*0\.weight"):
        load_trained(Digits(), save(Blobs().model().state_dict()))
    with pytest.raises(UsageError, match="no safetensors file"):
        load_trained(Digits(), b"nothing")


def test_calibration_is_from_the_whole_set() -> None:
    examples = Examples(torch.arange(100.0)[:, None], torch.zeros(100))
    assert spread_inputs(examples, 3).flatten().tolist() == [0, 50, 99]
    assert len(spread_inputs(examples, 1000)) == 100


def test_the_command_writes_both_files_and_says_what_they_cost(propolis: Command, tmp_path: Path) -> None:
    weights = save(trained(Digits()).state_dict())
    (tmp_path / "model.safetensors").write_bytes(weights)
    arguments = ("--task", "digits", "--model", "model.safetensors", "--out", "onnx", "--int8", "--calibrate", 100)
    done = propolis("export", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["digest"] == digest_of(weights)
    assert result["max_difference"] < 1e-4
    whole, small = (result["models"][name] for name in ("model.onnx", "model.int8.onnx"))
    assert small["bytes"] < whole["bytes"] / 2
    assert abs(small["accuracy"] - whole["accuracy"]) < 0.02
    for figures in (whole, small):
        model = load_model((tmp_path / figures["file"]).read_bytes())
        assert (model.name, model.version) == ("digits", "1")
    inputs = Digits().data().test.inputs[torch.arange(2)]
    np.save(tmp_path / "in.npy", inputs.numpy())
    predicted = propolis("predict", "--model", "onnx/model.onnx", "--input", "in.npy", "--json")
    assert np.shape(json.loads(predicted.stdout)["output"]) == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "absent"], "cannot read absent"),
        (["--model", "text"], "no safetensors file"),
        (["--model", "text", "--seven-bits"], "give --int8 too"),
        (["--model", "text", "--task", "mnist"], "unknown task 'mnist'"),
        (["--model", "text", "--int8", "--calibrate", "0"], "0 is not in the range"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    mistake: object, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "text").write_text("text")
    assert message in mistake("export", "--task", "digits", "--out", "onnx", *arguments)  # type: ignore[operator]
    assert not (tmp_path / "onnx").exists()
