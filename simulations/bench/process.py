"""Whole commands, timed from outside."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

from propolis.secure.errors import PropolisError


@dataclass(frozen=True, slots=True)
class Timing:
    """One finished command.

    Attributes:
        seconds: wall time from start to exit.
        peak_rss_mb: largest resident set of any single process of it, in MB (1e6 bytes).
        output: what it wrote to standard output.
    """

    seconds: float
    peak_rss_mb: float
    output: str


def time_module(module: str, arguments: Sequence[str], running: set[subprocess.Popen[str]] | None = None) -> Timing:
    """Run ``python -m MODULE ARGUMENTS`` as a process of its own.

    Args:
        module: to run.
        arguments: for it.
        running: holds the process while it runs, so that somebody else can end it.

    Raises:
        PropolisError: it exited with another code than 0.
    """
    command = [sys.executable, "-m", module, *arguments]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
            _member(running, process),
        ):
            output = process.stdout.read() if process.stdout else ""
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            errors.seek(0)
            last_line = (errors.read().strip().splitlines() or ["no output"])[-1]
            raise PropolisError(f"{' '.join(command[2:])} exited with {process.returncode}: {last_line}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Timing(time.perf_counter() - began, usage.ru_maxrss * unit / 1e6, output)


@contextmanager
def _member(running: set[subprocess.Popen[str]] | None, process: subprocess.Popen[str]) -> Iterator[None]:
    if running is None:
        yield
        return
    running.add(process)
    try:
        yield
    finally:
        running.discard(process)


def machine(packages: Sequence[str]) -> Mapping[str, str]:
    """What a figure depends on: processor, cores, Python and package versions."""
    facts = {"processor": _processor(), "cores": str(os.cpu_count()), "python": platform.python_version()}
    return {**facts, **{name: version(name) for name in packages}}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 (not a file of ours)
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
