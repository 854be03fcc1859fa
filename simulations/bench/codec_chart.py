"""The codec benchmark's chart: accuracy against the bytes that all devices have sent and received."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from itertools import accumulate
from statistics import fmean
from typing import Any

from propolis.simulations.bench.codec_figures import WINDOW
from propolis.simulations.bench.codec_jobs import CODECS, REFERENCE, Course
from propolis.size import format_bytes

# Okabe and Ito's colours, which differ for colour-blind eyes too; and a mark for each, for eyes without colours.
_LOOKS = {
    REFERENCE: ("#000000", "o", "float32, unprotected"),
    "float32": ("#E69F00", "s", "secagg, float32"),
    "dense": ("#0072B2", "^", "secagg, dense"),
    "thin": ("#D55E00", "D", "secagg, thin"),
}
_PEER = ("#009E73", "*", "Flower's SecAgg+")
# Accuracies below this share of the way from the lowest to the highest are left out, except where a curve ends there.
_SHOWN = 0.55

Curve = tuple[list[float], list[float]]


def draw_chart(courses: Sequence[Course], about: str, flower: float | None, devices: int) -> bytes:
    """Accuracy (mean of the last ten rounds) against bytes so far, up and down, as a PNG.

    Args:
        courses: of one job, with its reference.
        about: the job.
        flower: bytes that a device sends in a round under Flower's SecAgg+; None where that is not known.
        devices: in a round.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.8), dpi=150, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, way in zip(axes, ("up", "down"), strict=True):
        for codec in CODECS:
            group = [course for course in courses if course.planned.codec == codec]
            if group:
                _draw_codec(axis, group, codec, way)
        _label_bytes(axis)
        axis.set_xlabel(f"bytes {way}, all devices, until this round")
        axis.grid(visible=True, which="major", color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    references = [course for course in courses if course.planned.codec == REFERENCE]
    _draw_target(axes, references)
    _draw_peer(axes, references, flower, devices)
    _zoom(axes[0], courses)
    axes[0].set_ylabel(f"test accuracy, mean of the last {WINDOW} rounds")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(about, fontsize=10)
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def curve_of(course: Course, way: str) -> Curve:
    """Bytes so far and the mean accuracy of the last rounds, from the first round that has enough of them."""
    sizes = list(accumulate(getattr(course, way)))
    window = min(WINDOW, len(sizes))
    ends = range(window, len(sizes) + 1)
    return [float(sizes[end - 1]) for end in ends], [fmean(course.accuracy[end - window : end]) for end in ends]


def _draw_codec(axis: Any, group: Sequence[Course], codec: str, way: str) -> None:
    colour, mark, name = _LOOKS[codec]
    curves = [curve_of(course, way) for course in group]
    if len(curves) > 1:
        for sizes, accuracy in curves:
            axis.plot(sizes, accuracy, color=colour, linewidth=0.6, alpha=0.35)
    sizes, accuracy = ([fmean(values) for values in zip(*parts, strict=False)] for parts in zip(*curves, strict=True))
    axis.plot(sizes, accuracy, color=colour, linewidth=1.8, label=f"{name} ({len(group[0].up)} rounds)")
    axis.plot(sizes[-1], accuracy[-1], color=colour, marker=mark, markersize=6)


def _label_bytes(axis: Any) -> None:
    """A logarithmic axis with round numbers of bytes at it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.xaxis.set_major_formatter(lambda size, _: format_bytes(size).replace(".00", ""))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _draw_target(axes: Sequence[Any], references: Sequence[Course]) -> None:
    target = fmean(fmean(course.accuracy[-WINDOW:]) for course in references)
    for axis in axes:
        axis.axhline(target, color="0.5", linewidth=0.8, linestyle=":")


def _draw_peer(axes: Sequence[Any], references: Sequence[Course], flower: float | None, devices: int) -> None:
    """Where Flower's SecAgg+ would be after the reference's rounds, as accurate as the reference."""
    if flower is None:
        return
    colour, mark, name = _PEER
    accuracy = fmean(fmean(course.accuracy[-WINDOW:]) for course in references)
    sent = flower * devices * len(references[0].up)
    received = fmean(sum(course.down) for course in references)  # the model alone, and more than that in truth
    for axis, size in zip(axes, (sent, received), strict=True):
        label = f"{name} ({len(references[0].up)} rounds, if as accurate)"
        # Hollow: to the right it lies on the reference's own mark.
        axis.plot(
            *(size, accuracy),
            color=colour,
            marker=mark,
            markersize=14,
            markerfacecolor="none",
            markeredgewidth=1.6,
            linestyle="none",
            label=label,
        )


def _zoom(axis: Any, courses: Sequence[Course]) -> None:
    curves = [curve_of(course, "up")[1] for course in courses]
    low, high = min(map(min, curves)), max(map(max, curves))
    height = max(high - low, 1e-3)
    worst = min(curve[-1] for curve in curves)
    axis.set_ylim(min(low + _SHOWN * height, worst - 0.1 * height), high + 0.03 * height)
