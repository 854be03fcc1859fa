"""An encrypted model in the registry: kept as it came, with its lineage; what needs the weights is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from encrypted_app import EncryptedHive
from registries import content, model_file
from sqlalchemy import text

from propolis.secure.errors import UsageError
from propolis.secure.he.messages import EncryptedPlan, EncryptedSum
from propolis.secure.secagg.plan import Kind
from propolis.server.convert_version import convert_version
from propolis.server.evaluation import evaluate_version
from propolis.server.job import RunOptions
from propolis.server.mlflow_export import export_to_mlflow
from propolis.server.registration import Registration, register_run
from propolis.server.registry import Registry
from propolis.server.registry_records import Format, Version
from propolis.server.serve import RegistryModels, Wanted
from propolis.settings import Settings
from propolis.simulations.run import simulate

Mistake = Callable[..., str]


@pytest.fixture(scope="module")
def model() -> bytes:
    hive = EncryptedHive(5)
    hive.round(**{"server-round": 1})
    assert hive.grid.model is not None
    return hive.grid.model.to_bytes()


@pytest.fixture
def file(model: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "model.encrypted"
    path.write_bytes(model)
    return path


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.make(tmp_path / "registry")


def test_a_run_registers_its_encrypted_model_with_its_lineage(tmp_path: Path) -> None:
    settings = Settings(clients=3, rounds=2, epochs=1, protection="he")
    there = Registration.asked(str(tmp_path / "registry"), None, settings.task)
    result = simulate(settings, RunOptions(tmp_path / "run", registration=there))
    registry = Registry(tmp_path / "registry")
    version = registry.version("digits", 1)
    assert version.format is Format.ENCRYPTED
    assert content(registry, "digits", 1) == (tmp_path / "run" / "model.encrypted").read_bytes()
    lineage = version.lineage
    assert (lineage.round, lineage.survivors, lineage.configuration["protection"]) == (2, 3, "he")
    assert lineage.uplink_bytes == result["uplink_bytes"]
    assert lineage.federation == json.loads((tmp_path / "run" / "run.json").read_text())["federation"] is not None
    assert lineage.metrics == {}  # what a device saw is not what the server knows
    assert register_run(registry, "digits", tmp_path / "run") == version


def test_it_is_a_version_like_others(registry: Registry, file: Path, tmp_path: Path) -> None:
    first = registry.register("digits", file)
    second = registry.register("digits", model_file(tmp_path))
    assert (first.format, second.format) == (Format.ENCRYPTED, Format.SAFETENSORS)
    registry.verify(first)
    registry.promote("digits", 1)
    registry.promote("digits", 2)
    assert registry.rollback("digits") == replace(first, aliases=("champion",))
    assert registry.tag("digits", 1, {"site": "a"}).tags == {"site": "a"}
    registry.export(first, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("act", "what"),
    [
        (lambda registry, version, _: convert_version(registry, version), "to convert it"),
        (lambda registry, version, _: evaluate_version(registry, version, "digits"), "to evaluate it"),
        (lambda registry, _, __: RegistryModels(registry, [Wanted("digits", "1")]).load(), "to serve it"),
        (lambda registry, _, to: export_to_mlflow(registry, "digits", f"sqlite:///{to}/mlflow.db"), "for MLflow"),
    ],
    ids=["convert", "evaluate", "serve", "mlflow"],
)
def test_what_needs_the_weights_is_refused_by_name(
    registry: Registry, file: Path, tmp_path: Path, act: Callable[[Registry, Version, Path], object], what: str
) -> None:
    version = registry.register("digits", file)
    with pytest.raises(UsageError) as caught:
        act(registry, version, tmp_path)
    said = str(caught.value)
    assert said.startswith(f"digits 1 is encrypted, and nothing here can read it {what}")
    assert said.endswith("propolis client open")
    assert "\n" not in said
    assert registry.version("digits", 1) == version
    assert not (tmp_path / "mlflow.db").exists()


def test_commands_know_encrypted_models(registry: Registry, file: Path, mistake: Mistake, propolis: Mistake) -> None:
    there = ("--registry", file.parent / "registry")
    registered = propolis("models", "register", file, "--model", "digits", *there, "--json")
    assert json.loads(registered.stdout)["format"] == "encrypted"  # type: ignore[attr-defined]
    assert "encrypted" in propolis("models", "list", *there).stdout  # type: ignore[attr-defined]
    assert "format     encrypted" in propolis("models", "show", "digits", 1, *there).stdout  # type: ignore[attr-defined]
    assert "propolis client open" in mistake("models", "convert", "digits", 1, *there)
    assert "propolis client open" in mistake("export", "--task", "digits", "--model", file, "--out", "out")


def test_an_evaluation_or_a_part_of_a_model_is_none(registry: Registry, model: bytes, tmp_path: Path) -> None:
    total = EncryptedSum.from_bytes(model)
    plan = replace(EncryptedPlan.from_bytes(total.plan), kind=int(Kind.EVALUATE), entries=())
    for name, data in {"evaluation": replace(total, plan=plan.encoded).to_bytes(), "cut": model[:-100]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UsageError, match="no file of safetensors, and no encrypted model"):
            registry.register("digits", tmp_path / name)


@pytest.mark.parametrize("said", [None, "safetensors"])
def test_a_format_that_was_changed_in_the_database_is_found_out(
    registry: Registry, file: Path, said: str | None
) -> None:
    registry.register("digits", file)
    with registry._database.writing() as connection:
        connection.execute(text("UPDATE propolis_version SET format = :said"), {"said": said})
    with pytest.raises(UsageError, match="somebody without the registry's key changed"):
        b"".join(registry.read(registry.version("digits", 1)))


def test_a_format_that_is_none_is_one_line(registry: Registry, file: Path) -> None:
    registry.register("digits", file)
    with registry._database.writing() as connection:
        connection.execute(text("UPDATE propolis_version SET format = 'pickle'"))
    with pytest.raises(UsageError, match="digits 1 has a format that is none of safetensors, encrypted: 'pickle'"):
        registry.version("digits", 1)
