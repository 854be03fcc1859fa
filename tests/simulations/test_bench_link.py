from __future__ import annotations

import json
import mmap
import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from propolis.cli import app
from propolis.secure.errors import PropolisError, UsageError
from propolis.simulations.bench import link_parts
from propolis.simulations.bench.link import PARTS, Part, parts_named, run_benchmark
from propolis.simulations.bench.link_app import values
from propolis.simulations.bench.link_parts import Figure, crowd, large_messages, side_by_side, slow_line
from propolis.simulations.bench.link_processes import Serving, served, started
from propolis.simulations.bench.memory import forget_peak, peak, resident_of
from propolis.simulations.federation import make_federation
from propolis.simulations.linked import write_linked_federation

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at memory through /proc")


def by_name(figures: list[Figure]) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures}


def part(*figures: Figure) -> Part:
    return lambda: list(figures)


def test_a_target_is_the_most_or_the_least_that_a_figure_may_be() -> None:
    assert Figure("x", 3, "s").is_met is None
    assert [Figure("x", value, "s", 3).is_met for value in (2, 3, 4)] == [True, True, False]
    assert [Figure("x", value, "s", 3, at_least=True).is_met for value in (2, 3, 4)] == [False, True, True]


def test_parts_are_named_in_their_order_and_all_by_default() -> None:
    assert list(parts_named(())) == list(PARTS)
    assert list(parts_named(["slow", "empty"])) == ["empty", "slow"]
    with pytest.raises(UsageError, match=r"expected empty, model, .*; got 'nope'"):
        parts_named(["empty", "nope"])


def test_figures_stand_beside_their_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = [
        Figure("fast", 1234.5, "ms", 10),
        Figure("ratio", 600.0, "x", 500, at_least=True),
        Figure("free", 2.0, ""),
    ]
    run_benchmark(tmp_path / "new" / "out.json", False, {"one": ("a part", part(*figures))})
    rows = [line.split("│") for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row[1:-1]] for row in rows] == [
        ["a part", "", "", ""],
        ["fast", "1,234 ms", "at most 10 ms", "no"],
        ["ratio", "600x", "at least 500x", "yes"],
        ["free", "2", "", ""],
    ]


def test_what_was_measured_before_a_part_failed_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> list[Figure]:
        raise PropolisError("no devices")

    out = tmp_path / "out.json"
    with pytest.raises(PropolisError, match="no devices"):
        run_benchmark(out, True, {"one": ("a part", part(Figure("x", 1, "s", 2))), "two": ("another", broken)})
    expected = {"name": "x", "value": 1, "unit": "s", "target": 2, "at_least": False, "is_met": True}
    assert json.loads(out.read_text())["parts"] == {"one": {"title": "a part", "figures": [expected]}}
    assert capsys.readouterr().out == ""
    run_benchmark(out, True, {"one": ("a part", part(Figure("x", 1, "s", 2)))})
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())


def test_an_unknown_part_is_refused_before_anything_runs(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "link", "--part", "nope", "--out", str(tmp_path / "out.json")])
    assert isinstance(result.exception, UsageError)
    assert not (tmp_path / "out.json").exists()


def test_ours_is_measured_beside_flowers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def flowers(*arguments: object) -> list[float]:
        asked.append(arguments)
        return [5.0, 7.0, 6.0]

    monkeypatch.setattr(link_parts, "exchange_times", flowers)
    ours, theirs = side_by_side(devices=2, parameters=1000, ours=3, flowers=4)
    assert asked[0][:3] == (2, 1000, 4)
    assert theirs == 6.0
    assert 0 < ours < 6


@on_linux
def test_a_crowd_connects_and_answers() -> None:
    figures = by_name(crowd(devices=5, helpers=2, idle_s=0.0))
    assert figures["connected"].value > 0
    assert figures["empty exchange, median"].value > 0
    assert figures["server's memory before"].value > 10


@on_linux
def test_large_messages_are_added_up() -> None:
    figures = by_name(large_messages(devices=2, parameters=3_000_000))
    assert figures["server's memory grows by"].value == pytest.approx(figures["in messages"].value * 12)
    assert figures["server's memory grows by"].target == pytest.approx(36)


@on_linux
def test_a_slow_line_is_left_alone_and_cut() -> None:
    figures = by_name(slow_line(parameters=500_000, bytes_per_s=2e6))
    assert figures["streams"].value == 1
    assert figures["cut half-way: streams"].value == 2
    assert 1 < figures["cut half-way: bytes up"].value < 2


def test_the_sum_of_what_devices_send_is_exact() -> None:
    sent = values(2**20 + 3)
    assert sent[-4:].tolist() == [2**20 - 1, 0, 1, 2]
    assert (sent + sent + sent + sent).tolist() == (4.0 * sent.astype(float)).tolist()


def test_a_process_that_fails_is_one_line(tmp_path: Path) -> None:
    failing = started("propolis", ["simulate", "--clients", "nonsense"], tmp_path / "device-7.log")
    with failing as process, pytest.raises(PropolisError, match=r"device-7 exited with 2: propolis: .*nonsense"):
        process.wait(60)


def test_a_process_that_does_not_end_is_ended(tmp_path: Path) -> None:
    endless = started("http.server", ["0", "--bind", "127.0.0.1"], tmp_path / "endless.log")
    with endless as process, pytest.raises(PropolisError, match="endless did not end in time"):
        process.wait(0.1)
    assert process.popen.returncode is not None


def test_a_server_that_cannot_start_is_one_line(tmp_path: Path) -> None:
    write_linked_federation(make_federation(1), tmp_path)
    serving = Serving("propolis.simulations.bench.link_app:nothing", 1, {})
    expected = r"server did not do its part in time; its last line: propolis: .*nothing"
    with pytest.raises(PropolisError, match=expected), served(tmp_path, serving):
        pass


@on_linux
def test_the_peak_is_what_was_held_since_it_was_forgotten() -> None:
    size = 50 * 2**20

    def hold() -> mmap.mmap:  # a mapping goes back to the system at once, whatever the allocator keeps
        held = mmap.mmap(-1, size)
        held.write(b"x" * size)
        return held

    held = hold()
    before = resident_of(os.getpid())
    held.close()
    forget_peak()
    assert peak() < before - size / 2
    hold().close()
    assert peak() > before - size / 2
