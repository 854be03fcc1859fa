"""Opening a registry by where it is; what it is made of loads here, and not with the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from propolis.secure.errors import UsageError

if TYPE_CHECKING:
    from propolis.server.registry import Registry

_OPTIONAL = ("sqlalchemy", "fsspec")


def open_registry(location: str) -> Registry:
    """The registry at `location`, a folder or a URL of PostgreSQL.

    Raises:
        UsageError: there is none, its key is wrong or missing, or what it needs is not installed.
        StorageError: it cannot be reached.
    """
    with _installed():
        from propolis.server.registry import Registry
    return Registry(location)


def open_or_make(location: str, blobs: str | None = None) -> tuple[Registry, str | None]:
    """The registry at `location`, made where there is none.

    Args:
        location: a folder, or a URL of PostgreSQL.
        blobs: folder or URL for the models of a new one; see `Registry.make`.

    Returns:
        It, and what its owner must be told of a new one.

    Raises:
        UsageError: it is not usable; as `Registry.make` does.
    """
    with _installed():
        from propolis.server.registry import Registry
        from propolis.server.registry_database import Database
    is_new = not Database(location).exists
    registry = Registry.make(location, blobs)
    return registry, _notice(location) if is_new else None


def _notice(location: str) -> str:
    from propolis.server.registry_database import Database
    from propolis.server.registry_key import key_in_use

    database = Database(location)
    return (
        f"made the registry in {database.name}: keep a copy of its key ({key_in_use(database.folder)}), "
        "without which no model in it can be read"
    )


@contextmanager
def _installed() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _OPTIONAL:
            raise
        raise UsageError("a registry needs: pip install 'propolis[registry]'") from None
