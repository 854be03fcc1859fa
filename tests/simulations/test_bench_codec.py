from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from propolis.cli import app
from propolis.secure.codec.wraps import expected_wraps
from propolis.secure.errors import PropolisError, UsageError
from propolis.simulations.bench import codec
from propolis.simulations.bench.codec import FLOWER, MESSAGES, SPEED, Work, published_work, run_benchmark
from propolis.simulations.bench.codec_chart import curve_of
from propolis.simulations.bench.codec_figures import compare, figures_of, first_reach, ring_figures, summarize
from propolis.simulations.bench.codec_jobs import METRICS, REFERENCE, Course, Job, Planned, Variant, planned_runs
from propolis.simulations.bench.codec_table import print_tables
from propolis.task import load_task

TRAINING = ("--clients", "4", "--epochs", "1", "--batch-size", "256")
TINY = Job("a", "digits", "digits", TRAINING, (Variant(REFERENCE, 2, (0,)), Variant("thin", 3, (0,))))
BROKEN = Job("b", "broken", "digits", (*TRAINING, "--fraction", "2"), (Variant(REFERENCE, 1, (0,)),))


def course(
    accuracy: Sequence[float], up: int, down: int, *, name: str = "dense", seed: int = 0, **metrics: float
) -> Course:
    rounds = len(accuracy)
    return Course(
        planned=Planned("a", name, seed, rounds, ()),
        seconds=1.0,
        accuracy=tuple(accuracy),
        up=(up,) * rounds,
        down=(down,) * rounds,
        devices=(5,) * rounds,
        metrics={each: (metrics.get(each.replace("-", "_"), 0.0),) * rounds for each in METRICS},
    )


REFERENCE_COURSE = course([0.5] * 10 + [0.8] * 10, 1000, 2000, name=REFERENCE)


def test_bytes_are_per_device_and_round_and_accuracy_is_of_the_last_ten() -> None:
    figures = figures_of(course([0.1] * 5 + [0.6] * 9 + [0.7], 1000, 2000))
    assert (figures.up, figures.down, figures.last) == (200, 400, 0.7)
    assert figures.mean_of_ten == pytest.approx(0.61)
    uneven = Course(Planned("a", "thin", 0, 2, ()), 1.0, (0.1, 0.2), (300, 700), (30, 70), (4, 6), {})
    assert (figures_of(uneven).up, figures_of(uneven).down) == (100, 10)


def test_the_round_that_is_as_good_has_ten_rounds_behind_it() -> None:
    assert first_reach([0.9] * 12, 0.9) == 10
    assert first_reach([0.5] * 10 + [0.8] * 10, 0.65) == 15
    assert first_reach([0.5] * 10 + [0.8] * 10, 0.81) is None
    assert first_reach([0.0] * 9 + [10.0] + [0.0] * 20, 0.9) == 10  # once is enough
    assert first_reach([0.5, 0.7], 0.6) == 2  # so few that all are the last ones


def test_a_run_is_compared_with_all_that_its_reference_sent() -> None:
    own = course([0.5] * 14 + [0.9] * 16, 100, 500)
    found = compare(own, REFERENCE_COURSE)
    assert (found.up_ratio, found.down_ratio) == (10, 4)
    assert found.points == pytest.approx(10)
    assert found.reached == 22  # the first with eight of ten at 0.9
    assert found.reference_reached == 20
    assert found.total_up_ratio == pytest.approx(20 * 1000 / (22 * 100))
    assert found.total_down_ratio == pytest.approx(20 * 2000 / (22 * 500))
    assert found.whole_up_ratio == pytest.approx(20 * 1000 / (30 * 100))
    assert found.whole_down_ratio == pytest.approx(20 * 2000 / (30 * 500))


def test_what_a_reference_reaches_early_counts_for_it() -> None:
    early = course([0.9] * 15 + [0.7] * 5, 1000, 2000, name=REFERENCE)  # ends at 0.8, was there in round 10
    found = compare(course([0.85] * 20, 100, 200), early)
    assert (found.reached, found.reference_reached) == (10, 10)
    assert (found.total_up_ratio, found.early_up_ratio) == (20, 10)
    assert (found.total_down_ratio, found.early_down_ratio) == (20, 10)


def test_a_run_that_is_never_as_good_has_no_ratio_of_totals() -> None:
    found = compare(course([0.5] * 30, 100, 500), REFERENCE_COURSE)
    assert found.reached is None
    assert found.total_up_ratio is found.total_down_ratio is found.early_up_ratio is None
    assert found.points == pytest.approx(-30)


