from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from harness import Blobs
from propolis.secure.errors import UsageError
from propolis.task import BUILT_IN, DataSet, Examples, Task, check_task, frozen_names, load_task


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An importable file of a user's, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "user_task.py"
    sys.modules.pop("user_task", None)


def test_a_users_task_is_found_in_the_current_folder(user_module: Path) -> None:
    user_module.write_text(
        "from propolis import Task\n"
        "class Mine(Task):\n"
        "    def model(self): pass\n"
        "    def data(self): return self.data_folder\n"
    )
    assert load_task("user_task:Mine", "somewhere").data_folder == Path("somewhere")


@pytest.mark.parametrize(
    ("source", "reference", "message"),
    [
        ("", "nonsense", "unknown task 'nonsense': expected one of digits, fashion-mnist, or MODULE:CLASS"),
        ("", "user_task:", "unknown task 'user_task:'"),
        ("", "absent_module:Mine", "cannot import absent_module: No module named 'absent_module'"),
        ("", "user_task:Mine", "user_task has no class Mine derived from propolis.Task"),
        ("Mine = 3", "user_task:Mine", "has no class Mine derived from propolis.Task"),
        ("1 / 0", "user_task:Mine", "cannot import user_task: division by zero"),
        (
            "from propolis import Task\nclass Mine(Task):\n  def model(self): pass",
            "user_task:Mine",
            "Mine lacks the method data()",
        ),
        (
            "from propolis import Task\nclass Mine(Task):\n  def data(self): pass",
            "user_task:Mine",
            "Mine lacks the method model()",
        ),
    ],
)
def test_wrong_references_are_one_clear_error(user_module: Path, source: str, reference: str, message: str) -> None:
    user_module.write_text(source)
    with pytest.raises(UsageError) as caught:
        load_task(reference)
    assert message in str(caught.value)


class NoParameters(Blobs):
    def model(self) -> nn.Module:
        return nn.ReLU()


class Bfloat(Blobs):
    def model(self) -> nn.Module:
        return nn.Linear(4, 2, dtype=torch.bfloat16)


class NotAModel(Blobs):
    def model(self) -> nn.Module:
        return "model"  # type: ignore[return-value]


class EmptyTest(Blobs):
    def data(self) -> DataSet:
        train = super().data().train
        return DataSet(train, train.subset(np.array([], np.int64)))


class WrongShape(Blobs):
    def model(self) -> nn.Module:
        return nn.Linear(5, 2)


class VectorLoss(Blobs):
    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, labels, reduction="none")


class NanLoss(Blobs):
    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        return super().loss(outputs, labels) * torch.nan


class RaisingModel(Blobs):
    def model(self) -> nn.Module:
        raise KeyError("layers")


class Exiting(Blobs):
    def model(self) -> nn.Module:
        raise SystemExit(0)


class RaisingData(Blobs):
    def data(self) -> DataSet:
        return 1 / 0  # type: ignore[return-value]


class Lazy(Blobs):
    def model(self) -> nn.Module:
        return nn.LazyLinear(2)


class NoEvaluation(Blobs):
    def evaluate(self, model: nn.Module, examples: Examples) -> dict[str, float]:
        return None  # type: ignore[return-value]


class NoLoss(Blobs):
    def evaluate(self, model: nn.Module, examples: Examples) -> dict[str, float]:
        return {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Exiting, "Exiting.model() fails: SystemExit: 0"),
        (RaisingModel, "RaisingModel.model() fails: KeyError"),
        (RaisingData, "RaisingData.data() fails: ZeroDivisionError"),
        (Lazy, "must be a tensor of known shape"),
        (NoEvaluation, "NoEvaluation.evaluate() on its first test examples fails"),
        (NoLoss, "must return a dictionary with 'loss', got ['accuracy']"),
        (NoParameters, "NoParameters.model() has no parameters to train"),
        (Bfloat, "weight is torch.bfloat16, which cannot be averaged"),
        (NotAModel, "must return a torch.nn.Module, got str"),
        (EmptyTest, "the test set is empty"),
        (WrongShape, "the loss of its first examples fails: RuntimeError"),
        (VectorLoss, "must return a scalar tensor"),
        (NanLoss, "the loss of its first examples is nan"),
    ],
)
def test_a_task_that_cannot_work_is_refused(task: type[Task], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_task(task())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reference", ["digits"])
def test_built_in_tasks_pass_their_own_check(reference: str) -> None:
    task = load_task(reference)
    data = check_task(task)
    assert task.example_input().shape == data.test.inputs[:1].shape
    assert reference in BUILT_IN


def test_default_evaluation_is_loss_and_accuracy() -> None:
    class Constant(Blobs):
        pass

    model = nn.Linear(4, 2)
    nn.init.zeros_(model.weight)
    model.bias.data = torch.tensor([0.0, 10.0])  # always the second class
    examples = Blobs().data().test
    metrics = Constant().evaluate(model, examples)
    assert metrics["accuracy"] == pytest.approx(float((examples.labels == 1).float().mean()))
    expected = nn.functional.cross_entropy(model(examples.inputs), examples.labels)
    assert metrics["loss"] == pytest.approx(float(expected), rel=1e-6)


def test_examples_need_as_many_labels_as_inputs() -> None:
    with pytest.raises(UsageError, match="3 inputs but 2 labels"):
        Examples(torch.zeros(3, 1), torch.zeros(2))
    with pytest.raises(UsageError, match="2 labels but 1 users"):
        Examples(torch.zeros(2, 1), torch.zeros(2), np.array(["a"]))


class Squares:
    """Lazy inputs: computed when they are asked for."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, positions: Tensor) -> Tensor:
        return positions.float()[:, None] ** 2


def test_lazy_inputs_are_indexed_only_in_batches() -> None:
    examples = Examples(Squares(), torch.arange(10))
    part = examples.subset(np.array([7, 3, 5]))
    inputs, labels = part.batch(torch.tensor([0, 2]), torch.device("cpu"))
    assert inputs.flatten().tolist() == [49.0, 25.0]
    assert labels.tolist() == [7, 5]


def test_device_data_reads_npz(tmp_path: Path) -> None:
    path = tmp_path / "mine.npz"
    np.savez(path, inputs=np.ones((3, 4), np.float32), labels=np.arange(3))
    examples = Blobs().device_data(path)
    assert examples.inputs[:].shape == (3, 4)
    assert len(examples) == 3
    path.write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(UsageError, match=r"is not an \.npz file with inputs and labels"):
        Blobs().device_data(path)
    with pytest.raises(UsageError, match=r"is not an \.npz file"):
        Blobs().device_data(tmp_path / "absent.npz")


def test_frozen_names(blobs: Blobs) -> None:
    assert frozen_names(blobs.model()) == {"0.bias"}


def test_pixels_with_classes_are_counted_one_by_one() -> None:
    pictures = Examples(torch.zeros(3, 4, 2, 2), torch.zeros(3, 2, 2, dtype=torch.int64))
    model = nn.Conv2d(4, 2, 1)
    model.weight.data.zero_()
    model.bias.data = torch.tensor([10.0, 0.0])  # always the first class
    assert Blobs().evaluate(model, pictures)["accuracy"] == 1.0
