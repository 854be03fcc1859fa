"""``propolis bench secagg``: one secure sum, ours beside Flower's own SecAgg+, and ours over a thousand devices."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from propolis.secure.graph import Sharing
from propolis.simulations.bench.flower_secagg import Cost, flower_secagg_cost
from propolis.simulations.bench.memory import forget_peak, peak, resident_of
from propolis.simulations.bench.process import machine
from propolis.simulations.bench.secagg_devices import Devices, DevicesHere, devices_apart, update_of
from propolis.simulations.bench.secagg_round import SecureSum, secure_sum

# These fall silent after they have prepared: the server must undo the masks between each of them and all the others.
_DROPPED = 0.2
_REPEATS = 3
_TABLE_WIDTH = 100  # narrower, it would break its cells
_COMPARED = ("server_seconds", "client_seconds", "upload_bytes")


@dataclass(frozen=True, slots=True)
class Job:
    """One size.

    Attributes:
        clients: how many.
        dimension: length of their updates.
        shares: what Flower's SecAgg+ is run with, one run each; see `flower_secagg_cost`.
        memory: whether to run ours alone, once, and to measure the server's memory.
    """

    clients: int
    dimension: int
    shares: tuple[int | None, ...] = ()
    memory: bool = False

    @property
    def dropped(self) -> frozenset[int]:
        """Who drops out: the same devices every time."""
        drawn = np.random.default_rng(0).choice(self.clients, int(self.clients * _DROPPED), replace=False)
        return frozenset(drawn.tolist())


def jobs(dimension: int) -> tuple[Job, ...]:
    """Those of the published table; memory comes first, while this process has not kept anything yet."""
    return (
        Job(1000, max(1, dimension // 10), memory=True),
        Job(10, dimension, (None,)),
        Job(50, max(1, dimension // 100), (None,)),
        Job(50, dimension, (None, 21)),
    )


def run_benchmark(out: Path, as_json: bool, todo: Sequence[Job]) -> dict[str, Any]:
    """Measure, print a table (or the figures as JSON) and write the figures to `out`."""
    console = Console(stderr=as_json, width=max(_TABLE_WIDTH, Console().width))
    packages = ["flwr", "cryptography", "numpy", "propolis"]
    measured = [(_alone if job.memory else _side_by_side)(console, job) for job in todo]
    figures: dict[str, Any] = {"machine": machine(packages), "jobs": measured}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(figures))
    else:
        _print(console, figures)
        console.print(f"figures in {out}")
    return figures


def _side_by_side(console: Console, job: Job) -> dict[str, Any]:
    """The median of some sums of ours beside Flower's, which take too long to be repeated."""
    costs = []
    for _ in range(_REPEATS):
        _say(console, job, "Propolis")
        with devices_apart(job.clients, job.dimension) as devices:
            done = secure_sum(devices, job.clients, job.dimension, job.dropped)
            costs.append(asdict(_cost(devices, done)))
    ours = {name: median(cost[name] for cost in costs) for name in costs[0]}
    flower = []
    for shares in job.shares:
        _say(console, job, _peer(shares or job.clients, job.clients))
        updates = [update_of(index, job.dimension) for index in range(job.clients)]
        theirs = asdict(flower_secagg_cost(updates, len(job.dropped), shares))
        ratios = {name: theirs[name] / ours[name] for name in _COMPARED}
        flower.append({"shares": shares or job.clients, **theirs, "ratios": ratios})
    return {**_facts(job, done.sharing), "propolis": ours, "flower": flower}


def _alone(console: Console, job: Job) -> dict[str, Any]:
    """Ours alone, and what it takes of the server's memory."""
    secure_sum(DevicesHere(4, 1), 4, 1, ())  # what is loaded on first use is no part of a sum
    _say(console, job, "Propolis and its memory")
    with devices_apart(job.clients, job.dimension) as devices:
        before = resident_of(os.getpid())
        forget_peak()
        done = secure_sum(devices, job.clients, job.dimension, job.dropped)
        most = peak()
        cost = _cost(devices, done)
    growth = {"before_mb": before / 1e6, "peak_mb": most / 1e6, "growth_mb": (most - before) / 1e6}
    return {**_facts(job, done.sharing), "propolis": asdict(cost), "flower": [], "memory": growth}


def _cost(devices: Devices, done: SecureSum) -> Cost:
    costs = devices.costs()
    seconds, sizes = zip(*(costs[index] for index in done.alive), strict=True)
    survivors = len(done.alive)
    return Cost(done.server_seconds, sum(seconds) / survivors, sum(sizes) / survivors, done.largest_error())


def _facts(job: Job, sharing: Sharing) -> dict[str, Any]:
    facts = {"clients": job.clients, "dropped": len(job.dropped), "dimension": job.dimension}
    return {**facts, "neighbours": sharing.degree, "threshold": sharing.threshold}


def _say(console: Console, job: Job, whose: str) -> None:
    console.print(f"{job.clients} clients x {job.dimension:,} parameters: {whose} ...", style="dim", highlight=False)


def _peer(shares: int, clients: int) -> str:
    return "Flower, complete" if shares == clients else f"Flower, {shares} shares"


def _print(console: Console, figures: Mapping[str, Any]) -> None:
    console.print("  ".join(f"{name} {value}" for name, value in figures["machine"].items()), highlight=False)
    table = Table("", "server s", "client ms", "B/param", "max error")
    for job in figures["jobs"]:
        table.add_section()
        table.add_row(f"n={job['clients']}, d={job['dimension']:,}", style="bold")
        sharing = f"k={job['neighbours']}, t={job['threshold']}"
        table.add_row(f"Propolis, {sharing}", *_cells(job["propolis"], job["dimension"], {}))
        for row in job["flower"]:
            cells = _cells(row, job["dimension"], row["ratios"])
            table.add_row(_peer(row["shares"], job["clients"]), *cells)
    console.print(table)
    console.print(
        f"{_DROPPED:.0%} of the n clients drop out after prepare; d parameters; k neighbours, of whom t reconstruct.\n"
        "client ms and B/param (bytes sent): mean of the survivors, all stages. In brackets: Flower's over ours.",
        highlight=False,
    )
    for job in figures["jobs"]:
        if "memory" in job:
            growth, before = job["memory"]["growth_mb"], job["memory"]["before_mb"]
            console.print(
                f"server's memory, n={job['clients']}, d={job['dimension']:,}: "
                f"at most {growth:.1f} MB above the {before:.0f} MB before the sum",
                highlight=False,
            )


def _cells(cost: Mapping[str, float], dimension: int, ratios: Mapping[str, float]) -> list[str]:
    shown = {"server_seconds": 1.0, "client_seconds": 1e3, "upload_bytes": 1 / dimension}
    cells = [f"{cost[name] * unit:.3g}" for name, unit in shown.items()]
    if ratios:
        cells = [f"{cell} ({ratios[name]:.3g}x)" for cell, name in zip(cells, shown, strict=True)]
    return [*cells, f"{cost['largest_error']:.1e}"]
