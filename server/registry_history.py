"""A registry's rows as records, and the history of its aliases."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, func, select

from propolis.secure.errors import UsageError
from propolis.server.at_rest import RegistryKey
from propolis.server.registry_authentic import code_of_version
from propolis.server.registry_records import (
    Artifact,
    Evaluation,
    Format,
    Lineage,
    Released,
    Version,
    finite,
    is_name,
    require_alias,
)
from propolis.server.registry_tables import alias_changes, artifacts, evaluations, releases, tags, versions

_LARGEST_VERSION, _LONGEST_NUMBER = 2**31 - 1, 10  # of a database's integers
_LINEAGE = tuple(each.name for each in fields(Lineage))


def records_of(connection: Connection, *wanted: ColumnElement[bool]) -> list[Version]:
    """The versions that the conditions leave, by model and number, with all that is known of them."""
    rows = connection.execute(select(versions).where(*wanted).order_by(versions.c.model, versions.c.version)).all()
    ids = select(versions.c.id).where(*wanted)
    aliases = defaultdict[int, list[str]](list)
    for change in connection.execute(_current_aliases().order_by(alias_changes.c.alias)):
        aliases[change.version_id].append(change.alias)
    tagged = defaultdict[int, dict[str, str]](dict)
    for tag in connection.execute(select(tags).where(tags.c.version_id.in_(ids)).order_by(tags.c.key)):
        tagged[tag.version_id][tag.key] = tag.value
    evaluated = defaultdict[int, list[Evaluation]](list)
    for each in connection.execute(
        select(evaluations).where(evaluations.c.version_id.in_(ids)).order_by(evaluations.c.id)
    ):
        evaluated[each.version_id].append(Evaluation(each.data, each.metrics, each.evaluated_at, each.artifact))
    attached, released = _attached(connection, ids), _released(connection, ids)
    return [
        Version(
            **_of_row(row),
            aliases=tuple(aliases[row.id]),
            tags=tagged[row.id],
            evaluations=tuple(evaluated[row.id]),
            artifacts=tuple(attached[row.id]),
            releases=tuple(released[row.id]),
        )
        for row in rows
    ]


def row_of(connection: Connection, model: str, wanted: int | str, where: str) -> Row[Any]:
    """The row of one version, by its number or an alias; raises UsageError, which says that it is not in `where`."""
    number = _number(connection, model, str(wanted))
    row = connection.execute(
        select(versions).where(versions.c.model == model, versions.c.version == number)
    ).one_or_none()
    if row is not None:
        return row
    wanted = str(wanted)[:80].encode(errors="replace").decode()
    known = connection.scalars(
        select(versions.c.version).where(versions.c.model == model).order_by(versions.c.version)
    ).all()
    if not known:
        raise UsageError(f"there is no model '{model}' in {where}")
    raise UsageError(f"{model} has no version or alias '{wanted}': its versions are {_spans(known)}")


def _number(connection: Connection, model: str, wanted: str) -> int | None:
    """The version that a number or an alias names, as far as a database can be asked for it."""
    if wanted.isdecimal():
        return int(wanted) if len(wanted) <= _LONGEST_NUMBER and int(wanted) <= _LARGEST_VERSION else None
    return Aliases(connection, model).at(wanted) if is_name(wanted) else None


def registered_before(connection: Connection, model: str, digest: bytes, lineage: Lineage) -> int | None:
    """The version that this file of this run and round is already."""
    if lineage.run_id is None:
        return None
    same = (
        versions.c.model == model,
        versions.c.digest == digest.hex(),
        versions.c.run_id == lineage.run_id,
        versions.c.round == lineage.round,
    )
    known: int | None = connection.scalar(select(func.min(versions.c.version)).where(*same))
    return known


def add_version(
    connection: Connection, key: RegistryKey, model: str, digest: bytes, size: int, lineage: Lineage, form: Format
) -> int:
    """Add the row of a model's next version, and return its number."""
    last = connection.scalar(select(func.max(versions.c.version)).where(versions.c.model == model)) or 0
    lineage = replace(lineage, metrics=finite(lineage.metrics))
    row = {
        "model": model,
        "version": last + 1,
        "digest": digest.hex(),
        "blob": key.name_of(digest),
        "size": size,
        "created_at": time.time(),
        "code": code_of_version(key, model, last + 1, digest.hex(), size, lineage, form),
        "format": form.value,
        **asdict(lineage),
    }
    connection.execute(versions.insert().values(row))
    return int(last) + 1


