"""A PostgreSQL for the tests: the one that PROPOLIS_TEST_POSTGRES names, else one of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from harness import free_port

VARIABLE = "PROPOLIS_TEST_POSTGRES"


def missing() -> str | None:
    """Why there is none; None where there is one."""
    if os.environ.get(VARIABLE) or _programs() is not None:
        return None
    return f"no PostgreSQL here: install it, or name one in {VARIABLE}"


@contextmanager
def server() -> Iterator[str]:
    """The URL of a server's database, which others may be in."""
    if named := os.environ.get(VARIABLE):
        yield named
        return
    programs = _programs()
    assert programs is not None
    with TemporaryDirectory(prefix="propolis-postgres-") as folder:
        data, port = Path(folder) / "data", free_port()
        if os.getuid() == 0:  # which PostgreSQL refuses to be run by
            shutil.chown(folder, "postgres")
        _run(programs / "initdb", "--pgdata", data, "--username", "propolis", "--auth", "trust", "--no-sync")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        _run(programs / "pg_ctl", "--pgdata", data, "--log", f"{folder}/log", "--wait", "-o", options, "start")
        try:
            yield f"postgresql://propolis@127.0.0.1:{port}/postgres"
        finally:
            _run(programs / "pg_ctl", "--pgdata", data, "--mode", "immediate", "stop")


@contextmanager
def database(of: str) -> Iterator[str]:
    """The URL of a new and empty database."""
    import psycopg
    from sqlalchemy import make_url

    name = f"propolis_{uuid4().hex}"
    with psycopg.connect(of, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        try:
            yield make_url(of).set(database=name).render_as_string(hide_password=False)
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _programs() -> Path | None:
    """The folder with initdb and pg_ctl: Debian keeps them out of the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    named = shutil.which("initdb")
    return Path(named).resolve().parent if named and shutil.which("pg_ctl") else None


def _run(*command: object) -> None:
    words = [str(word) for word in command]
    if os.getuid() == 0:
        words = ["runuser", "-u", "postgres", "--", *words]
    subprocess.run(words, check=True, cwd="/", stdout=subprocess.DEVNULL, timeout=60)
