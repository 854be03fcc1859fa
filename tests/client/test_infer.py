"""The file of a release that runs on a device is the first one that answers as it was recorded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from onnx_models import external, mixed
from releasing import NOW, Publisher, key_for, manifest_of
from runnable import FLOAT, INPUTS, INT8, Files, golden, outputs_of, release, scaled

from propolis.client import infer
from propolis.client.infer import Choice, choose, onnx_probe, open_installed, probe_of_this_device
from propolis.client.probe import try_model
from propolis.secure.errors import PeerError, Refusal, UsageError
from propolis.secure.manifest import Kind, Manifest

Released = Callable[..., tuple[Manifest, Mapping[str, bytes]]]


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path)


@pytest.fixture
def released(publisher: Publisher) -> Released:
    """The manifest and the content of a release of these files."""

    def make(files: Files, **facts: object) -> tuple[Manifest, Mapping[str, bytes]]:
        return manifest_of(publisher.seal(4, files, **facts)), {name: data for name, (data, _) in files.items()}

    return make


def chosen(release: tuple[Manifest, Mapping[str, bytes]]) -> Choice:
    choice = choose(*release)
    assert choice is not None
    return choice


def install(publisher: Publisher, sequence: int, files: Files, **facts: object) -> None:
    package = publisher.seal(sequence, files, **facts)
    publisher.device(probe=onnx_probe).install(package, key_for(package), NOW)


def test_int8_is_taken_where_it_computes_what_was_recorded(released: Released) -> None:
    choice = chosen(released(release()))
    assert (choice.file, choice.kind, choice.difference) == (INT8, Kind.INT8, 0.0)
    assert np.array_equal(choice.model.run(INPUTS)["output"], outputs_of(1))


def test_where_int8_differs_float32_of_the_same_package_is_taken(released: Released) -> None:
    choice = chosen(released(release(int8=1.1)))
    assert (choice.file, choice.kind, choice.difference) == (FLOAT, Kind.ONNX, 0.0)


def test_where_none_is_near_enough_the_smallest_difference_is_said(released: Released) -> None:
    manifest, files = released(release(int8=1.2, runs_as=1.1))
    assert onnx_probe(manifest, files) == pytest.approx(0.1 * 7 / 8, abs=1e-6)
    with pytest.raises(PeerError, match=r"differ by 0.0875, 0.001 at most") as caught:
        try_model(onnx_probe, manifest, files)
    assert caught.value.refusal is Refusal.PROBE
    manifest, files = released(release(int8=np.nan, runs_as=1.1))
    assert onnx_probe(manifest, files) == pytest.approx(0.1 * 7 / 8, abs=1e-6)


def test_nan_on_either_of_two_golden_batches_is_not_taken(released: Released) -> None:
    for first, second in ((1.0, np.nan), (np.nan, 1.0)):
        files = {"model.onnx": (scaled(1), Kind.ONNX)}
        batches = {"a.npz": (golden(**{FLOAT: first}), Kind.GOLDEN), "b.npz": (golden(**{FLOAT: second}), Kind.GOLDEN)}
        assert not chosen(released({**files, **batches})).is_near


def test_without_a_golden_batch_a_model_only_has_to_load(released: Released) -> None:
    files = {name: content for name, content in release(int8=9.0).items() if content[1] is not Kind.GOLDEN}
    assert (chosen(released(files)).file, chosen(released(files)).difference) == (INT8, 0.0)


def test_without_an_onnx_file_there_is_nothing_to_try(released: Released) -> None:
    release = released({"weights.bin": (b"weights", Kind.OTHER)})
    assert choose(*release) is None
    assert onnx_probe(*release) == 0.0


def test_a_model_is_served_under_its_name_and_the_version_that_was_released(released: Released) -> None:
    assert (chosen(released(release())).model.name, chosen(released(release())).model.version) == ("digits", "4")
    assert chosen(released(release(), model_version=17)).model.version == "17"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({FLOAT: (external("initializer").SerializeToString(), Kind.ONNX)}, f"{FLOAT}: the model has external data"),
        ({INT8: (external("subgraph").SerializeToString(), Kind.INT8)}, f"{INT8}: the model has external data"),
        ({FLOAT: (b"weights", Kind.ONNX)}, f"{FLOAT}: this is no ONNX model"),
        ({"golden.npz": (b"recorded", Kind.GOLDEN)}, "golden.npz: this is no golden batch"),
        ({INT8: (mixed(), Kind.INT8)}, "input 'default' is missing"),
    ],
    ids=["external data", "external data in int8", "no model", "no golden batch", "other inputs"],
)
def test_what_is_broken_is_refused_in_whatever_file(released: Released, change: Files, message: str) -> None:
    manifest, files = released({**release(), **change})
    with pytest.raises(PeerError, match="the model does not run") as caught:
        try_model(onnx_probe, manifest, files)
    assert (caught.value.refusal, message in str(caught.value)) == (Refusal.PROBE, True)


def test_where_there_is_no_runtime_the_log_says_that_nothing_is_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, publisher: Publisher
) -> None:
    assert probe_of_this_device() is not None
    assert not caplog.records
    monkeypatch.setattr(infer, "_RUNTIME", "a_runtime_that_is_not_there")
    with caplog.at_level(logging.WARNING):
        assert probe_of_this_device() is None
    assert "without being tried: pip install 'propolis[serve]'" in caplog.text
    install(publisher, 1, release(1))
    with pytest.raises(UsageError, match="inference needs ONNX Runtime"):
        open_installed(publisher.folder / "device-0", publisher.keyholder())


def test_what_is_installed_is_opened_ready_to_run(publisher: Publisher) -> None:
    install(publisher, 1, release(1))
    install(publisher, 2, release(2, int8=9.0))
    found = open_installed(publisher.folder / "device-0", publisher.keyholder(), "digits")
    assert (found.words, found.fell_back) == (f"release 2 of digits, {FLOAT}", False)
    assert np.array_equal(found.choice.model.run(INPUTS)["output"], outputs_of(2))


def test_where_the_current_release_does_not_run_any_more_the_one_before_is_opened(publisher: Publisher) -> None:
    install(publisher, 1, release(1))
    package = publisher.seal(2, release(2, int8=9.0, runs_as=9.0))
    publisher.device().install(package, key_for(package), NOW)  # where nothing could try it
    found = open_installed(publisher.folder / "device-0", publisher.keyholder())
    assert (found.choice.manifest.sequence, found.fell_back) == (1, True)
    assert np.array_equal(found.choice.model.run(INPUTS)["output"], outputs_of(1))


def test_a_release_without_an_onnx_file_cannot_be_run(publisher: Publisher) -> None:
    install(publisher, 1, {"weights.bin": (b"weights", Kind.OTHER)})
    with pytest.raises(UsageError, match="release 1 of digits has no ONNX file to run"):
        open_installed(publisher.folder / "device-0", publisher.keyholder())
