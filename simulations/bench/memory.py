"""How much memory a process takes, as Linux counts it."""

from __future__ import annotations

import os
from pathlib import Path


def resident_of(pid: int) -> int:
    """Bytes of a process in memory."""
    return int(_read(pid, "statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget_peak(pid: int | None = None) -> None:
    """Let `peak` of a process, this one by default, count from now on."""
    Path(f"/proc/{pid or os.getpid()}/clear_refs").write_text("5", encoding="ascii")


def peak(pid: int | None = None) -> int:
    """The most bytes that a process, this one by default, had in memory since `forget_peak`."""
    (line,) = (line for line in _read(pid or os.getpid(), "status").splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _read(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text(encoding="ascii")
