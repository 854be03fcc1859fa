"""``propolis bench codec``: accuracy against bytes for every codec, beside plain FedAvg and Flower's SecAgg+."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from propolis.secure.codec.profiles import PROFILES
from propolis.secure.codec.scale import expected_size
from propolis.secure.errors import PropolisError, UsageError
from propolis.simulations.bench.codec_chart import draw_chart
from propolis.simulations.bench.codec_figures import summarize
from propolis.simulations.bench.codec_jobs import (
    REFERENCE,
    Course,
    Job,
    Planned,
    Variant,
    kept_courses,
    planned_runs,
    run_all,
)
from propolis.simulations.bench.codec_messages import measure_messages
from propolis.simulations.bench.codec_speed import encoding_of, measure_speed
from propolis.simulations.bench.codec_table import WIDTH, print_tables
from propolis.simulations.bench.flower_secagg import flower_secagg_cost
from propolis.simulations.bench.process import machine
from propolis.storage import write_atomically
from propolis.task import load_task

_PACKAGES = ("flwr", "torch", "numpy", "propolis")
SPEED, MESSAGES, FLOWER = "speed", "messages", "flower"
_FEWEST_SHARES = 3
_TRAINING = ("--clients", "50", "--fraction", "0.4", "--partition", "dirichlet:0.3", "--epochs", "1")
_BATCHES = ("--batch-size", "32", "--lr", "0.1")
_BENCH_TASKS = "propolis.simulations.bench.tasks"
# Of made-up updates: what they are makes no difference to the bytes.
_DEVIATION = np.float32(0.01)


@dataclass(frozen=True, slots=True)
class Work:
    """What the benchmark does.

    Attributes:
        jobs: to train; the first one is drawn.
        parts: of `SPEED`, `MESSAGES` and `FLOWER`, those to measure.
        devices: in a round.
        dimension: parameters that are encoded for `SPEED`.
        data: folder with the tasks' data, where it is not where they look for it.
    """

    jobs: tuple[Job, ...]
    parts: frozenset[str]
    devices: int = 20
    dimension: int = 1_000_000
    data: Path | None = None


def published_work(parts: Collection[str] = (), seeds: int = 3, rounds: int = 80, data: Path | None = None) -> Work:
    """What the published figures are of.

    Args:
        parts: names of jobs and measurements; none stands for all.
        seeds: of job a's runs.
        rounds: of job a's reference; the other runs' follow.
        data: see `Work`.

    Raises:
        UsageError: there is no such part.
    """
    jobs = _published_jobs(seeds, rounds)
    known = (SPEED, MESSAGES, FLOWER, *(job.name for job in jobs))
    for part in parts:
        if part not in known:
            raise UsageError(f"the benchmark has no part '{part}'; choose from {', '.join(known)}")
    wanted = set(parts or known)
    measured = frozenset(wanted & {SPEED, MESSAGES, FLOWER})
    return Work(tuple(job for job in jobs if job.name in wanted), measured, data=data)


def run_benchmark(out: Path, as_json: bool, work: Work, resume: bool = False) -> dict[str, Any]:
    """Measure, print tables (or the figures as JSON), and write figures and a chart after each run that ends.

    Args:
        out: file for the figures; the chart lies beside it, as a PNG.
        as_json: print the figures as JSON and nothing else.
        work: what to do.
        resume: leave out the runs that `out` has already.

    Raises:
        UsageError: there is nothing to resume.
        PropolisError: a part failed; all the others have been done, and are in `out`.
    """
    console = Console(stderr=as_json, width=max(WIDTH, Console(stderr=as_json).width))
    bench = _Bench(out, console, work, kept_courses(out) if resume else ())
    bench.measure()
    bench.train()
    if as_json:
        print(json.dumps(bench.figures))
    else:
        print_tables(console, bench.figures)
        console.print(f"figures in {out}", highlight=False)
    if failed := bench.figures["failed"]:
        raise PropolisError(f"{len(failed)} of the benchmark's parts failed; the first: {failed[0]}")
    return bench.figures


class _Bench:
    """One benchmark under way; `figures` is what has been measured so far."""

    def __init__(self, out: Path, console: Console, work: Work, kept: Sequence[Course]) -> None:
        self._out, self._console, self._work = out, console, work
        self._courses = list(kept)
        jobs = {job.name: {"about": job.about, "dimension": _dimension(job, work.data)} for job in work.jobs}
        self.figures: dict[str, Any] = {"machine": machine(_PACKAGES), "jobs": jobs, "failed": [], "flower": {}}

    def measure(self) -> None:
        """What needs no training, while the machine has nothing else to do."""
        work = self._work
        if SPEED in work.parts:
            self._part(SPEED, lambda: {SPEED: measure_speed(work.dimension, work.devices)})
        if MESSAGES in work.parts:
            self._part(MESSAGES, lambda: {MESSAGES: measure_messages(work.devices)})
        if FLOWER in work.parts:
            for job in work.jobs:
                self._part(f"{FLOWER}, job {job.name}", lambda job=job: {FLOWER: self._flower(job)})  # type: ignore[misc]

    def train(self) -> None:
        """All the runs."""
        have = {course.planned for course in self._courses}
        planned = [run for run in planned_runs(self._work.jobs, self._work.data) if run not in have]
        self._write()
        for done, (run, course) in enumerate(run_all(planned, self._say_started), 1):
            if isinstance(course, PropolisError):
                self._fail(str(run), course)
            else:
                self._courses.append(course)
                self._say(
                    f"{run}: accuracy {course.accuracy[-1]:.4f} in {course.seconds:.0f} s ({done}/{len(planned)})"
                )
            self._write()

    def _part(self, name: str, measured: Callable[[], Mapping[str, Any]]) -> None:
        self._say(f"{name} ...")
        try:
            self.figures |= measured()
        except PropolisError as error:
            self._fail(name, error)
        self._write()

    def _flower(self, job: Job) -> dict[str, Any]:
        """Bytes that a device sends under Flower's SecAgg+, by job: on the complete graph, and with fewest shares."""
        dimension = self.figures["jobs"][job.name]["dimension"]
        rng = np.random.default_rng(0)
        updates = [rng.standard_normal(dimension, np.float32) * _DEVIATION for _ in range(self._work.devices)]
        complete = flower_secagg_cost(updates, 0).upload_bytes
        fewest = flower_secagg_cost(updates, 0, _FEWEST_SHARES).upload_bytes
        measured = {"dimension": dimension, "complete": complete, "fewest": fewest, "shares": _FEWEST_SHARES}
        return {**self.figures[FLOWER], job.name: measured}

    def _write(self) -> None:
        """Figures and chart as far as they are known."""
        flower = {job: row["fewest"] for job, row in self.figures[FLOWER].items()}
        ordered = _in_order(self._courses, self._work.jobs)
        self.figures["summary"] = summarize(ordered, _counts(self._work.jobs, self._work.data), flower)
        self.figures["runs"] = [course.to_json() for course in ordered]
        self._out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._out, json.dumps(self.figures).encode() + b"\n")
        if self._work.jobs:
            first = self._work.jobs[0]
            drawn = [course for course in ordered if course.planned.job == first.name]
            if any(course.planned.codec == REFERENCE for course in drawn):
                chart = draw_chart(drawn, first.about, flower.get(first.name), self._work.devices)
                write_atomically(self._out.with_suffix(".png"), chart)

    def _fail(self, name: str, error: PropolisError) -> None:
        said = f"{name}: {' '.join(str(error).split())}"
        self.figures["failed"].append(said)
        self._console.print(said, style="red", markup=False, highlight=False)

    def _say_started(self, run: Planned) -> None:
        self._say(f"{run} ...")

    def _say(self, line: str) -> None:
        self._console.print(line, style="dim", markup=False, highlight=False)