def test_wraps_are_added_up_and_expected_at_each_rounds_grid() -> None:
    own = course(
        [0.5] * 4,
        1,
        1,
        wraps=1,
        clipped=0.25,
        saturated=2,
        bits=4,
        update_range=14.0,
        scale_rms=0.5,
        scale_correlation=0.3,
    )
    found = ring_figures(own, 1024)
    each = expected_wraps(1024, 5, 4, 4.0, 0.3)  # a step of 14 / 7, in units of 0.5
    assert (found.wraps, found.clipped, found.saturated, found.widest) == (4, 0.25, 8, 4)
    assert found.expected == pytest.approx(3 * each)  # no sum can leave the ring of the first round
    assert found.expected_largest == pytest.approx(each)
    assert found.expected_alike == pytest.approx(expected_wraps(1024, 5, 4, 4.0, 1.0))
    assert found.expected_alike > found.expected_largest
    assert found.correlation == pytest.approx(0.3)


def test_the_summary_has_means_and_each_seeds_figures() -> None:
    other = course([0.5] * 10 + [0.7] * 10, 1000, 2000, name=REFERENCE, seed=1)
    ours = [course([0.8] * 20, 100, 100, seed=1), course([0.5] * 20, 200, 200, seed=0)]
    reference, dense = summarize([REFERENCE_COURSE, other, *ours], {}, {"a": 400.0})
    assert (reference["codec"], reference["seeds"], dense["codec"], dense["seeds"]) == (
        REFERENCE,
        [0, 1],
        "dense",
        [0, 1],
    )
    assert "points" not in reference["figures"]
    assert dense["figures"]["up_ratio"] == {"mean": 7.5, "seeds": [5, 10]}
    assert dense["figures"]["flower_ratio"] == {"mean": 15, "seeds": [10, 20]}
    assert dense["figures"]["points"]["seeds"] == [pytest.approx(-30), pytest.approx(10)]
    assert dense["figures"]["reached"] == {"mean": None, "seeds": [None, 10]}
    (alone,) = summarize(ours[:1], {}, {})
    assert alone["figures"].keys() == {"up", "down", "last", "mean_of_ten"}


def test_a_curve_is_over_the_bytes_so_far() -> None:
    sizes, accuracy = curve_of(course([0.5] * 10 + [0.6], 100, 500), "down")
    assert sizes == [5000, 5500]
    assert accuracy == [pytest.approx(0.5), pytest.approx(0.51)]


