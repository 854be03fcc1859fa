"""What the courses of the codec benchmark's runs come to: bytes, ratios, and rounds to the reference's accuracy.

A ratio says how many times less a codec costs than what it is compared with. Runs are compared with the reference of
their own job and seed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from propolis.secure.codec.wraps import expected_wraps
from propolis.simulations.bench.codec_jobs import REFERENCE, Course

# Rounds whose mean accuracy is compared: under skew it swings by a point from round to round.
WINDOW = 10


@dataclass(frozen=True, slots=True)
class RunFigures:
    """One run on its own.

    Attributes:
        up: bytes that a device sent in a round, mean.
        down: bytes that a device received in a round, mean.
        last: accuracy after the last round.
        mean_of_ten: mean accuracy of the last ten rounds.
    """

    up: float
    down: float
    last: float
    mean_of_ten: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run beside its reference.

    Attributes:
        up_ratio: bytes that a device sends in a round.
        down_ratio: bytes that a device receives in a round.
        points: mean accuracy of the last ten rounds minus the reference's, in percentage points.
        reached: first round whose ten last accuracies have the reference's final mean; None: no round.
        reference_reached: the same of the reference itself.
        total_up_ratio: the reference's bytes up in all its rounds, over this run's up to `reached`.
        total_down_ratio: the same, down.
        early_up_ratio: as `total_up_ratio`, but the reference's rounds count up to `reference_reached` only.
        early_down_ratio: the same, down.
        whole_up_ratio: all of the reference's bytes up over all of this run's.
        whole_down_ratio: the same, down.
    """

    up_ratio: float
    down_ratio: float
    points: float
    reached: int | None
    reference_reached: int | None
    total_up_ratio: float | None
    total_down_ratio: float | None
    early_up_ratio: float | None
    early_down_ratio: float | None
    whole_up_ratio: float
    whole_down_ratio: float


@dataclass(frozen=True, slots=True)
class RingFigures:
    """How the sums of a run fit their ring.

    Attributes:
        wraps: counted in all rounds.
        expected: in all rounds, at each round's grid, root mean square and correlation (which has a margin in it).
        expected_largest: of a single round.
        expected_alike: of a single round, mean, if all devices' updates were the same.
        correlation: mean of the metric ``scale-correlation``: what was seen, times 1.5 and 0.02 more.
        clipped: mean share of the devices whose update was scaled down.
        saturated: values that were cut off, in all rounds.
        widest: bits of the widest ring after the first round.
    """

    wraps: int
    expected: float
    expected_largest: float
    expected_alike: float
    correlation: float
    clipped: float
    saturated: int
    widest: int


def figures_of(course: Course) -> RunFigures:
    """A run on its own."""
    devices = sum(course.devices)
    accuracy = course.accuracy
    return RunFigures(sum(course.up) / devices, sum(course.down) / devices, accuracy[-1], fmean(accuracy[-WINDOW:]))


def compare(course: Course, reference: Course) -> Comparison:
    """A run beside the reference of its job and seed."""
    own, other = figures_of(course), figures_of(reference)
    reached = first_reach(course.accuracy, other.mean_of_ten)
    itself = first_reach(reference.accuracy, other.mean_of_ten)
    return Comparison(
        up_ratio=other.up / own.up,
        down_ratio=other.down / own.down,
        points=100 * (own.mean_of_ten - other.mean_of_ten),
        reached=reached,
        reference_reached=itself,
        total_up_ratio=_ratio(reference.up, len(reference.up), course.up, reached),
        total_down_ratio=_ratio(reference.down, len(reference.down), course.down, reached),
        early_up_ratio=_ratio(reference.up, itself, course.up, reached),
        early_down_ratio=_ratio(reference.down, itself, course.down, reached),
        whole_up_ratio=sum(reference.up) / sum(course.up),
        whole_down_ratio=sum(reference.down) / sum(course.down),
    )


