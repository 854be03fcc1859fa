"""``propolis bench simulate``: one job on the local grid and on Flower's own simulation engine."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from propolis.simulations.bench.process import Timing, machine, time_module

# (clients, rounds) of the digits job: perceptron 64-128-10, 5 local epochs, batches of 32.
_SIZES = ((10, 10), (100, 20))
_LOCAL, _ENGINE, _PEER = "Propolis, local grid", "Propolis, Flower's engine on Ray", "plain Flower app, same engine"
# The local grid once more at the first size with many more rounds: its memory must not grow with them.
_MEMORY_ROUNDS = (20, 400)
_JOB = ("simulate", "--task", "digits", "--epochs", "5", "--batch-size", "32", "--json")


def run_benchmark(out: Path, as_json: bool) -> dict[str, Any]:
    """Time whole commands, print a table (or the figures as JSON) and write the figures to `out`."""
    console = Console(stderr=as_json)
    figures: dict[str, Any] = {"machine": machine(["flwr", "ray", "torch", "propolis"]), "runs": [], "memory": []}
    for clients, rounds in _SIZES:
        rows = {}
        for engine in (_LOCAL, _ENGINE, _PEER):
            console.print(f"{clients} clients x {rounds} rounds: {engine} ...", style="dim")
            rows[engine] = _time(engine, clients, rounds)
        figures["runs"].append(_compare(clients, rounds, rows))
    for rounds in _MEMORY_ROUNDS:
        console.print(f"memory of {rounds} rounds ...", style="dim")
        timing, _ = _time(_LOCAL, _SIZES[0][0], rounds)
        figures["memory"].append({"rounds": rounds, "peak_rss_mb": round(timing.peak_rss_mb, 1)})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(figures))
    else:
        _print(console, figures)
        console.print(f"figures in {out}")
    return figures


def _time(engine: str, clients: int, rounds: int) -> tuple[Timing, float]:
    """Time of one whole command, and the accuracy it reached."""
    if engine == _PEER:
        timing = time_module("propolis.simulations.bench.flower_app", (str(clients), str(rounds)))
        return timing, float(timing.output.splitlines()[-1])
    with tempfile.TemporaryDirectory() as folder:
        backend = "local" if engine == _LOCAL else "ray"
        size = ("--clients", str(clients), "--rounds", str(rounds), "--backend", backend)
        timing = time_module("propolis", [*_JOB, *size, "--out", folder])
    return timing, float(json.loads(timing.output.splitlines()[-1])["accuracy"])


def _compare(clients: int, rounds: int, rows: dict[str, tuple[Timing, float]]) -> dict[str, Any]:
    local = rows[_LOCAL][0].seconds
    engines = {
        engine: {"seconds": round(t.seconds, 2), "ratio": round(t.seconds / local, 2), "accuracy": round(accuracy, 4)}
        for engine, (t, accuracy) in rows.items()
    }
    return {"clients": clients, "rounds": rounds, "engines": engines}


def _print(console: Console, figures: dict[str, Any]) -> None:
    console.print("  ".join(f"{name} {value}" for name, value in figures["machine"].items()), highlight=False)
    table = Table("clients x rounds", "", "seconds", "ratio", "accuracy")
    for run in figures["runs"]:
        for engine, row in run["engines"].items():
            cells = (f"{row['seconds']:.1f}", f"{row['ratio']:.1f}", f"{row['accuracy']:.4f}")
            table.add_row(f"{run['clients']} x {run['rounds']}", engine, *cells)
    console.print(table)
    memory = ", ".join(f"{m['peak_rss_mb']:.0f} MB after {m['rounds']} rounds" for m in figures["memory"])
    console.print(f"peak memory of the local grid, {_SIZES[0][0]} clients: {memory}", highlight=False)