def lineage_of(row: Row[Any]) -> Lineage:
    """Where a version comes from, as its row says."""
    return Lineage(**{name: getattr(row, name) for name in _LINEAGE})


class Aliases:
    """The aliases of one model, inside of a transaction.

    Each change is a row that names the row before it. A rollback is a change to the version of the row before the
    present one, and takes over what *that* one names, so that the next rollback goes further back and not forth.
    """

    def __init__(self, connection: Connection, model: str) -> None:
        self._connection, self._model = connection, model

    def at(self, alias: str) -> int | None:
        """The version that an alias is at."""
        row = self._current(alias)
        return None if row is None else self._version(row)

    def set(self, alias: str, version_id: int) -> None:
        """Set an alias; raises UsageError when it is no word."""
        current = self._current(require_alias(alias))
        if current is None or current.version_id != version_id:
            self._add(alias, version_id, None if current is None else current.id)

    def set_back(self, alias: str) -> int:
        """Set an alias to the version that it was at before, and return that; raises UsageError without one."""
        current = self._current(require_alias(alias))
        if current is None:
            raise UsageError(f"{self._model} has no alias '{alias}'")
        if current.before is None:
            raise UsageError(f"{self._model} had no {alias} before version {self._version(current)}")
        before = self._connection.execute(select(alias_changes).where(alias_changes.c.id == current.before)).one()
        self._add(alias, before.version_id, before.before)
        return self._version(before)

    def _current(self, alias: str) -> Row[Any] | None:
        mine = (alias_changes.c.model == self._model, alias_changes.c.alias == alias)
        return self._connection.execute(
            select(alias_changes).where(*mine).order_by(alias_changes.c.id.desc()).limit(1)
        ).one_or_none()

    def _version(self, change: Row[Any]) -> int:
        return int(
            self._connection.execute(select(versions.c.version).where(versions.c.id == change.version_id)).scalar_one()
        )

    def _add(self, alias: str, version_id: int, before: int | None) -> None:
        row = {
            "model": self._model,
            "alias": alias,
            "version_id": version_id,
            "before": before,
            "changed_at": time.time(),
        }
        self._connection.execute(alias_changes.insert().values(row))


def _current_aliases() -> Select[Any]:
    last = select(func.max(alias_changes.c.id)).group_by(alias_changes.c.model, alias_changes.c.alias)
    return select(alias_changes).where(alias_changes.c.id.in_(last))


def _attached(connection: Connection, ids: Select[Any]) -> dict[int, list[Artifact]]:
    found = defaultdict[int, list[Artifact]](list)
    rows = select(artifacts).where(artifacts.c.version_id.in_(ids)).order_by(artifacts.c.id)
    for row in connection.execute(rows):
        found[row.version_id].append(Artifact(row.name, row.kind, row.digest, row.size, row.code))
    return found


def _released(connection: Connection, ids: Select[Any]) -> dict[int, list[Released]]:
    found = defaultdict[int, list[Released]](list)
    rows = select(releases).where(releases.c.version_id.in_(ids)).order_by(releases.c.sequence)
    for row in connection.execute(rows):
        release = Released(row.sequence, row.manifest, row.created_at, row.expires_at, row.parent)
        found[row.version_id].append(release)
    return found


def _of_row(row: Row[Any]) -> dict[str, Any]:
    """What a version's own row says of it."""
    said = {name: getattr(row, name) for name in ("model", "version", "digest", "size", "created_at")}
    return {**said, "lineage": lineage_of(row), "code": row.code or "", "format": _format_of(row)}


def _format_of(row: Row[Any]) -> Format:
    """Of a version's file; raises UsageError where it is none that is known, as when somebody changed the row."""
    try:
        return Format(row.format or Format.SAFETENSORS)
    except ValueError:
        known = ", ".join(Format)
        raise UsageError(f"{row.model} {row.version} has a format that is none of {known}: {row.format!r}") from None


def _spans(numbers: Sequence[int]) -> str:
    """``1 to 3``; versions have no gaps."""
    return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
