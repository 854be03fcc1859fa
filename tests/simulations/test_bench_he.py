from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from propolis.cli import app
from propolis.secure.errors import PropolisError, UsageError
from propolis.simulations.bench import he_memory
from propolis.simulations.bench.he import OURS, Effort, costs, in_turns, memory, noise, parts
from propolis.simulations.bench.he_masks import masking
from propolis.simulations.bench.he_sides import Bfv, Ckks, Reals
from propolis.simulations.bench.link_parts import Figure

SMALL = Effort(parameters=49_152, turns=3, clients=(2, 5), model=30_000, devices=3)


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures}


def test_ours_stand_beside_ckks_and_are_exact() -> None:
    figures = by_name(costs(SMALL))
    names = [name.split(":")[0] for name in figures if name.endswith(": up")]
    assert len(names) == len(OURS) + 1
    for name in names[:-1]:
        assert figures[f"{name}: up"].is_met
        assert figures[f"{name}: error of a sum, in steps"].value == 0
        assert 0 < figures[f"{name}: error of a mean in [-1, 1]"].value < 0.005
        for what in ("encrypt", "server reads and adds", "server writes the sum", "open", "adding beside CKKS"):
            assert figures[f"{name}: {what}"].value > 0
    assert figures[f"{names[-1]}: up"].value > 5 * figures[f"{names[0]}: up"].value
    assert figures[f"{names[-1]}: error of a mean in [-1, 1]"].value < 1e-5


def test_a_side_that_is_wrong_or_slow_shows() -> None:
    class Wrong(Bfv):
        def open(self, sums: Sequence[bytes], count: int) -> Reals:
            opened = super().open(sums, count)
            opened[-1] += 1 / self.levels
            return opened

    class Slow(Bfv):
        def add(self, upload: Sequence[bytes]) -> None:
            time.sleep(0.1)
            super().add(upload)

    sides = [Wrong(32, 8, False, 100), Slow(32, 8, True, 100)]
    taken = in_turns([*sides, Ckks()], 100, 3)
    wrong, slow = (taken[side.name] for side in sides)
    assert wrong.steps == 3  # a step of the mean is one for each device of the sum
    assert slow.steps == 0
    assert min(slow.add) >= 0.1 > np.median(wrong.add)
    assert len(wrong.add) == 2  # the first turn warms up


def test_there_are_no_more_turns_than_devices_that_a_sum_has_room_for() -> None:
    taken = in_turns([Bfv(32, 8, True, 10)], 10, 40)
    (only,) = taken.values()
    assert len(only.add) == 31


def test_masks_come_off_and_cost_something() -> None:
    figures = by_name(masking(20_000, 2))
    for mode in ("public-key", "seeded"):
        assert figures[f"{mode}: what is opened then is off by"].is_met
        assert figures[f"{mode}: encrypt under 10 masks"].value > 0
        assert figures[f"{mode}: server takes 10 masks from the sum"].value > 0


def test_noise_is_looked_at_for_all_clients() -> None:
    figures = by_name(noise(SMALL))
    assert len(figures) == 8
    for name in ("n = 2, public-key", "n = 2, seeded", "n = 5, public-key", "n = 5, seeded"):
        assert figures[f"{name}: budget in bits"].is_met
        assert figures[f"{name}: error of the sum, in steps"].value == 0


@pytest.mark.skipif(sys.platform != "linux", reason="looks at memory through /proc")
def test_a_large_model_goes_through_another_process() -> None:
    figures = by_name(memory(SMALL))
    assert figures["error of the sum, in steps"].value == 0
    assert 50 < figures["server's peak memory"].value < 500
    assert figures["an upload"].value == pytest.approx(0.27, rel=0.01)  # four ciphertexts


def test_a_server_process_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(he_memory, "_SERVER", "propolis.simulations.bench.nothing")
    with pytest.raises(PropolisError, match=r"exited with 1: .*No module named"):
        he_memory.streamed(30_000, 100)


def test_parts_are_chosen_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(parts(SMALL)) == ["costs", "masks", "noise", "memory"]
    result = CliRunner().invoke(app, ["bench", "he", "--part", "nope", "--out", str(tmp_path / "out.json")])
    assert isinstance(result.exception, UsageError)
    assert "expected costs, masks, noise, memory" in str(result.exception)
    monkeypatch.setattr("propolis.simulations.bench.he.Effort", lambda: SMALL)
    result = CliRunner().invoke(app, ["bench", "he", "--part", "noise", "--json", "--out", str(tmp_path / "out.json")])
    assert result.exit_code == 0
    figures = json.loads((tmp_path / "out.json").read_text())
    assert list(figures["parts"]) == ["noise"]
    assert set(figures["machine"]) >= {"tenseal", "processor"}