def _published_jobs(seeds: int, rounds: int) -> tuple[Job, ...]:
    longer, half = rounds * 3 // 2, max(1, rounds // 2)
    all_seeds, one = tuple(range(seeds)), (0,)
    wide, convolutional = f"{_BENCH_TASKS}:WideFashionMnist", f"{_BENCH_TASKS}:ConvolutionalFashionMnist"
    a = (
        Variant(REFERENCE, rounds, all_seeds),
        Variant("float32", rounds, one),
        Variant("dense", rounds, all_seeds),
        Variant("thin", longer, all_seeds),
    )
    b = (Variant(REFERENCE, rounds, one), Variant("thin", longer, one))
    c = tuple(replace(v, rounds=v.rounds * half // rounds, seeds=one) for v in a if v.codec != "float32")
    training = (*_TRAINING, *_BATCHES)
    return (
        Job("a", "Fashion-MNIST, perceptron 784-128-10", "fashion-mnist", training, a),
        Job("b", "Fashion-MNIST, perceptron 784-512-10", wide, training, b),
        Job("c", "Fashion-MNIST, two convolutions", convolutional, training, c),
    )


def _in_order(courses: Sequence[Course], jobs: Sequence[Job]) -> list[Course]:
    """As the jobs list them; what a resumed file has of other jobs comes last."""
    order = [(job.name, variant.codec) for job in jobs for variant in job.variants]

    def place(course: Course) -> tuple[int, int]:
        key = (course.planned.job, course.planned.codec)
        return order.index(key) if key in order else len(order), course.planned.seed

    return sorted(courses, key=place)


def _shapes(job: Job, data: Path | None) -> dict[str, tuple[int, ...]]:
    model = load_task(job.task, str(data) if data else None).model()
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _dimension(job: Job, data: Path | None) -> int:
    return sum(prod(shape) for shape in _shapes(job, data).values())


def _counts(jobs: Sequence[Job], data: Path | None) -> dict[tuple[str, str], int]:
    """Coordinates that travel, by job and codec, of the codecs that rotate."""
    return {
        (job.name, variant.codec): expected_size(encoding_of(PROFILES[variant.codec], shapes), shapes)
        for job in jobs
        for shapes in [_shapes(job, data)]
        for variant in job.variants
        if variant.codec in PROFILES and PROFILES[variant.codec].rotated
    }
