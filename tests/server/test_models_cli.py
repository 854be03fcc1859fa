from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command
from registries import KEY, content, model_file

from propolis.secure.errors import UsageError
from propolis.server import registration
from propolis.server.evaluation import evaluate_version
from propolis.server.job import RunOptions
from propolis.server.mlflow_export import export_to_mlflow
from propolis.server.registration import Registration, register_run
from propolis.server.registry import Registry
from propolis.server.registry_records import Lineage
from propolis.settings import Settings
from propolis.simulations.run import simulate

SMALL = ("--task", "harness:Blobs", "--clients", 3, "--rounds", 2, "--epochs", 1)


@pytest.fixture
def models(propolis: Command, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``propolis models ARGUMENTS`` on a registry of this test's own, which must succeed."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        done = propolis("models", *arguments, "--registry", tmp_path / "registry")
        assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture(autouse=True)
def _harness_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]), prepend=os.pathsep)


def test_a_model_from_file_to_rollback(models: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    file = model_file(tmp_path)
    done = models("register", file, "--model", "digits")
    assert done.stdout == f"registered as digits 1 in {tmp_path / 'registry'}\n"
    assert done.stderr.startswith("made the registry in")
    assert "registry.key" in done.stderr
    assert models("register", file, "--model", "digits", "--parent", 1).stderr == ""
    models("promote", "digits", 1)
    assert models("promote", "digits", 2).stdout == "champion of digits is version 2\n"
    assert json.loads(models("rollback", "digits", "--json").stdout)["aliases"] == ["champion"]
    assert models("tag", "digits", 2, "site=a", "stage=test", "--remove", "old").stdout.endswith("site=a stage=test\n")
    models("verify", "digits", "champion")
    models("export", "digits", 2, "--out", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == file.read_bytes()
    listed = json.loads(models("list", "--json").stdout)
    assert [(each["version"], each["aliases"], each["tags"]) for each in listed] == [
        (1, ["champion"], {}),
        (2, [], {"site": "a", "stage": "test"}),
    ]
    head, first, second = models("list", "digits").stdout.splitlines()
    assert head.split()[:2] == ["model", "version"]
    assert first.endswith("champion")
    assert second.startswith("digits  2")
    assert "parent     1" in models("show", "digits", 2).stdout
    assert json.loads(models("sweep", "--json").stdout) == {"swept": [], "removed": True}


def test_mistakes_are_one_line(mistake: Callable[..., str], tmp_path: Path) -> None:
    there = ("--registry", tmp_path / "registry")
    assert mistake("models", "list").endswith("say which registry: --registry, or the variable PROPOLIS_REGISTRY")
    assert "propolis models init makes one" in mistake("models", "list", *there)
    Registry.make(tmp_path / "registry").register("digits", model_file(tmp_path))
    assert "there is no model 'faces'" in mistake("models", "show", "faces", 1, *there)
    assert "expected KEY=VALUE" in mistake("models", "tag", "digits", 1, "site", *there)
    assert "say which tag" in mistake("models", "tag", "digits", 1, *there)
    assert "is there already" in mistake("models", "export", "digits", 1, "--out", tmp_path / "registry", *there)
    assert "with --registry" in mistake("simulate", "--model", "digits")
    assert "expected at most 64" in mistake("simulate", "--model", "../x", "--registry", tmp_path / "registry")
    assert "--blobs" in mistake("models", "init", *there, "--blobs", tmp_path / "elsewhere")


def test_the_models_of_a_new_registry_may_lie_elsewhere(
    propolis: Command, models: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    assert json.loads(models("init", "--blobs", tmp_path / "elsewhere", "--json").stdout)["new"]
    assert "there is a registry" in models("init").stdout
    models("register", model_file(tmp_path), "--model", "digits")
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_a_complete_run_is_a_version_with_its_lineage(propolis: Command, tmp_path: Path) -> None:
    done = propolis("simulate", *SMALL, "--protection", "secagg", "--out", "run", "--registry", "registry")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("registered as harness.Blobs 1 in registry\n")
    version = Registry(tmp_path / "registry").version("harness.Blobs", 1)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    lineage = version.lineage
    assert (lineage.round, lineage.survivors) == (2, 3)
    assert (lineage.uplink_bytes, lineage.downlink_bytes) == (result["uplink_bytes"], result["downlink_bytes"])
    assert lineage.metrics["accuracy"] == result["accuracy"]
    assert lineage.configuration["protection"] == "secagg"
    assert len(bytes.fromhex(lineage.federation or "")) == 32
    model = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert content(Registry(tmp_path / "registry"), "harness.Blobs", 1) == model
    again = propolis("simulate", "--resume", "run", "--registry", "registry", "--model", "harness.Blobs", "--json")
    assert json.loads(again.stdout)["registered"]["version"] == 1, "the same run is the same version"


def test_a_run_that_fails_registers_nothing(propolis: Command, tmp_path: Path) -> None:
    done = propolis("simulate", *SMALL, "--dropout", 0.99, "--attempts", 1, "--out", "run", "--registry", "registry")
    assert done.returncode == 1
    assert Registry(tmp_path / "registry").versions() == []
    with pytest.raises(UsageError, match="is not complete"):
        register_run(Registry(tmp_path / "registry"), "digits", tmp_path / "run")


def test_a_registry_that_is_not_usable_is_said_before_the_run(mistake: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "cannot make a registry in file" in mistake("simulate", *SMALL, "--out", "run", "--registry", "file")
    assert not (tmp_path / "run").exists()


def test_the_model_has_the_tasks_name_unless_it_has_its_own() -> None:
    assert Registration.asked("r", None, "pkg.tasks:Mine") == Registration("r", "pkg.tasks.Mine")
    assert Registration.asked("r", "mine", "digits") == Registration("r", "mine")
    assert Registration.asked(None, None, "digits") is None


def test_a_version_is_evaluated_on_the_tasks_test_set(propolis: Command, tmp_path: Path) -> None:
    done = propolis("simulate", *SMALL, "--out", "run", "--registry", "registry", "--model", "blobs")
    assert done.returncode == 0, done.stderr
    registry = Registry(tmp_path / "registry")
    evaluated = evaluate_version(registry, registry.version("blobs", 1), "harness:Blobs")
    (evaluation,) = evaluated.evaluations
    assert evaluation.data == "harness:Blobs"
    assert evaluation.metrics["accuracy"] == pytest.approx(evaluated.lineage.metrics["accuracy"])
    (tmp_path / "clinic").mkdir()
    registry.register("blobs", model_file(tmp_path))
    with pytest.raises(UsageError, match="blobs 2 is no model of task 'harness:Blobs'"):
        evaluate_version(registry, registry.version("blobs", 2), "harness:Blobs")
    named = evaluate_version(registry, registry.version("blobs", 1), "harness:Blobs", str(tmp_path / "clinic"))
    assert named.evaluations[-1].data == "harness:Blobs:clinic"


def test_versions_go_to_mlflow_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("PROPOLIS_REGISTRY_KEY", KEY)
    registry, file = Registry.make(tmp_path / "registry"), model_file(tmp_path)
    lineage = Lineage(metrics={"accuracy": 0.5, "odd": float("nan")}, configuration={"rounds": 3})
    version = registry.register("digits", file, lineage)
    registry.add_evaluation(version, "pkg:Task:clinic", {"accuracy": 0.75})
    registry.tag("digits", 1, {"site": "a"})
    registry.promote("digits", 1)
    uri, artifacts = f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "artifacts")
    assert export_to_mlflow(registry, "digits", uri, artifacts) == {1: 1}
    registry.register("digits", file)
    assert export_to_mlflow(registry, "digits", uri) == {1: 1, 2: 2}
    client = mlflow.MlflowClient(uri, uri)
    found = client.get_model_version_by_alias("digits", "champion")
    assert (int(found.version), found.tags["site"]) == (1, "a")
    assert found.tags["propolis.sha256"] == version.digest
    run = client.get_run(found.run_id)
    assert run.data.params["rounds"] == "3"
    assert run.data.metrics == {"accuracy": 0.5, "pkg-Task-clinic/accuracy": 0.75}
    assert (Path(found.source) / "model.safetensors").read_bytes() == file.read_bytes()
    with pytest.raises(UsageError, match="there is no model 'faces'"):
        export_to_mlflow(registry, "faces", uri)
    assert client.get_experiment_by_name("faces") is None
    with pytest.raises(UsageError, match=r"MLflow at file:.*: The filesystem tracking backend"):
        export_to_mlflow(registry, "digits", f"file:{tmp_path}/mlruns")


@pytest.mark.parametrize(
    ("absent", "said"),
    [("mlflow", "pip install 'propolis[mlflow]'"), ("sqlalchemy", "pip install 'propolis[registry]'")],
)
def test_what_is_not_installed_is_said(tmp_path: Path, absent: str, said: str) -> None:
    Registry.make(tmp_path / "registry").register("digits", model_file(tmp_path))
    code = f"import sys; sys.modules['{absent}'] = None; from propolis.cli import main; main()"
    words = ["models", "export-mlflow", "digits", "--to", "sqlite:///m.db", "--registry", str(tmp_path / "registry")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_a_run_that_replaces_another_is_another_version(tmp_path: Path) -> None:
    registration = Registration(str(tmp_path / "registry"), "blobs")
    settings = Settings(task="harness:Blobs", clients=3, rounds=1, epochs=1)
    first = simulate(settings, RunOptions(tmp_path / "run", registration=registration))
    assert first["registered"] == {"registry": str(tmp_path / "registry"), "model": "blobs", "version": 1}
    assert (
        simulate(settings, RunOptions(tmp_path / "run", force=True, registration=registration))["registered"]["version"]
        == 2
    )


def test_a_run_that_is_registered_twice_at_once_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, other = secrets.token_hex, list[str]()

    def after_somebody_else(count: int) -> str:
        monkeypatch.setattr(secrets, "token_hex", drawn)
        other.append(registration._identity_of(tmp_path, None)["run_id"])
        return drawn(count)

    monkeypatch.setattr(secrets, "token_hex", after_somebody_else)
    assert [registration._identity_of(tmp_path, None)["run_id"]] == other
    assert registration._identity_of(tmp_path, None)["run_id"] == other[0]


def test_a_run_that_was_interrupted_is_not_registered_later(tmp_path: Path) -> None:
    simulate(Settings(task="harness:Blobs", clients=3, rounds=1, epochs=1), RunOptions(tmp_path / "run"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    (tmp_path / "run" / "result.json").write_text(json.dumps({**result, "status": "interrupted"}))
    with pytest.raises(UsageError, match="is not complete: only complete ones are registered"):
        register_run(Registry.make(tmp_path / "registry"), "blobs", tmp_path / "run")