def first_reach(accuracy: Sequence[float], target: float) -> int | None:
    """The first round (from 1) at which the mean of the last `WINDOW` rounds is at least `target`.

    Args:
        accuracy: after each round; of fewer than `WINDOW` rounds, all of them are the last ones.
        target: a mean of as many.

    Returns:
        The round; None when there is none.
    """
    window = min(WINDOW, len(accuracy))
    means = ((end, fmean(accuracy[end - window : end])) for end in range(window, len(accuracy) + 1))
    return next((end for end, mean in means if mean >= target), None)


def ring_figures(course: Course, count: int) -> RingFigures:
    """How the sums of a run with a rotating codec fit their ring.

    Args:
        course: of a run with codec dense or thin.
        count: coordinates that travel.
    """
    expected = [_expected(course, place, count) for place in range(1, len(course.up))]
    metrics = course.metrics
    return RingFigures(
        wraps=round(sum(metrics["wraps"])),
        expected=sum(seen for seen, _ in expected),
        expected_largest=max((seen for seen, _ in expected), default=0.0),
        expected_alike=fmean(alike for _, alike in expected) if expected else 0.0,
        correlation=fmean(metrics["scale-correlation"]),
        clipped=fmean(metrics["clipped"]),
        saturated=round(sum(metrics["saturated"])),
        widest=round(max(metrics["bits"][1:], default=0)),
    )


def summarize(courses: Iterable[Course], counts: Mapping[tuple[str, str], int], flower: Mapping[str, float]) -> Any:
    """Every figure of every job and codec: its mean over the seeds, and each seed's.

    Args:
        courses: of the runs that have ended.
        counts: coordinates that travel, by job and codec, of the codecs that rotate.
        flower: bytes that a device sends under Flower's SecAgg+, by job.

    Returns:
        A list of dictionaries, in the order in which jobs and codecs first come; a figure is a dictionary with
        `mean` (None where a seed has none) and `seeds`.
    """
    groups: dict[tuple[str, str], list[Course]] = {}
    for course in courses:
        groups.setdefault((course.planned.job, course.planned.codec), []).append(course)
    references = {(c.planned.job, c.planned.seed): c for c in groups_of(groups, REFERENCE)}
    rows = []
    for (job, codec), group in groups.items():
        group.sort(key=lambda course: course.planned.seed)
        each = [_all_figures(c, references.get((job, c.planned.seed)), counts.get((job, codec))) for c in group]
        for figures in each:
            if job in flower:
                figures["flower_ratio"] = flower[job] / figures["up"]
        seeds = [course.planned.seed for course in group]
        rows.append(
            {"job": job, "codec": codec, "rounds": group[0].planned.rounds, "seeds": seeds, "figures": _means(each)}
        )
    return rows


def groups_of(groups: Mapping[tuple[str, str], Sequence[Course]], codec: str) -> list[Course]:
    """The courses of one codec, over all jobs."""
    return [course for (_, name), group in groups.items() if name == codec for course in group]


def _all_figures(course: Course, reference: Course | None, count: int | None) -> dict[str, Any]:
    figures: dict[str, Any] = asdict(figures_of(course))
    if reference is not None and course is not reference:
        figures |= asdict(compare(course, reference))
    if count is not None:
        figures |= asdict(ring_figures(course, count))
    return figures


def _means(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = list(dict.fromkeys(name for figures in each for name in figures))
    columns = {name: [figures.get(name) for figures in each] for name in names}
    return {
        name: {"mean": None if None in column else fmean(v for v in column if v is not None), "seeds": column}
        for name, column in columns.items()
    }


def _ratio(reference: Sequence[int], until: int | None, own: Sequence[int], reached: int | None) -> float | None:
    return None if reached is None or until is None else sum(reference[:until]) / sum(own[:reached])


def _expected(course: Course, place: int, count: int) -> tuple[float, float]:
    """Wraps to be expected of a round after the first: as its devices were, and were they all alike."""
    width = round(course.metrics["bits"][place])
    step = course.metrics["update-range"][place] / (2 ** (width - 1) - 1)
    grid = step / course.metrics["scale-rms"][place]
    devices, correlation = course.devices[place], course.metrics["scale-correlation"][place]
    seen, alike = (expected_wraps(count, devices, width, grid, each) for each in (correlation, 1.0))
    return seen, alike
