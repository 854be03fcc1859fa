from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from propolis.cli import app
from propolis.secure.errors import PropolisError
from propolis.simulations.bench import secagg
from propolis.simulations.bench.secagg import Job, jobs, run_benchmark
from propolis.simulations.bench.secagg_devices import RANGE, DevicesHere, devices_apart, update_of
from propolis.simulations.bench.secagg_round import secure_sum

COST = {"server_seconds", "client_seconds", "upload_bytes", "largest_error"}
SMALL = (Job(6, 64, memory=True), Job(6, 64, (None, 5)))
# At 16 bits and six devices; a coordinate of the mean is rounded by less than this.
STEP = RANGE / ((2**16 - 1) // 12)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "new" / "figures.json"
    run_benchmark(out, True, SMALL)
    return out


def test_the_figures_say_what_each_side_cost(ran: Path) -> None:
    figures = json.loads(ran.read_text())
    assert {"processor", "cores", "flwr", "propolis"} <= figures["machine"].keys()
    memory, both = figures["jobs"]
    assert memory["memory"]["peak_mb"] - memory["memory"]["before_mb"] == pytest.approx(memory["memory"]["growth_mb"])
    assert memory["flower"] == []
    assert "memory" not in both
    for job in (memory, both):
        facts = {name: job[name] for name in ("clients", "dropped", "dimension", "neighbours", "threshold")}
        assert facts == {"clients": 6, "dropped": 1, "dimension": 64, "neighbours": 5, "threshold": 4}
        assert job["propolis"].keys() == COST
        assert all(value > 0 for value in job["propolis"].values())
        assert job["propolis"]["largest_error"] < STEP
    assert [row["shares"] for row in both["flower"]] == [6, 5]
    for row in both["flower"]:
        assert row["ratios"] == {
            name: pytest.approx(row[name] / both["propolis"][name]) for name in COST - {"largest_error"}
        }
        assert row["largest_error"] < 16 / 2**16  # Flower's step


def test_the_table_has_every_row_with_its_ratios(
    ran: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = json.loads(ran.read_text())
    monkeypatch.setenv("COLUMNS", "80")
    secagg._print(secagg.Console(width=secagg._TABLE_WIDTH), figures)
    printed = capsys.readouterr().out
    assert printed.count("n=6, d=64") == 3  # two rows and the memory
    assert printed.count("Propolis, k=5, t=4") == 2
    for row, name in zip(figures["jobs"][1]["flower"], ("Flower, complete", "Flower, 5 shares"), strict=True):
        (line,) = (line for line in printed.splitlines() if name in line)
        assert f"{row['server_seconds']:.3g} ({row['ratios']['server_seconds']:.3g}x)" in line
        assert f"{row['largest_error']:.1e}" in line
    assert f"at most {figures['jobs'][0]['memory']['growth_mb']:.1f} MB above" in printed


def test_an_upload_is_counted_with_everything_that_travels(ran: Path) -> None:
    job = json.loads(ran.read_text())["jobs"][1]
    # Beside two bytes a parameter: heads, prekeys, a record for each neighbour, and Flower's envelope, four times.
    assert 64 * 2 + job["neighbours"] * 150 < job["propolis"]["upload_bytes"] < 64 * 2 + 4096


@pytest.mark.parametrize("dropped", [(), (0,), (5,)])
def test_the_sum_is_over_those_that_are_left(dropped: tuple[int, ...]) -> None:
    done = secure_sum(DevicesHere(6, 100), 6, 100, dropped)
    alive = [index for index in range(6) if index not in dropped]
    assert list(done.alive) == alive
    plain = np.mean([update_of(index, 100) for index in alive], axis=0, dtype=np.float64)
    np.testing.assert_allclose(done.mean.changes["update"], plain, atol=STEP, rtol=0)
    assert done.mean.saturated == 0
    assert done.largest_error() == pytest.approx(np.abs(done.mean.changes["update"] - plain).max())
    # The error is that of this mean: move it, and it shows.
    shifted = replace(done, mean=replace(done.mean, changes={"update": done.mean.changes["update"] + 0.5}))
    assert shifted.largest_error() == pytest.approx(0.5, abs=STEP)


def test_devices_apart_end_with_the_context_and_a_lost_process_is_an_error() -> None:
    with devices_apart(3, 8) as devices:
        done = secure_sum(devices, 3, 8, ())
        assert set(devices.costs()) == {0, 1, 2}
        process = devices.process
        assert process.is_alive()
        process.kill()
        with pytest.raises(PropolisError, match="has ended"):
            devices.costs()
    assert not process.is_alive()
    assert done.alive == (0, 1, 2)


def test_the_command_measures_the_published_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(secagg, "run_benchmark", lambda *arguments: asked.append(arguments))
    done = CliRunner().invoke(app, ["bench", "secagg", "--json", "--out", str(tmp_path / "a"), "--dimension", "1000"])
    assert done.exit_code == 0, done.output
    assert asked == [(tmp_path / "a", True, jobs(1000))]
    assert CliRunner().invoke(app, ["bench", "secagg", "--dimension", "0"]).exit_code == 2
    sizes = [(job.clients, job.dimension, job.shares, job.memory, len(job.dropped)) for job in jobs(1_000_000)]
    assert sizes == [
        (1000, 100_000, (), True, 200),
        (10, 1_000_000, (None,), False, 2),
        (50, 10_000, (None,), False, 10),
        (50, 1_000_000, (None, 21), False, 10),
    ]
