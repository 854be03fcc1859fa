"""A command that serves models, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from harness import free_port


@contextmanager
def serving(folder: Path, command: Sequence[str], *more: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process, ready; it is ended at the end."""
    port = free_port()
    flags = ["--listen", f"127.0.0.1:{port}", "--metrics", f"127.0.0.1:{free_port()}", "--log-format", "json"]
    line = [sys.executable, "-m", "propolis", *command, *flags, *map(str, more)]
    with subprocess.Popen(line, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            while (logged := json.loads(process.stderr.readline()))["message"] != "serving":
                pass
            yield process, f"127.0.0.1:{logged['port']}"
        finally:
            process.kill()
