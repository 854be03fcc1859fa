"""The codec benchmark's tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from propolis.simulations.bench.codec_jobs import REFERENCE

WIDTH = 110  # narrower, the tables would break their cells
_NAMES = {REFERENCE: "float32, unprotected", "float32": "secagg, float32"}


def print_tables(console: Console, figures: Mapping[str, Any]) -> None:
    """Print what has been measured."""
    console.print("  ".join(f"{name} {value}" for name, value in figures["machine"].items()), highlight=False)
    if figures["summary"]:
        _print_runs(console, figures)
    if "messages" in figures:
        _print_messages(console, figures["messages"])
    if "speed" in figures:
        _print_speed(console, figures["speed"])


def _print_runs(console: Console, figures: Mapping[str, Any]) -> None:
    for job, about in figures["jobs"].items():
        console.print(f"job {job}: {about['about']}, {about['dimension']:,} parameters", highlight=False)
    console.print(_bytes_table(figures))
    console.print(
        "Bytes per device and round, all messages. x less: than float32 unprotected of the same job; SecAgg+: than\n"
        "Flower's with its fewest shares. up and down until there: the reference's bytes in all its rounds over a\n"
        "codec's until it is as good. Means over the seeds; a figure that a seed lacks is -.",
        highlight=False,
    )
    console.print(_accuracy_table(figures))
    console.print(
        "points: mean of the last ten rounds minus float32's. there in round: the first one whose last ten rounds are\n"
        "as good as float32's last ten.",
        highlight=False,
    )
    console.print(_ring_table(figures))
    console.print(
        "wraps: values of a sum that left their ring, counted in all rounds; expected: in all rounds, and in a round\n"
        "if all updates were the same. correlation: what was seen, with the margin that is planned with.",
        highlight=False,
    )


def _bytes_table(figures: Mapping[str, Any]) -> Table:
    table = _table(
        "codec", "up", "down", "up\nx less", "down\nx less", "SecAgg+\nx less", "up until\nthere", "down until\nthere"
    )
    for job, rows in _by_job(figures):
        _head(table, job)
        for row in rows:
            value = _mean_of(row)
            ratios = ("up_ratio", "down_ratio", "flower_ratio", "total_up_ratio", "total_down_ratio")
            cells = [f"{value('up'):,.0f}", f"{value('down'):,.0f}", *(_times(value(name)) for name in ratios)]
            table.add_row(_name(row["codec"]), *cells)
        if job in figures["flower"]:
            flower = figures["flower"][job]
            table.add_row(f"Flower's SecAgg+, {flower['shares']} shares", f"{flower['fewest']:,.0f}")
            table.add_row("Flower's SecAgg+, complete", f"{flower['complete']:,.0f}")
    return table


def _accuracy_table(figures: Mapping[str, Any]) -> Table:
    table = _table("codec", "rounds", "seed", "last", "mean\nof ten", "points", "there\nin round", "up", "down")
    for job, rows in _by_job(figures):
        _head(table, job)
        for row in rows:
            for place, seed in enumerate(row["seeds"]):
                table.add_row(
                    _name(row["codec"]), str(row["rounds"]), str(seed), *_accuracy_cells(_seed_of(row, place))
                )
            if len(row["seeds"]) > 1:
                table.add_row(
                    _name(row["codec"]), str(row["rounds"]), "mean", *_accuracy_cells(_mean_of(row)), style="bold"
                )
    return table


def _accuracy_cells(value: Any) -> list[str]:
    points, reached = value("points"), value("reached")
    return [
        f"{value('last'):.4f}",
        f"{value('mean_of_ten'):.4f}",
        "-" if points is None else f"{points:+.2f}",
        "-" if reached is None else f"{reached:.4g}",
        _times(value("total_up_ratio")),
        _times(value("total_down_ratio")),
    ]


def _ring_table(figures: Mapping[str, Any]) -> Table:
    table = _table("codec", "bits", "wraps", "expected", "if all\nthe same", "correlation", "clipped", "cut off")
    for job, rows in _by_job(figures):
        rotating = [row for row in rows if "wraps" in row["figures"]]
        if rotating:
            _head(table, job)
        for row in rotating:
            value = _mean_of(row)
            names = ("widest", "wraps", "expected", "expected_alike", "correlation")
            table.add_row(
                _name(row["codec"]),
                *(_number(value(name)) for name in names),
                f"{value('clipped'):.2%}",
                _number(value("saturated")),
            )
    return table


def _print_messages(console: Console, measured: Mapping[str, Any]) -> None:
    table = _table("exchange", "up", "per\nneighbour", "down", "per\nneighbour")
    for name, run in measured.items():
        table.add_section()
        table.add_row(f"{name}, n={run['devices']}, {run['neighbours']} neighbours", style="bold")
        for exchange, row in run["exchanges"].items():
            cells = [f"{row[way][key]:,.0f}" for way in ("up", "down") for key in ("protocol", "per_neighbour")]
            table.add_row(f"{exchange}{' (once)' if row['once'] else ''}", *cells)
        every = [row for row in run["exchanges"].values() if not row["once"]]
        sums = [sum(row[way][key] for row in every) for way in ("up", "down") for key in ("protocol", "per_neighbour")]
        table.add_row("every round", *(f"{value:,.0f}" for value in sums), style="bold")
    console.print(table)
    console.print("The protocol's own bytes per device: all but the masked vector and the model.", highlight=False)


def _print_speed(console: Console, measured: Mapping[str, Any]) -> None:
    table = _table("ms", "support", "encode", "pack", "unpack", "decode", "total", "step", "apply")
    for codec, costs in measured["codec"].items():
        table.add_row(codec, *(f"{value:.3g}" for value in [*costs.values(), *_step_cells(measured, codec)]))
    console.print(table)
    console.print(
        f"Processor time per million parameters; {measured['dimension']:,} parameters, {measured['devices']} devices: "
        "a client's work, then the\nserver's per client. step: the model's next version, once a round; "
        "apply: on a device.",
        highlight=False,
    )


def _step_cells(measured: Mapping[str, Any], codec: str) -> list[float]:
    return [measured["broadcast"][codec][name] for name in ("step", "apply")]


def _by_job(figures: Mapping[str, Any]) -> Iterable[tuple[str, list[Mapping[str, Any]]]]:
    names = dict.fromkeys(row["job"] for row in figures["summary"])
    return [(job, [row for row in figures["summary"] if row["job"] == job]) for job in names]


def _head(table: Table, job: str) -> None:
    table.add_section()
    table.add_row(f"job {job}", style="bold")


def _table(first: str, *others: str) -> Table:
    table = Table()
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _mean_of(row: Mapping[str, Any]) -> Any:
    return lambda name: row["figures"].get(name, {"mean": None})["mean"]


def _seed_of(row: Mapping[str, Any], place: int) -> Any:
    return lambda name: row["figures"][name]["seeds"][place] if name in row["figures"] else None


def _name(codec: str) -> str:
    return _NAMES.get(codec, f"secagg, {codec}")


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}x"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.2g}"
