"""Processes that are killed at a chosen step of what they do on the disk."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from propolis.secure import content
from propolis.secure.errors import PropolisError

# Renaming covers `os.replace`; opening counts where it may write.
WRITES = frozenset(
    {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.link", "os.symlink", "os.truncate"}
)


def die_at(number: int, act: Callable[[], object]) -> bool:
    """Do something in a process that gets SIGKILL before its n-th step on the disk; False when it has fewer."""
    child = os.fork()
    if child == 0:
        _dying(number)
        try:
            act()
        except PropolisError:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def _dying(number: int) -> None:
    """Die before the n-th change of a file, flush to the disk, or chunk."""
    steps, fsync, require_chunk = list[str](), os.fsync, content.require_chunk

    def step(what: str) -> None:
        steps.append(what)
        if len(steps) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in WRITES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            step(event)

    def counted(function: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            step(function.__name__)
            function(*arguments)

        return call

    os.fsync, content.require_chunk = counted(fsync), counted(require_chunk)
    sys.addaudithook(audit)
