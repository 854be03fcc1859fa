"""What ``propolis bench codec`` trains: whole commands, two at a time, each run's course read from its result.json."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from propolis.secure.errors import PropolisError, UsageError
from propolis.server.report import RESULT
from propolis.simulations.bench.process import time_module

# Unprotected FedAvg, which sends every value as a float32: what the codecs are compared with.
REFERENCE = "reference"
CODECS = (REFERENCE, "float32", "dense", "thin")
_AT_ONCE = 2
# Of a round's metrics; an unprotected round has none of them.
METRICS = ("wraps", "clipped", "saturated", "bits", "update-range", "scale-rms", "scale-correlation")


@dataclass(frozen=True, slots=True)
class Variant:
    """One codec in a job: `reference`, or one of the codecs under secure aggregation."""

    codec: str
    rounds: int
    seeds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One model on one task, trained with several codecs.

    Attributes:
        name: of the part of the benchmark that it is.
        about: for a person.
        task: as `--task` takes it.
        arguments: what all its runs are started with besides.
        variants: the reference first.
    """

    name: str
    about: str
    task: str
    arguments: tuple[str, ...]
    variants: tuple[Variant, ...]


@dataclass(frozen=True, slots=True)
class Planned:
    """One run to do."""

    job: str
    codec: str
    seed: int
    rounds: int
    command: tuple[str, ...]

    def __str__(self) -> str:
        return f"job {self.job}: {self.codec}, seed {self.seed}, {self.rounds} rounds"


@dataclass(frozen=True, slots=True)
class Course:
    """How a run went.

    Attributes:
        planned: what was done.
        seconds: the whole command's.
        accuracy: after each round, on the server's test set.
        up: bytes of all the devices' messages, by round.
        down: bytes of all the messages to devices, by round.
        devices: that were asked, by round.
        metrics: those of `METRICS`, by name and round; 0 where a round has none.
    """

    planned: Planned
    seconds: float
    accuracy: tuple[float, ...]
    up: tuple[int, ...]
    down: tuple[int, ...]
    devices: tuple[int, ...]
    metrics: Mapping[str, tuple[float, ...]]

    @classmethod
    def of_result(cls, planned: Planned, seconds: float, result: Mapping[str, Any]) -> Self:
        """From the content of result.json."""
        history = result["history"]
        return cls(
            planned=planned,
            seconds=seconds,
            accuracy=tuple(record["accuracy"] for record in history),
            up=tuple(record["uplink_bytes"] for record in history),
            down=tuple(record["downlink_bytes"] for record in history),
            devices=tuple(record["survivors"] + record["dropped"] for record in history),
            metrics={name: tuple(record["metrics"].get(name, 0.0) for record in history) for name in METRICS},
        )

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> Self:
        """What `to_json` gave, after a way through a file."""
        planned = Planned(**{**data["planned"], "command": tuple(data["planned"]["command"])})
        columns = {name: tuple(data[name]) for name in ("accuracy", "up", "down", "devices")}
        metrics = {name: tuple(values) for name, values in data["metrics"].items()}
        return cls(planned=planned, seconds=data["seconds"], metrics=metrics, **columns)

    def to_json(self) -> dict[str, Any]:
        """As a dictionary of plain values."""
        return asdict(self)


def planned_runs(jobs: Iterable[Job], data: Path | None = None) -> tuple[Planned, ...]:
    """Every run of the jobs, the longest of a job first: two at a time then end together."""
    planned = [
        Planned(job.name, variant.codec, seed, variant.rounds, _command(job, variant, seed, data))
        for job in jobs
        for variant in job.variants
        for seed in variant.seeds
    ]
    return tuple(sorted(planned, key=lambda run: (run.job, -run.rounds)))


def kept_courses(out: Path) -> tuple[Course, ...]:
    """The courses in the figures of an earlier benchmark.

    Raises:
        UsageError: the file holds none.
    """
    try:
        return tuple(Course.of_json(data) for data in json.loads(out.read_text(encoding="utf-8"))["runs"])
    except OSError as error:
        raise UsageError(f"cannot resume from {out}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{out} holds no figures of this benchmark: leave out --resume") from None


def run_all(
    planned: Sequence[Planned], started: Callable[[Planned], None]
) -> Iterator[tuple[Planned, Course | PropolisError]]:
    """Do the runs, two at a time, and yield each with its course, or with why it failed, as it ends.

    Args:
        planned: what to do.
        started: told when a run begins.
    """
    running: set[subprocess.Popen[str]] = set()
    pool = ThreadPoolExecutor(_AT_ONCE)
    try:
        futures = {pool.submit(_run, run, started, running): run for run in planned}
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, PropolisError):
                yield futures[future], error
            else:
                yield futures[future], future.result()
    finally:  # somebody who stops here wants no processes left behind
        pool.shutdown(wait=False, cancel_futures=True)
        for process in tuple(running):
            with suppress(OSError):
                process.terminate()
        pool.shutdown()


def _run(planned: Planned, started: Callable[[Planned], None], running: set[subprocess.Popen[str]]) -> Course:
    started(planned)
    with tempfile.TemporaryDirectory(prefix="propolis-bench-") as folder:
        timing = time_module("propolis", [*planned.command, "--out", folder], running)
        result = json.loads((Path(folder) / RESULT).read_text(encoding="utf-8"))
    return Course.of_result(planned, timing.seconds, result)


def _command(job: Job, variant: Variant, seed: int, data: Path | None) -> tuple[str, ...]:
    codec = () if variant.codec == REFERENCE else ("--protection", "secagg", "--codec", variant.codec)
    where = ("--data", str(data)) if data else ()
    size = ("--rounds", str(variant.rounds), "--seed", str(seed))
    return ("simulate", "--task", job.task, *job.arguments, *size, *codec, *where, "--json")
