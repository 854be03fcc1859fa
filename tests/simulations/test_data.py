from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from propolis.secure.errors import UsageError
from propolis.simulations.data import read_idx
from propolis.simulations.tasks.digits import Digits
from propolis.simulations.tasks.fashion_mnist import DEBIAN_FOLDER, FashionMnist
from propolis.task import check_task


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder: Path, packed: bool = False) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 60), ("t10k", 20)):
        files = {
            f"{part}-images-idx3-ubyte": rng.integers(0, 256, (count, 28, 28), dtype=np.uint8),
            f"{part}-labels-idx1-ubyte": np.arange(count, dtype=np.uint8) % 10,
        }
        for name, array in files.items():
            path, data = folder / name, idx(array)
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(data))
            else:
                path.write_bytes(data)


@pytest.mark.parametrize("packed", [False, True])
def test_fashion_mnist_from_a_folder(tmp_path: Path, packed: bool) -> None:
    write_fashion(tmp_path, packed)
    data = check_task(FashionMnist(tmp_path))
    assert (len(data.train), len(data.test)) == (60, 20)
    assert data.train.inputs[:].shape == (60, 784)
    assert len(FashionMnist().device_data(tmp_path)) == 60


def test_missing_files_say_the_command_that_gets_them(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sudo apt-get install dataset-fashion-mnist"):
        FashionMnist(tmp_path).data()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"", "expected the magic number 00000803, got an empty file"),
        (
            "train-images-idx3-ubyte",
            b"\x00\x00\x0d\x03" + bytes(40),
            "expected the magic number 00000803, got 00000d03",
        ),
        ("train-labels-idx1-ubyte", idx(np.zeros((60, 2), np.uint8)), "expected the magic number 00000801"),
        ("train-images-idx3-ubyte", b"\x00\x00\x08\x03\x00", "the header is cut off after 5 bytes"),
        ("train-images-idx3-ubyte", idx(np.zeros((60, 28, 28), np.uint8))[:-1], "expected 47056 bytes"),
        ("train-images-idx3-ubyte", idx(np.zeros((60, 28, 28), np.uint8)) + b"\0", "expected 47056 bytes"),
        ("train-images-idx3-ubyte", b"\x00\x00\x08\x03" + b"\xff" * 12, "expected 79228162458924105385300197391 bytes"),
        ("train-images-idx3-ubyte", idx(np.zeros((60, 14, 28), np.uint8)), "expected (28, 28)"),
        ("train-labels-idx1-ubyte", idx(np.full(60, 11, np.uint8)), "a label in"),
        ("train-labels-idx1-ubyte", idx(np.zeros(59, np.uint8)), "60 inputs but 59 labels"),
    ],
)
def test_corrupt_files_are_one_clear_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write_fashion(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        FashionMnist(tmp_path).data()
    assert message in str(caught.value)


def test_a_cut_gzip_file_is_one_clear_error(tmp_path: Path) -> None:
    write_fashion(tmp_path, packed=True)
    path = tmp_path / "train-labels-idx1-ubyte.gz"
    for damaged in (path.read_bytes()[:-9], b"not gzip", path.read_bytes()[:20] + b"\xff" * 30):
        path.write_bytes(damaged)
        with pytest.raises(UsageError, match="is not a whole gzip file"):
            FashionMnist(tmp_path).data()


@given(st.binary(max_size=64))
def test_any_bytes_raise_only_our_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("idx")
    (folder / "file").write_bytes(content)
    try:
        array = read_idx(folder, "file", dimensions=1)
    except UsageError:
        return
    assert content == idx(array)


def test_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    data = check_task(Digits())
    assert (len(data.train), len(data.test)) == (1438, 359)
    pixels, labels = load_digits(return_X_y=True)
    ours = torch.cat([data.train.inputs[:], data.test.inputs[:]]).numpy() * 6.017 + 4.884
    assert np.array_equal(np.sort(np.rint(ours).sum(axis=1)), np.sort(pixels.sum(axis=1)))
    assert torch.bincount(torch.cat([data.train.labels, data.test.labels])).tolist() == np.bincount(labels).tolist()


@pytest.mark.skipif(not DEBIAN_FOLDER.exists(), reason="dataset-fashion-mnist is not installed")
def test_the_real_fashion_mnist() -> None:
    data = check_task(FashionMnist())
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert torch.bincount(data.test.labels).tolist() == [1000] * 10
    pixels = data.train.inputs[:]
    assert abs(float(pixels.mean())) < 1e-3
    assert float(pixels.std()) == pytest.approx(1, abs=1e-3)
