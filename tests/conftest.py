"""Fixtures: the small task, and the command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import Blobs, one_line_error

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def blobs() -> Blobs:
    return Blobs()


@pytest.fixture
def propolis(tmp_path: Path) -> Command:
    """Run ``propolis ARGUMENTS`` in an empty folder."""

    def run(*arguments: object, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "propolis", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "120"},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def mistake(propolis: Command) -> Callable[..., str]:
    """The one line that these arguments get."""
    return lambda *arguments: one_line_error(propolis(*arguments))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with whole engines, which take longest: two processes share the files."""
    items.sort(key=lambda item: "integration" not in item.path.parts)
