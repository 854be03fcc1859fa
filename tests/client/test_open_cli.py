"""`propolis client open`: an encrypted model as the files that are served, or one line that says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from conftest import Command
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from propolis.client.encrypted_sums import open_model_file
from propolis.client.state import FileStore
from propolis.secure.secagg.policy import Policy
from propolis.server.app import initial_model
from propolis.server.checkpoint import load_checkpoint
from propolis.server.job import CHECKPOINT, RunOptions, run_digest
from propolis.settings import Settings
from propolis.simulations.run import simulate
from propolis.task import load_task

Mistake = Callable[..., str]
SETTINGS = Settings(clients=4, rounds=2, epochs=1, protection="he", evaluate_fraction=1.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    simulate(SETTINGS, RunOptions(folder))
    return folder


def opening(run: Path, *more: object, device: int = 1, model: str = "model.encrypted") -> tuple[object, ...]:
    return ("client", "open", run / model, "--dir", run / "devices" / f"device-{device}", "--out", "out", *more)


def test_a_device_opens_exports_and_predicts(run: Path, propolis: Command, tmp_path: Path) -> None:
    done = propolis(*opening(run, "--task", "digits", "--int8", "--json"))
    assert done.returncode == 0, done.stderr
    said, out = json.loads(done.stdout), tmp_path / "out"
    assert json.loads((out / "model.json").read_text()) == said
    seen = json.loads((run / "result.json").read_text())["opened"]["rounds"][-1]
    assert (said["round"], said["devices"], said["saturated"]) == (2, 4, 0)
    assert said["weight"] == seen["weight"]
    assert said["metrics"] == {"train-loss": seen["train-loss"]}
    assert said["models"]["model.onnx"]["accuracy"] == seen["accuracy"]
    assert said["models"]["model.int8.onnx"]["accuracy"] == pytest.approx(seen["accuracy"], abs=0.05)
    files = {path.name: path.stat().st_mode & 0o777 for path in out.iterdir()}
    assert files == dict.fromkeys(("model.safetensors", "model.onnx", "model.int8.onnx", "model.json"), 0o600)
    opened = open_model_file(FileStore(run / "devices" / "device-2", Policy()), run / "model.encrypted")
    weights = load_file(out / "model.safetensors")
    assert all(np.array_equal(weights[name].numpy(), array) for name, array in opened.arrays.items())

    images = (load_digits().images.reshape(-1, 64)[:40] / 16).astype(np.float32)
    np.save(tmp_path / "images.npy", images)
    answer = propolis("predict", "--model", out / "model.onnx", "--input", "images.npy", "--json")
    model = load_task("digits").model()
    model.load_state_dict(weights)
    expected = model.eval()(torch.from_numpy(images)).detach().numpy()
    np.testing.assert_allclose(json.loads(answer.stdout)["output"], expected, atol=1e-3)


def test_words_for_people_and_data_of_the_devices_own(
    run: Path, propolis: Command, mistake: Mistake, tmp_path: Path
) -> None:
    images, labels = load_digits(return_X_y=True)
    np.savez(tmp_path / "own.npz", inputs=(images[:60] / 16).astype(np.float32), labels=labels[:60])
    done = propolis(*opening(run, "--task", "digits", "--data", "own.npz"))
    assert done.returncode == 0, done.stderr
    first, second, third, *_, last = done.stdout.splitlines()
    assert first.startswith("opened: round 2, the sum of 4 devices, weight ")
    assert first.endswith(", no value was cut off")
    assert second.startswith("they say: train-loss ")
    assert third.startswith("out/model.onnx: ")
    assert last == "in out, in clear and for you alone"
    assert "out/model.safetensors is there already" in mistake(*opening(run, "--task", "digits"))


def test_mistakes_are_one_line_and_leave_nothing(run: Path, mistake: Mistake, tmp_path: Path) -> None:
    whole = (run / "model.encrypted").read_bytes()
    (run / "cut").write_bytes(whole[:-1000])
    (run / "empty").write_bytes(b"")
    keyless = copytree(run / "devices" / "device-1", tmp_path / "keyless")
    (keyless / "he.key").unlink()
    task = ("--task", "digits")
    assert "which task does it solve? give --task" in mistake(*opening(run))
    assert "cut cannot be opened" in mistake(*opening(run, *task, model="cut"))
    assert "empty cannot be opened" in mistake(*opening(run, *task, model="empty"))
    assert "nothing: No such file" in mistake(*opening(run, *task, model="nothing"))
    assert "config.toml cannot be opened" in mistake(*opening(run, *task, model="config.toml"))
    without = ("client", "open", run / "model.encrypted", "--dir", keyless, "--out", "out", *task)
    assert "this device has no key of homomorphic encryption" in mistake(*without)
    nobody = ("client", "open", run / "model.encrypted", "--dir", tmp_path / "nobody", "--out", "out", *task)
    assert "nobody holds no enrolled device" in mistake(*nobody)
    assert "--seven-bits is of the model in int8" in mistake(*opening(run, *task, "--seven-bits"))
    assert not (tmp_path / "out").exists()


def test_another_task_is_one_line(run: Path, mistake: Mistake, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(
        "from torch import nn\nfrom propolis.simulations.tasks.digits import Digits\n"
        "class Other(Digits):\n    def model(self):\n        return nn.Linear(64, 10)\n"
    )
    assert "these are not weights of the task's model" in mistake(*opening(run, "--task", "other:Other"))
    assert "unknown task 'faces'" in mistake(*opening(run, "--task", "faces"))
    assert not (tmp_path / "out").exists()


def test_another_federations_key_and_an_evaluation_are_one_line(run: Path, mistake: Mistake, tmp_path: Path) -> None:
    simulate(SETTINGS.model_copy(update={"rounds": 1}), RunOptions(tmp_path / "other"))
    task = ("--out", "out", "--task", "digits")
    device = ("--dir", tmp_path / "other" / "devices" / "device-1")
    assert "cannot be opened" in mistake("client", "open", run / "model.encrypted", *device, *task)
    state = load_checkpoint(run / CHECKPOINT, initial_model(SETTINGS, load_task("digits")), run_digest(SETTINGS))
    (run / "evaluation").write_bytes(state.grid["evaluation"].tobytes())
    assert "the metrics of an evaluation, and no model" in mistake(*opening(run, *task[2:], model="evaluation"))


def test_without_tenseal_the_extra_is_named(
    run: Path, mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tenseal").mkdir()
    (tmp_path / "tenseal" / "__init__.py").write_text("raise ModuleNotFoundError('no', name='tenseal')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    assert "needs TenSEAL: pip install 'propolis[he]'" in mistake(*opening(run, "--task", "digits"))
