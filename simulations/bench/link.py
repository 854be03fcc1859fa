"""``propolis bench link``: our link beside Flower's, and with a thousand devices, large messages and a slow line."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from propolis.secure.errors import UsageError
from propolis.simulations.bench.link_parts import (
    Figure,
    crowd,
    empty_exchange,
    large_messages,
    model_exchange,
    slow_line,
)
from propolis.simulations.bench.process import machine

_TABLE_WIDTH = 100  # narrower, it would break its cells

Part = Callable[[], list[Figure]]

PARTS: Mapping[str, tuple[str, Part]] = {
    "empty": ("empty exchange, 2 device processes", empty_exchange),
    "model": ("1,000,000 float32 parameters to 10 device processes and back", model_exchange),
    "crowd": ("1,000 devices connected at once", crowd),
    "large": ("400 MB from each of 4 devices at once, added up one by one", large_messages),
    "slow": ("12.5 MB from a device over 10 Mbit/s", slow_line),
}


def parts_named(names: Sequence[str], parts: Mapping[str, tuple[str, Part]] = PARTS) -> dict[str, tuple[str, Part]]:
    """The parts of these names, in their own order; all of them for none.

    Raises:
        UsageError: there is no such part.
    """
    if unknown := sorted(set(names) - parts.keys()):
        raise UsageError(f"--part: expected {', '.join(parts)}; got '{unknown[0]}'")
    return {name: part for name, part in parts.items() if name in names or not names}


def run_benchmark(
    out: Path,
    as_json: bool,
    parts: Mapping[str, tuple[str, Part]],
    packages: Sequence[str] = ("flwr", "grpcio", "propolis"),
) -> dict[str, Any]:
    """Measure part by part, print a table (or the figures as JSON) and write the figures to `out`."""
    console = Console(stderr=as_json, width=max(_TABLE_WIDTH, Console().width))
    figures: dict[str, Any] = {"machine": machine(packages), "parts": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    measured = {}
    for name, (title, measure) in parts.items():
        console.print(f"{title} ...", style="dim", highlight=False)
        measured[title] = measure()
        rows = [{**asdict(figure), "is_met": figure.is_met} for figure in measured[title]]
        figures["parts"][name] = {"title": title, "figures": rows}
        out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")  # what follows may fail
    if as_json:
        print(json.dumps(figures))
    else:
        _print(console, figures["machine"], measured)
        console.print(f"figures in {out}")
    return figures


def _print(console: Console, facts: Mapping[str, str], measured: Mapping[str, list[Figure]]) -> None:
    console.print("  ".join(f"{name} {value}" for name, value in facts.items()), highlight=False)
    table = Table("", "", "target", "met")
    for title, figures in measured.items():
        table.add_section()
        table.add_row(title, style="bold")
        for figure in figures:
            table.add_row(figure.name, _value(figure, figure.value), *_target(figure))
    console.print(table)


def _target(figure: Figure) -> tuple[str, str]:
    if figure.target is None:
        return "", ""
    bound = "at least" if figure.at_least else "at most"
    return f"{bound} {_value(figure, figure.target)}", "yes" if figure.is_met else "no"


def _value(figure: Figure, value: float) -> str:
    if figure.unit == "%":
        return f"{value:.2f} %"
    digits = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{digits} {figure.unit}".rstrip() if figure.unit != "x" else f"{digits}x"
