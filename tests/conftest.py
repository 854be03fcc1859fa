"""Fixtures: the small task, the command line in a process of its own, and an empty registry."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import postgres
import pytest

from harness import Blobs, one_line_error

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def unfiltered() -> Iterator[None]:
    """A simulation lets its devices say each thing once in a process; the next test starts anew."""
    yield
    logging.getLogger("propolis.client").filters.clear()


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


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    with postgres.server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def location(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where a registry is that has just been made; its blobs are in ``registry/blobs`` of the test's folder."""
    from registries import KEY

    from propolis.server.registry import Registry

    if request.param == "sqlite":
        Registry.make(tmp_path / "registry")
        yield str(tmp_path / "registry")
        return
    if reason := postgres.missing():
        pytest.skip(reason)
    monkeypatch.setenv("PROPOLIS_REGISTRY_KEY", KEY)
    with postgres.database(request.getfixturevalue("postgres_server")) as url:
        Registry.make(url, str(tmp_path / "registry" / "blobs"))
        yield url


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with whole engines, which take longest: two processes share the files."""
    items.sort(key=lambda item: "integration" not in item.path.parts)
