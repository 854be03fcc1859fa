"""A model is tried within its time, and whatever a probe does is an answer."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping

import pytest

from propolis.client.probe import try_model
from propolis.secure.errors import PeerError, Refusal
from propolis.secure.manifest import Manifest, Trial

MANIFEST = Manifest(
    *(bytes(32), "faces", 1, 0, bytes(32), 1, bytes(32), 17, bytes(32), 0, b"", 0, 0.0, 0.0, (), 0, 0, ()),
    trial=Trial(0.5, 5.0),
)
FILES = {"model.onnx": b"model"}


def test_a_probe_is_given_the_model_and_may_differ_as_far_as_the_manifest_says() -> None:
    seen: list[tuple[Manifest, Mapping[str, bytes]]] = []

    def probe(manifest: Manifest, files: Mapping[str, bytes]) -> float:
        seen.append((manifest, files))
        return 0.5

    try_model(probe, MANIFEST, FILES)
    assert seen == [(MANIFEST, FILES)]


@pytest.mark.parametrize("answer", [0.50001, float("nan"), float("inf"), None])
def test_other_answers_are_refused(answer: float) -> None:
    with pytest.raises(PeerError) as caught:
        try_model(lambda *_: answer, MANIFEST, FILES)
    assert caught.value.refusal is Refusal.PROBE


@pytest.mark.parametrize("error", [ValueError("bad"), MemoryError()])
def test_a_probe_that_raises_is_refused(error: Exception) -> None:
    def probe(*_: object) -> float:
        raise error

    with pytest.raises(PeerError, match="does not run"):
        try_model(probe, MANIFEST, FILES)


def test_a_probe_that_hangs_is_left_behind() -> None:
    forever = threading.Event()
    with pytest.raises(PeerError, match=r"has not answered the golden batch in 0.01 s"):
        try_model(lambda *_: float(forever.wait(60)), Manifest(**fields_with(Trial(0.5, 0.01))), FILES)
    forever.set()


def fields_with(trial: Trial) -> dict[str, object]:
    return {name: getattr(MANIFEST, name) for name in Manifest.__dataclass_fields__} | {"trial": trial}


HANGS = """
import time
from propolis.client.probe import try_model
from propolis.secure.errors import PeerError
from propolis.secure.manifest import Manifest, Trial
zero = bytes(32)
manifest = Manifest(zero, "faces", 1, 0, zero, 1, zero, 17, zero, 0, b"", 0, 0.0, 0.0, (), 0, 0, (), Trial(0.5, 0.01))
try:
    try_model(lambda *_: time.sleep(600), manifest, {})
except PeerError:
    print("refused")
"""


def test_a_process_ends_although_a_probe_hangs() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "refused\n"
