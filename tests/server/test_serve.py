"""Models that are served from a registry, and change there while they are."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from inferring import DEADLINE_S, rows, tensor
from onnx_models import WEIGHTS, linear
from registries import model_file, the_blobs
from serving_processes import serving

from propolis.secure.errors import StorageError, UsageError
from propolis.secure.manifest import Kind
from propolis.server.registry import Registry
from propolis.server.serve import RegistryModels, Wanted

FLOAT32, INT8 = ("model.onnx", Kind.ONNX), ("model.int8.onnx", Kind.INT8)


def add_version(registry: Registry, *files: tuple[str, Kind], model: str = "digits", batch: int | str = "batch") -> int:
    """A version with the linear model in these files; the one in int8 takes batches of one only."""
    version = registry.register(model, model_file(Path(registry.name).parent, len(registry.versions())))
    for name, kind in files:
        registry.attach(version, name, kind, linear(1) if kind is Kind.INT8 else linear(batch))
    return version.version


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry.make(tmp_path / "registry")
    add_version(made, FLOAT32, INT8)
    made.promote("digits", 1)
    return made


def models(registry: Registry, *names: str, **options: bool) -> RegistryModels:
    return RegistryModels(registry, [Wanted.parse(name) for name in names or ("digits",)], **options)


def test_a_name_alone_is_its_champion() -> None:
    assert Wanted.parse("digits") == Wanted("digits", "champion")
    assert Wanted.parse("digits@challenger") == Wanted("digits", "challenger")
    for text in ("@1", "digits@", ""):
        with pytest.raises(UsageError, match="expected NAME, or NAME@ALIAS"):
            Wanted.parse(text)


def test_a_model_has_the_registrys_name_and_version_and_the_file_that_is_preferred(registry: Registry) -> None:
    (model,) = models(registry).load()
    assert (model.name, model.version, model.is_batched) == ("digits", "1", True)
    (model,) = models(registry, prefers_int8=True).load()
    assert not model.is_batched, "the model in int8"
    add_version(registry, FLOAT32)
    (model,) = models(registry, "digits@2", prefers_int8=True).load()
    assert (model.version, model.is_batched) == ("2", True), "the only one that there is"


def test_what_is_newer_is_returned_once(registry: Registry) -> None:
    served = models(registry, "digits", "digits@1")
    served.load()
    assert served.newer() == []
    add_version(registry, FLOAT32)
    assert served.newer() == []
    registry.promote("digits", 2)
    assert [model.version for model in served.newer()] == ["2"]
    assert served.newer() == []
    registry.rollback("digits")
    assert [model.version for model in served.newer()] == ["1"]


def test_one_that_fails_keeps_no_other_from_being_replaced(registry: Registry) -> None:
    add_version(registry, FLOAT32, model="faces")
    registry.promote("faces", 1)
    served = models(registry, "digits", "faces")
    served.load()
    add_version(registry)
    registry.promote("digits", 2)
    add_version(registry, FLOAT32, model="faces")
    registry.promote("faces", 2)
    assert [(model.name, model.version) for model in served.newer()] == [("faces", "2")]
    with pytest.raises(UsageError, match="digits 2 has no file to serve: propolis models convert digits 2 makes one"):
        served.newer()


def test_a_file_that_is_damaged_is_not_served(registry: Registry, tmp_path: Path) -> None:
    for blob in the_blobs(tmp_path / "registry"):
        blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"model\.onnx of digits 1 cannot be read: chunk 0 is damaged"):
        models(registry).load()


def version_asked(client: triton.InferenceServerClient) -> str:
    result = client.infer("digits", [tensor("input", "FP32", rows(1))], client_timeout=DEADLINE_S)
    assert np.allclose(result.as_numpy("output"), rows(1) @ WEIGHTS, atol=1e-6)
    return str(result.get_response().model_version)


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until
        threading.Event().wait(0.02)


def test_a_promotion_changes_what_is_served_and_a_registry_that_is_away_does_not(
    registry: Registry, tmp_path: Path
) -> None:
    add_version(registry, FLOAT32)
    add_version(registry, FLOAT32)
    (tmp_path / "linear.onnx").write_bytes(linear())
    flags = ("--registry", "registry", "--model", "digits", "--model", "file=linear.onnx", "--refresh", 0.05)
    logged: list[dict[str, str]] = []
    with serving(tmp_path, ["serve"], *flags) as (process, url):
        assert process.stderr is not None
        reading = threading.Thread(target=lambda: logged.extend(map(json.loads, process.stderr)), daemon=True)
        reading.start()
        with triton.InferenceServerClient(url) as client:
            assert client.is_model_ready("file")
            assert version_asked(client) == "1"
            registry.promote("digits", 2)
            wait_until(lambda: version_asked(client) == "2")
            (tmp_path / "registry").rename(tmp_path / "away")
            for _ in range(20):
                assert version_asked(client) == "2"
                threading.Event().wait(0.02)
            (tmp_path / "away").rename(tmp_path / "registry")
            Registry(tmp_path / "registry").promote("digits", 3)
            wait_until(lambda: version_asked(client) == "3")
        process.terminate()
        assert process.wait(DEADLINE_S) == 0
        reading.join(DEADLINE_S)
    failures = [line for line in logged if line["message"] == "no newer models: those that are served stay"]
    assert len(failures) == 1
    assert "registry" in failures[0]["error"]
    left = [path for path in tmp_path.rglob("*") if path.suffix == ".onnx" and path.name != "linear.onnx"]
    assert left == []


def test_without_refresh_a_promotion_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    add_version(registry, FLOAT32)
    flags = ("--registry", "registry", "--model", "digits", "--refresh", 0, "--prefer-int8")
    with serving(tmp_path, ["serve"], *flags) as (_, url), triton.InferenceServerClient(url) as client:
        registry.promote("digits", 2)
        threading.Event().wait(0.3)
        assert version_asked(client) == "1"
        assert [each.shape[0] for each in client.get_model_metadata("digits").inputs] == [1], "the model in int8"


def test_mistakes_are_one_line(registry: Registry, mistake: Callable[..., str]) -> None:
    add_version(registry)
    there = ("serve", "--registry", "registry", "--model")
    assert "expected NAME=FILE.onnx, or --registry too" in mistake("serve", "--model", "digits")
    assert "digits 2 has no file to serve: propolis models convert digits 2" in mistake(*there, "digits@2")
    assert "there is no model 'faces'" in mistake(*there, "faces")
    assert "digits has no version or alias 'x'" in mistake(*there, "digits@x")
    assert "expected NAME, or NAME@ALIAS" in mistake(*there, "digits@")
    assert "two models have one name" in mistake(*there, "digits", "--model", "digits@1")
    assert "there is no registry in elsewhere" in mistake("serve", "--registry", "elsewhere", "--model", "digits")


def test_a_registry_that_cannot_be_reached_is_a_failure_of_the_look(registry: Registry, tmp_path: Path) -> None:
    served = models(registry)
    served.load()
    (tmp_path / "registry").rename(tmp_path / "away")
    with pytest.raises(StorageError):
        served.newer()
