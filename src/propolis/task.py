"""What a user writes to bring a problem: model, data, loss and evaluation.

A task is a class derived from `Task`. Two methods are required (`model` and `data`); the others have defaults
that suit classification. Both ends load it by reference: the devices train its model on their own examples, the
server evaluates the global model on its test set.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from propolis.references import load_attribute
from propolis.secure.errors import UsageError

BUILT_IN = {
    "digits": "propolis.simulations.tasks.digits:Digits",
    "fashion-mnist": "propolis.simulations.tasks.fashion_mnist:FashionMnist",
}

_EVALUATION_BATCH = 2048


class Inputs(Protocol):
    """A tensor of shape (n, ...), or anything that answers ``len()`` and gives a batch for positions.

    So a data set larger than memory needs no more than an object whose ``__getitem__`` takes a (b,) int64 tensor
    of positions and returns their inputs as one tensor of shape (b, ...).
    """

    def __len__(self) -> int: ...

    def __getitem__(self, positions: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Examples:
    """A set of labelled examples.

    Attributes:
        inputs: (n, ...) tensor or `Inputs`.
        labels: (n, ...) tensor; integer classes of shape (n,) where the data is to be partitioned by class.
        users: (n,) array that names the natural owner of each example, for the partition ``natural``.
    """

    inputs: Inputs
    labels: Tensor
    users: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise UsageError(f"the data has {len(self.inputs)} inputs but {len(self.labels)} labels")
        if self.users is not None and len(self.users) != len(self.labels):
            raise UsageError(f"the data has {len(self.labels)} labels but {len(self.users)} users")

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and labels at `positions` ((b,) int64), on `device`."""
        return self.inputs[positions].to(device), self.labels[positions].to(device)

    def subset(self, positions: np.ndarray) -> Examples:
        """The examples at `positions` ((m,) int64), in that order; a tensor is copied, lazy inputs are not."""
        index = torch.as_tensor(positions, dtype=torch.int64)
        inputs = self.inputs[index] if isinstance(self.inputs, Tensor) else _Selected(self.inputs, index)
        return Examples(inputs, self.labels[index], None if self.users is None else self.users[positions])


@dataclass(frozen=True, slots=True)
class _Selected:
    """Some positions of lazy inputs."""

    inputs: Inputs
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, positions: Tensor) -> Any:
        return self.inputs[self.index[positions]]


@dataclass(frozen=True, slots=True)
class DataSet:
    """The whole data of a task: `train` is partitioned over simulated devices, `test` stays with the server."""

    train: Examples
    test: Examples


class Task:
    """Base class of every task; derive from it and write at least `model` and `data`.

    Args:
        data: what ``--data`` named: a folder for a task that reads files, else None.
    """

    def __init__(self, data: Path | None = None) -> None:
        self.data_folder = data

    def model(self) -> nn.Module:
        """A new model; called under the run's seed, so its weights are the same for the same seed."""
        raise NotImplementedError

    def data(self) -> DataSet:
        """The whole data set, for simulations and for the server's evaluation."""
        raise NotImplementedError

    def device_data(self, path: Path) -> Examples:
        """The examples of one real device, from a path on that device.

        The default reads an ``.npz`` file with the arrays ``inputs`` (n, ...) and ``labels`` (n, ...).
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return Examples(torch.from_numpy(arrays["inputs"]), torch.from_numpy(arrays["labels"]))
        except (OSError, KeyError, ValueError, TypeError, BadZipFile) as error:
            raise UsageError(f"{path} is not an .npz file with inputs and labels: {_first_line(error)}") from None

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Mean loss over a batch, a scalar; cross-entropy unless overridden."""
        return nn.functional.cross_entropy(outputs, labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, examples: Examples) -> dict[str, float]:
        """Metrics of `model` on `examples`: ``loss`` always, ``accuracy`` where the task has one.

        The default suits classification; a regression overrides it. The model arrives in evaluation mode.
        """
        device = next(model.parameters()).device
        loss, correct, compared = 0.0, 0, 0
        for positions in torch.split(torch.arange(len(examples)), _EVALUATION_BATCH):
            inputs, labels = examples.batch(positions, device)
            outputs = model(inputs)
            loss += float(self.loss(outputs, labels)) * len(positions)
            correct += int((outputs.argmax(dim=1) == labels).sum())
            compared += labels.numel()  # more than one a picture where every pixel has a class
        return {"loss": loss / len(examples), "accuracy": correct / compared}

    def example_input(self) -> Tensor:
        """One batch of one input, shape (1, ...): what an export traces the model with."""
        return cast(Tensor, self.data().test.inputs[torch.tensor([0])])


