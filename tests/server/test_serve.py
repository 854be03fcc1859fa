"""Models that are served from a registry, and change there while they are."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from inferring import DEADLINE_S, rows, tensor
from onnx_models import WEIGHTS, linear
from registries import model_file, the_blobs
from serving_processes import serving

from harness import wait_until
from propolis.secure.errors import StorageError, UsageError
from propolis.secure.manifest import Kind
from propolis.server.registry import Registry
from propolis.server.registry_records import Version
from propolis.server.serve import RegistryModels, Wanted
from propolis.serving.golden import Golden

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
    assert list(served.newer()) == []
    add_version(registry, FLOAT32)
    assert list(served.newer()) == []
    registry.promote("digits", 2)
    assert [model.version for model in list(served.newer())] == ["2"]
    assert list(served.newer()) == []
    registry.rollback("digits")
    assert [model.version for model in list(served.newer())] == ["1"]


def test_one_that_fails_keeps_no_other_from_being_replaced(registry: Registry) -> None:
    add_version(registry, FLOAT32, model="faces")
    registry.promote("faces", 1)
    served = models(registry, "digits", "faces")
    served.load()
    add_version(registry)
    registry.promote("digits", 2)
    add_version(registry, FLOAT32, model="faces")
    registry.promote("faces", 2)
    looking = served.newer()
    assert [(model.name, model.version) for model in [next(looking)]] == [("faces", "2")]
    for left in (looking, served.newer(), served.newer()):
        with pytest.raises(UsageError, match="digits 2 has no file to serve: propolis models convert digits 2 makes"):
            next(left)
    registry.attach(registry.version("digits", 2), *FLOAT32, linear())
    assert [(model.name, model.version) for model in served.newer()] == [("digits", "2")]


def test_one_that_was_not_taken_over_is_given_again(registry: Registry) -> None:
    served = models(registry)
    assert [model.version for model in itertools.islice(served.newer(), 1)] == ["1"]  # and what takes it over fails
    assert [model.version for model in served.newer()] == ["1"]
    assert list(served.newer()) == []


class Failing:
    """A registry whose files cannot be read as often as it says."""

    def __init__(self, registry: Registry) -> None:
        self.registry, self.failures, self.reads = registry, 0, 0

    def version(self, model: str, version: str) -> Version:
        return self.registry.version(model, version)

    def artifact(self, version: Version, name: str) -> bytes:
        self.reads += 1
        if self.failures:
            self.failures -= 1
            raise ConnectionError("reset")
        return self.registry.artifact(version, name)


def looks(served: RegistryModels, count: int) -> list[str]:
    """The version that is given, or why there is none, of so many looks."""
    found = []
    for _ in range(count):
        try:
            found.extend(model.version for model in served.newer())
        except Exception as error:
            found.append(str(error))
    return found


def test_what_fails_is_tried_again_less_and_less_often(registry: Registry) -> None:
    failing = Failing(registry)
    served = RegistryModels(failing, [Wanted("digits", "champion")])  # type: ignore[arg-type]
    failing.failures = 3
    assert looks(served, 11) == [*["ConnectionError: reset"] * 10, "1"]  # it tries at the looks 1, 3, 6 and 11
    assert failing.reads == 4


def test_what_cannot_be_served_is_not_read_again_until_there_is_another(registry: Registry) -> None:
    bad = registry.register("bad", model_file(Path(registry.name).parent, 50))
    registry.attach(bad, *FLOAT32, b"no model")
    failing = Failing(registry)
    served = RegistryModels(failing, [Wanted("bad", "1"), Wanted("digits", "champion")])  # type: ignore[arg-type]
    assert looks(served, 50) == ["1", *["model.onnx of bad 1: this is no ONNX model"] * 50]
    assert failing.reads == 2


def golden(**factors: float) -> bytes:
    """Outputs of the linear model, for each file times its factor."""
    inputs = {"input": np.ones((1, 4), np.float32)}
    outputs = {f"{name.replace('_', '.')}.onnx": {"output": inputs["input"] @ WEIGHTS * factor}
               for name, factor in factors.items()}  # fmt: skip
    return Golden(inputs, outputs).to_bytes()


def test_a_model_is_tried_before_it_is_served(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    registry.attach(registry.version("digits", 1), "golden.npz", Kind.GOLDEN, golden(model=2, model_int8=1))
    differs = r"model\.onnx of digits 1: outputs on the golden batch differ by 2, 0\.001 at most"
    with pytest.raises(UsageError, match=differs):
        models(registry).load()
    (model,) = models(registry, prefers_int8=True).load()
    assert not model.is_batched, "the model in int8 computes what it must"
    add_version(registry, FLOAT32, INT8)
    registry.attach(registry.version("digits", 2), "golden.npz", Kind.GOLDEN, golden(model=1, model_int8=2))
    (model,) = models(registry, "digits@2", prefers_int8=True).load()
    assert model.is_batched, "that in float32"
    assert "model.onnx is served instead: model.int8.onnx of digits 2: outputs on" in caplog.text
    served = models(registry, prefers_int8=True)
    served.load()
    add_version(registry, FLOAT32)
    registry.attach(registry.version("digits", 3), "golden.npz", Kind.GOLDEN, golden(model=float("nan")))
    registry.promote("digits", 3)
    assert "outputs on the golden batch differ by nan" in looks(served, 1)[0]


def test_a_file_that_is_damaged_is_not_served(registry: Registry, tmp_path: Path) -> None:
    for blob in the_blobs(tmp_path / "registry"):
        blob.write_bytes(blob.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"model\.onnx of digits 1 cannot be read: chunk 0 is damaged"):
        models(registry).load()


def version_asked(client: triton.InferenceServerClient) -> str:
    result = client.infer("digits", [tensor("input", "FP32", rows(1))], client_timeout=DEADLINE_S)
    assert np.allclose(result.as_numpy("output"), rows(1) @ WEIGHTS, atol=1e-6)
    return str(result.get_response().model_version)


def test_a_promotion_changes_what_is_served_and_a_registry_that_is_away_does_not(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_version(registry, FLOAT32)
    add_version(registry, FLOAT32)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
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
            wait_until(lambda: version_asked(client) == "2", DEADLINE_S)
            (tmp_path / "registry").rename(tmp_path / "away")
            for _ in range(20):
                assert version_asked(client) == "2"
                threading.Event().wait(0.02)
            (tmp_path / "away").rename(tmp_path / "registry")
            Registry(tmp_path / "registry").promote("digits", 3)
            wait_until(lambda: version_asked(client) == "3", DEADLINE_S)
            assert holding_weights(tmp_path) == ["linear.onnx"], "the one that is served from a file"
        process.terminate()
        assert process.wait(DEADLINE_S) == 0
        reading.join(DEADLINE_S)
    failures = [line for line in logged if line["message"] == "no newer models: those that are served stay"]
    assert len(failures) == 1
    assert failures[0]["error"] == "StorageError: the registry in registry: unable to open database file"
    assert holding_weights(tmp_path) == ["linear.onnx"]


def holding_weights(folder: Path) -> list[str]:
    """Names of the files with the model's weights in clear."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return [path.name for path in files if WEIGHTS.tobytes() in path.read_bytes()]


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
        list(served.newer())
