"""The registry: every model that was trained, in versions, encrypted, with where it comes from and what became of it.

A version is registered when its row is committed. Its blob is stored before, so a crash leaves at worst a blob that no
row names, which `sweep` removes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, select

from propolis.secure.errors import UsageError
from propolis.secure.manifest import Kind
from propolis.server.registry_authentic import require_authentic
from propolis.server.registry_database import Database
from propolis.server.registry_files import Files, NewArtifact
from propolis.server.registry_history import Aliases, add_version, records_of, registered_before, row_of
from propolis.server.registry_key import load_key
from propolis.server.registry_making import make_registry
from propolis.server.registry_records import (
    Format,
    Lineage,
    Version,
    finite,
    is_name,
    require_data_name,
    require_name,
    require_tags,
)
from propolis.server.registry_releases import Demand, NewRelease, add_release, content_key_of, take_sequence
from propolis.server.registry_tables import evaluations, tags, versions
from propolis.server.vault import Vault, digest_of, format_of
from propolis.storage import remove_stale, write_atomically

BLOBS_FOLDER = "blobs"
GRACE_S = 3600.0  # that a blob without a row is left alone by `sweep`: a slow upload may be on its way


class Registry:
    """An open registry; several processes and threads may use one at once.

    Args:
        location: a folder, or a URL of PostgreSQL.

    Raises:
        UsageError: there is no registry, it is of another version's, or its key is wrong or missing.
        StorageError: the database cannot be reached.
    """

    def __init__(self, location: str | Path) -> None:
        self._database = Database(str(location))
        self._database.require_made()
        self._key = key = load_key(self._database.folder)
        blobs = self._database.opened(key)
        self._vault = Vault(key, blobs or str((self._database.folder or Path()).absolute() / BLOBS_FOLDER))
        self._files = Files(self._database, self._vault, key)

    @classmethod
    def make(cls, location: str | Path, blobs: str | None = None) -> Registry:
        """The registry at `location`, made when there is none.

        Args:
            location: a folder, or a URL of PostgreSQL.
            blobs: folder or URL for the models of a new one; in the registry's folder by default.

        Raises:
            UsageError: a URL of PostgreSQL came without `blobs`, or as for an open one.
            StorageError: it cannot be written.
        """
        make_registry(str(location), blobs)
        return cls(location)

    @property
    def name(self) -> str:
        """Where it is, without a password."""
        return self._database.name

    def register(self, model: str, file: Path, lineage: Lineage | None = None) -> Version:
        """Make a file the next version of a model.

        The same file of the same run and round again is the version that it was: who was interrupted may ask again.

        Args:
            model: its name.
            file: of safetensors, or an encrypted model.
            lineage: where it comes from.

        Raises:
            UsageError: the name or the lineage's parent is wrong, or the file is none of these.
            StorageError: it could not be stored; nothing has been registered.
        """
        require_name(model)
        lineage = lineage or Lineage()
        form = format_of(file)
        digest, size = digest_of(file)

        def add(connection: Connection) -> Version:
            number = registered_before(connection, model, digest, lineage)
            number = number or self._add(connection, model, digest, size, lineage, form)
            return self._version(connection, model, number)

        return self._files.commit([(file, digest)], add)

    def attach(self, version: Version, name: str, kind: Kind, content: Path | bytes) -> Version:
        """Add a file to a version; raises as `attach_all` does."""
        return self.attach_all(version, [NewArtifact(name, kind, content)])

    def attach_all(
        self,
        version: Version,
        files: Sequence[NewArtifact],
        figures: Mapping[str, Mapping[str, float]] | None = None,
        data: str = "",
    ) -> Version:
        """Add files to a version, and figures of them, all or none; a file that it has already stays as it is.

        Args:
            version: to add to.
            files: their names are new to the version.
            figures: metrics by the name of the file that has them.
            data: name of the data set that the figures are of.

        Raises:
            UsageError: a file cannot be read, or the version has another one of its name.
            StorageError: something could not be stored; nothing has been added.
        """

        def add(connection: Connection, version_id: int) -> Version:
            for file, metrics in (figures or {}).items():
                _add_evaluation(connection, version_id, data, metrics, file)
            return self._version(connection, version.model, version.version)

        return self._files.attach(files, lambda connection: self._row(connection, version.model, version.version), add)

    def artifact(self, version: Version, name: str) -> bytes:
        """The content of a file that was attached to a version, whole and authentic.

        Raises:
            UsageError: it has none of this name, or the blob is missing, damaged or another one.
            StorageError: it cannot be read.
        """
        return b"".join(self._read_artifact(version, name))

    def models(self) -> list[str]:
        """Names of the models that have versions."""
        with self._database.reading() as connection:
            return list(connection.scalars(select(versions.c.model).distinct().order_by(versions.c.model)))

    def versions(self, model: str | None = None) -> list[Version]:
        """The versions of one model, or of all, the oldest first.

        Raises:
            UsageError: there is no such model.
        """
        wanted = [] if model is None else [versions.c.model == require_name(model)]
        with self._database.reading() as connection:
            found = records_of(connection, *wanted)
        if model is not None and not found:
            raise UsageError(f"there is no model '{model}' in {self.name}")
        return found

    def version(self, model: str, wanted: int | str) -> Version:
        """One version, by its number or an alias.

        Raises:
            UsageError: there is no such model, version or alias.
        """
        with self._database.reading() as connection:
            return self._version(connection, model, wanted)

    def read(self, version: Version) -> Iterator[bytes]:
        """The file of a version, in chunks; each is authentic, and the last comes only of a whole file.

        Raises:
            UsageError: the blob is missing, damaged or another one, or the version's row is not as it was registered;
                before the first byte that is not the version's.
            StorageError: it cannot be read.
        """
        self.require_authentic(version)
        yield from self._files.read(version.digest, version)

    def require_authentic(self, version: Version) -> None:
        """Raises UsageError where the database says something else of a version than what was registered."""
        require_authentic(self._key, version)

    def export(self, version: Version, out: Path, name: str | None = None) -> None:
        """Write the file of a version, or one attached to it, for its owner alone: it is in clear; raises as `read`."""
        content = self.read(version) if name is None else self._read_artifact(version, name)
        remove_stale(out)  # in clear, too
        write_atomically(out, content, mode=0o600)

    def verify(self, version: Version) -> None:
        """Read all of a version, with what is attached to it; raises as `read` does."""
        for content in (self.read(version), *(self._read_artifact(version, each.name) for each in version.artifacts)):
            for _ in content:
                pass

    def promote(self, model: str, wanted: int | str, alias: str = "champion") -> Version:
        """Set an alias to a version; raises UsageError when there is none such, or the alias is no word."""
        with self._database.writing() as connection:
            row = self._row(connection, model, wanted)
            Aliases(connection, model).set(alias, row.id)
            return self._version(connection, model, row.version)

    def rollback(self, model: str, alias: str = "champion") -> Version:
        """Set an alias to the version it was at before; again, to the one before that.

        Raises:
            UsageError: there is no such alias, or it was at no version before.
        """
        with self._database.writing() as connection:
            return self._version(connection, model, Aliases(connection, model).set_back(alias))

    def tag(self, model: str, wanted: int | str, given: Mapping[str, str], removed: Iterable[str] = ()) -> Version:
        """Set and remove tags of a version; raises UsageError when there is none such, or a tag is not usable."""
        require_tags(given)
        with self._database.writing() as connection:
            row = self._row(connection, model, wanted)
            mine = tags.c.version_id == row.id
            connection.execute(tags.delete().where(mine, tags.c.key.in_([*given, *filter(is_name, removed)])))
            for key, value in given.items():
                connection.execute(tags.insert().values(version_id=row.id, key=key, value=value))
            return self._version(connection, model, row.version)

    def add_evaluation(self, version: Version, data: str, metrics: Mapping[str, float]) -> Version:
        """Keep figures of a version on a data set, beside those it has; raises UsageError."""
        with self._database.writing() as connection:
            row = self._row(connection, version.model, version.version)
            _add_evaluation(connection, row.id, data, metrics)
            return self._version(connection, version.model, version.version)

    def sweep(self, grace: float = GRACE_S, remove: bool = True) -> list[str]:
        """Remove what interrupted registrations left.

        Args:
            grace: seconds that it must have been there; at least as long as an upload takes.
            remove: False only looks.

        Returns:
            Names of the blobs that no version has.

        Raises:
            StorageError: the database or the blobs cannot be reached.
        """
        return self._files.sweep(grace, remove)

    def next_sequence(
        self, model: str, demand: Demand | None = None, wanted: tuple[int | str, int] | None = None
    ) -> tuple[int, int]:
        """Take the number of a model's next release, for good: nobody else gets it, whatever becomes of this one.

        Args:
            model: its name.
            demand: of the number.
            wanted: what the version to release was asked for as, an alias or its number, and its number.

        Returns:
            The number, and that of the release before; 0 is none.

        Raises:
            UsageError: the alias is at another version by now, or the number is not as demanded; none has been taken.
        """
        with self._database.writing() as connection:
            if wanted is not None:
                found = self._row(connection, model, wanted[0]).version
                if found != wanted[1]:
                    raise UsageError(f"{wanted[0]} has moved to {found} meanwhile: nothing was released")
            return take_sequence(connection, require_name(model), demand or Demand())

    def add_release(self, version: Version, release: NewRelease) -> Version:
        """Keep that a version was released, and the content key, encrypted; raises StorageError."""
        with self._database.writing() as connection:
            row = self._row(connection, version.model, version.version)
            add_release(connection, self._key, row.id, version.model, release)
            return self._version(connection, version.model, version.version)

    def content_key(self, manifest_digest: bytes) -> bytes | None:
        """The content key of a release, for devices that enrol later; None where the release is not of this registry.

        Raises:
            UsageError: what is kept is damaged.
        """
        with self._database.reading() as connection:
            return content_key_of(connection, self._key, manifest_digest)

    def _read_artifact(self, version: Version, name: str) -> Iterator[bytes]:
        found = next((each for each in version.artifacts if each.name == name), None)
        if found is None:
            known = ", ".join(each.name for each in version.artifacts) or "none"
            raise UsageError(f"{version} has no file {name!r}: those attached to it are {known}")
        require_authentic(self._key, version, found)
        return self._files.read(found.digest, f"{name} of {version}")

    def _row(self, connection: Connection, model: str, wanted: int | str) -> Row[Any]:
        return row_of(connection, require_name(model), wanted, self.name)

    def _version(self, connection: Connection, model: str, wanted: int | str) -> Version:
        row = self._row(connection, model, wanted)
        return records_of(connection, versions.c.id == row.id)[0]

    def _add(self, connection: Connection, model: str, digest: bytes, size: int, lineage: Lineage, form: Format) -> int:
        """The commit point of a registration."""
        if lineage.parent is not None:
            self._row(connection, model, lineage.parent)
        return add_version(connection, self._key, model, digest, size, lineage, form)


def _add_evaluation(
    connection: Connection, version_id: int, data: str, metrics: Mapping[str, float], artifact: str | None = None
) -> None:
    row = {"version_id": version_id, "data": require_data_name(data), "metrics": finite(metrics), "artifact": artifact}
    connection.execute(evaluations.insert().values({**row, "evaluated_at": time.time()}))