def test_a_course_survives_its_way_through_a_file() -> None:
    own = course([0.5, 0.6], 1, 2, wraps=3.0)
    assert Course.of_json(json.loads(json.dumps(own.to_json()))) == own


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole benchmark, small."""
    out = tmp_path_factory.mktemp("bench") / "new" / "figures.json"
    run_benchmark(out, True, Work((TINY,), frozenset((SPEED, MESSAGES, FLOWER)), devices=5, dimension=2000))
    return out


def test_the_whole_benchmark_leaves_figures_and_a_chart(ran: Path) -> None:
    figures = json.loads(ran.read_text())
    assert figures["failed"] == []
    assert [row["codec"] for row in figures["summary"]] == [REFERENCE, "thin"]
    thin = figures["summary"][1]["figures"]
    assert thin["up_ratio"]["mean"] > 2
    assert thin["widest"]["mean"] == 5
    assert figures["flower"]["a"]["dimension"] == 9610
    assert 8 * 9610 < figures["flower"]["a"]["fewest"] <= figures["flower"]["a"]["complete"]
    for row in figures["summary"]:
        ratio = figures["flower"]["a"]["fewest"] / row["figures"]["up"]["mean"]
        assert row["figures"]["flower_ratio"]["mean"] == pytest.approx(ratio)
    for costs in figures["speed"]["codec"].values():
        assert costs["total"] == pytest.approx(sum(value for name, value in costs.items() if name != "total"))
    assert ran.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_protocols_bytes_are_those_of_the_messages(ran: Path) -> None:
    messages = json.loads(ran.read_text())["messages"]
    assert messages["secagg"]["exchanges"].keys() == {"hello", "prepare", "upload", "unmask"}
    assert messages["malicious"]["exchanges"].keys() == {"hello", "prepare", "upload", "confirm", "unmask"}
    for run in messages.values():
        assert (run["devices"], run["neighbours"]) == (5, 4)
        for name, row in run["exchanges"].items():
            assert row["once"] == (name == "hello")
            rounds = 1 if row["once"] else run["rounds"]
            for way in ("up", "down"):
                counted = row[way]["counted"]
                assert counted["messages"] == 5 * rounds
                assert row[way]["protocol"] == counted["protocol"] / (5 * rounds) > 0
                assert row[way]["per_neighbour"] == row[way]["protocol"] / 4
                assert (row[way]["codec"] > 0) == (name == "upload")
        # Beside nine of 1,024 and a rest of 512: four bits a value, after a first round of sixteen.
        assert run["exchanges"]["upload"]["up"]["codec"] == pytest.approx((9 * 1024 + 512) * (16 + 2 * 4) / 8 / 3)


def test_the_tables_have_every_run(ran: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = json.loads(ran.read_text())
    print_tables(Console(width=110), figures)
    printed = capsys.readouterr().out
    for name in ("float32, unprotected", "secagg, thin", "Flower's SecAgg+, complete", "unmask"):
        assert name in printed
    for row in figures["summary"]:
        assert f"{row['figures']['up']['mean']:,.0f}" in printed
        assert f"{row['figures']['last']['mean']:.4f}" in printed
    assert f"job a: digits, {figures['jobs']['a']['dimension']:,} parameters" in printed
    assert "…" not in printed


def test_resuming_leaves_out_what_is_done_and_a_failure_is_one_line(ran: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    out.write_bytes(ran.read_bytes())
    with pytest.raises(PropolisError, match="1 of the benchmark's parts failed; the first: job b: reference") as raised:
        run_benchmark(out, True, Work((TINY, BROKEN), frozenset(), devices=5), resume=True)
    assert "fraction: " in str(raised.value)
    assert "\n" not in str(raised.value)
    kept, before = (json.loads(path.read_text()) for path in (out, ran))
    assert kept["runs"] == before["runs"]  # with the same seconds: none of them ran again
    assert kept["failed"] == [str(raised.value).split("first: ")[1]]


def test_the_published_work_is_as_documented() -> None:
    work = published_work()
    assert work.parts == {SPEED, MESSAGES, FLOWER}
    runs = [(run.job, run.codec, run.rounds) for run in planned_runs(work.jobs) if run.seed == 0]
    assert sorted(runs) == [
        ("a", "dense", 80),
        ("a", "float32", 80),
        ("a", "reference", 80),
        ("a", "thin", 120),
        ("b", "reference", 80),
        ("b", "thin", 120),
        ("c", "dense", 40),
        ("c", "reference", 40),
        ("c", "thin", 60),
    ]
    assert {(run.job, run.codec, run.seed) for run in planned_runs(work.jobs) if run.seed} == {
        ("a", name, seed) for name in ("reference", "dense", "thin") for seed in (1, 2)
    }
    first = next(run for run in planned_runs(work.jobs, Path("d")) if run.codec == "dense").command
    assert " ".join(first).endswith("--rounds 80 --seed 0 --protection secagg --codec dense --data d --json")


@pytest.mark.parametrize(("name", "parameters"), [("Wide", 407_050), ("Convolutional", 49_560)])
def test_the_models_are_as_large_as_they_say(name: str, parameters: int) -> None:
    task = load_task(f"propolis.simulations.bench.tasks:{name}FashionMnist", None)
    assert f"{parameters:,} parameters" in (type(task).__doc__ or "")
    assert sum(each.numel() for each in task.model().parameters()) == parameters


def test_the_command_passes_on_what_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(codec, "run_benchmark", lambda *arguments: asked.append(arguments))
    options = [
        "--json",
        "--out",
        str(tmp_path / "f"),
        "--part",
        "a",
        "--part",
        "speed",
        "--seeds",
        "1",
        "--rounds",
        "4",
    ]
    done = CliRunner().invoke(app, ["bench", "codec", *options, "--resume"])
    assert done.exit_code == 0, done.output
    assert asked == [(tmp_path / "f", True, published_work(("a", "speed"), 1, 4), True)]
    (job,) = asked[0][2].jobs
    assert [(variant.rounds, variant.seeds) for variant in job.variants] == [(4, (0,)), (4, (0,)), (4, (0,)), (6, (0,))]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--part", "d"], "the benchmark has no part 'd'; choose from speed, messages, flower, a, b, c"),
        (["--resume", "--out", "absent.json"], "cannot resume from absent.json: No such file or directory"),
        (["--resume", "--out", "empty.json"], "empty.json holds no figures of this benchmark: leave out --resume"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").write_text("{}")
    done = CliRunner().invoke(app, ["bench", "codec", *arguments])
    assert isinstance(done.exception, UsageError)
    assert str(done.exception) == said