def load_task(reference: str, data: str | Path | None = None) -> Task:
    """The task that `reference` names: a built-in one, or ``module:Class`` (the current folder is searched too).

    Raises:
        UsageError: the reference is malformed, does not lead to a Task, or lacks a required method.
    """
    module_name, _, class_name = BUILT_IN.get(reference, reference).partition(":")
    if not module_name or not class_name:
        known = ", ".join(BUILT_IN)
        raise UsageError(f"unknown task '{reference}': expected one of {known}, or MODULE:CLASS")
    task_class = load_attribute(f"{module_name}:{class_name}", "task")
    if not inspect.isclass(task_class) or not issubclass(task_class, Task):
        raise UsageError(f"task '{reference}': {module_name} has no class {class_name} derived from propolis.Task")
    for name in ("model", "data"):
        if getattr(task_class, name) is getattr(Task, name):
            raise UsageError(f"task '{reference}': {class_name} lacks the method {name}()")
    try:
        return task_class(Path(data) if data is not None else None)
    except UsageError:
        raise
    except Exception as error:  # the task's own code
        raise UsageError(f"task '{reference}': cannot make {class_name}(data): {_first_line(error)}") from None


def choose_device(name: str = "auto") -> torch.device:
    """The torch device called `name`; ``auto`` prefers cuda, then mps, then cpu.

    Raises:
        UsageError: the device is unknown or not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        known = device.type in ("cpu", "cuda", "mps")
    except (RuntimeError, AssertionError, NotImplementedError):
        known = False
    if not known:
        raise UsageError(f"device '{name}' is not available on this machine; use auto or cpu") from None
    return device


def frozen_names(model: nn.Module) -> set[str]:
    """State-dict names of the parameters that training never changes."""
    return {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}


def check_task(task: Task) -> DataSet:
    """Everything that can be found wrong with a task before training; returns its data.

    Raises:
        UsageError: the model has nothing to train or a type that cannot travel, a data set is empty, or the loss
            or the evaluation of two of the task's own examples fails.
    """
    name = type(task).__name__
    with _blaming(f"{name}.model()"):
        model = task.model()
    with _blaming(f"{name}.data()"):
        data = task.data()
    if not isinstance(model, nn.Module):
        raise UsageError(f"{name}.model() must return a torch.nn.Module, got {type(model).__name__}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError(f"{name}.model() has no parameters to train")
    _check_dtypes(name, model.state_dict())
    if not isinstance(data, DataSet):
        raise UsageError(f"{name}.data() must return a propolis.DataSet, got {type(data).__name__}")
    for part, examples in (("train", data.train), ("test", data.test)):
        if len(examples) == 0:
            raise UsageError(f"{name}.data(): the {part} set is empty")
    _check_loss(name, task, model, data.train)
    _check_evaluation(name, task, model, data.test)
    return data


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    """Turn whatever a user's code raises into one line that says where."""
    try:
        yield
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{what} fails: {_first_line(error)}") from None


def _check_dtypes(name: str, state: Mapping[str, Tensor]) -> None:
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or is_lazy(tensor):
            raise UsageError(f"{name}.model(): {key} must be a tensor of known shape, got {type(tensor).__name__}")
        if tensor.dtype == torch.bfloat16 or tensor.is_complex() or tensor.is_quantized:
            raise UsageError(f"{name}.model(): {key} is {tensor.dtype}, which cannot be averaged; use float32")


def _check_loss(name: str, task: Task, model: nn.Module, examples: Examples) -> None:
    positions = torch.arange(min(2, len(examples)))
    with _blaming(f"{name}: the loss of its first examples"):
        inputs, labels = examples.batch(positions, torch.device("cpu"))
        loss = task.loss(model.eval()(inputs), labels)
    if not isinstance(loss, Tensor) or loss.ndim != 0 or not loss.requires_grad:
        raise UsageError(f"{name}.loss() must return a scalar tensor that depends on the model")
    if not torch.isfinite(loss):
        raise UsageError(f"{name}: the loss of its first examples is {float(loss.detach())}, expected a finite number")


def _check_evaluation(name: str, task: Task, model: nn.Module, examples: Examples) -> None:
    with _blaming(f"{name}.evaluate() on its first test examples"), torch.no_grad():
        metrics = task.evaluate(model.eval(), examples.subset(np.arange(min(2, len(examples)))))
        figures = {key: float(value) for key, value in metrics.items()}
    if "loss" not in figures:
        raise UsageError(f"{name}.evaluate() must return a dictionary with 'loss', got {sorted(figures)}")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".removesuffix(": ")
