"""What a registry says of a version: frozen records, and the names that are allowed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from propolis.model_files import FLOAT32_FILE
from propolis.secure.errors import UsageError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LONGEST_VALUE, _LONGEST_DATA_NAME = 1000, 200


class Format(StrEnum):
    """What a version's own file is."""

    SAFETENSORS = "safetensors"
    ENCRYPTED = "encrypted"  # under a key of homomorphic encryption, which devices have and no server has


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a version comes from; what is not known is None.

    Attributes:
        federation: fingerprint of the federation's root, in hexadecimal.
        run_id: of the run that trained it.
        round: after which it was the global model.
        parent: the version of the same model that it was made from.
        configuration: the settings of the run.
        metrics: on the server's test set, and whatever else the last round reported; None was no finite number.
        uplink_bytes: that all devices sent in the run.
        downlink_bytes: that all devices received in the run.
        survivors: devices whose update is in the last round.
    """

    federation: str | None = None
    run_id: str | None = None
    round: int | None = None
    parent: int | None = None
    configuration: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    uplink_bytes: int | None = None
    downlink_bytes: int | None = None
    survivors: int | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of a version on a data set.

    Attributes:
        data: the data set's name.
        metrics: by name; None where it was not a finite number.
        evaluated_at: seconds since 1970.
        artifact: the file that was evaluated; None is the version's own.
    """

    data: str
    metrics: Mapping[str, float | None]
    evaluated_at: float
    artifact: str | None = None

    def __str__(self) -> str:
        return self.data if self.artifact is None else f"{self.data}, {self.artifact}"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A further file of a version.

    Attributes:
        name: of the file.
        kind: what it is for: a name of `propolis.secure.manifest.Kind`, in lower case.
        digest: SHA-256 of its content, in hexadecimal.
        size: in bytes.
        code: that says who wrote this, see `code_of_artifact`.
    """

    name: str
    kind: str
    digest: str
    size: int
    code: str


@dataclass(frozen=True, slots=True)
class Released:
    """A release of a version.

    Attributes:
        sequence: its number, among the releases of its model.
        manifest: the digest of its manifest, in hexadecimal.
        created_at, expires_at: seconds since 1970; the second is the last moment to install it.
        parent: the sequence before; 0 is none.
    """

    sequence: int
    manifest: str
    created_at: float
    expires_at: float
    parent: int


@dataclass(frozen=True, slots=True)
class Version:
    """A version of a model, to which more is added and of which nothing changes but aliases and tags.

    Attributes:
        model: its model's name.
        version: 1 for the first of its model.
        digest: SHA-256 of its file, in hexadecimal.
        size: of its file, in bytes.
        created_at: seconds since 1970.
        lineage: where it comes from.
        aliases: that are at this version.
        tags: by key.
        evaluations: the oldest first.
        artifacts: in the order that they were attached in.
        releases: the oldest first.
        code: that says who wrote what never changes, see `code_of_version`.
        format: of its file.
    """

    model: str
    version: int
    digest: str
    size: int
    created_at: float
    lineage: Lineage
    aliases: tuple[str, ...]
    tags: Mapping[str, str]
    evaluations: tuple[Evaluation, ...]
    artifacts: tuple[Artifact, ...]
    releases: tuple[Released, ...]
    code: str
    format: Format = Format.SAFETENSORS

    def __str__(self) -> str:
        return f"{self.model} {self.version}"

    @property
    def is_encrypted(self) -> bool:
        """Whether only devices can read its weights."""
        return self.format is Format.ENCRYPTED

    def require_readable(self, what: str) -> None:
        """Raises UsageError where it is encrypted, which keeps `what` from being done, such as "to convert it"."""
        if self.is_encrypted:
            raise UsageError(
                f"{self} is encrypted, and nothing here can read it {what}: a device that has the key can, with "
                "propolis client open"
            )

    @property
    def is_converted(self) -> bool:
        """Whether it has a model that can be served."""
        return any(each.name == FLOAT32_FILE for each in self.artifacts)


def is_name(text: str) -> bool:
    """Whether it may be the name of a model, an alias or a tag."""
    return _NAME.fullmatch(text) is not None


def require_name(name: str, what: str = "model") -> str:
    """The name again; raises UsageError unless it has 1 to 64 letters, digits, dots, dashes and underscores."""
    if not is_name(name):
        raise UsageError(
            f"{what} {name[:80]!r}: expected at most 64 letters, digits, dots, dashes and underscores, "
            "the first a letter or a digit"
        )
    return name


def require_alias(alias: str) -> str:
    """The alias again; raises UsageError unless it is a name, and no number: that would be a version."""
    if alias.isdecimal():
        raise UsageError(f"alias '{alias}': a number is a version; choose a word")
    return require_name(alias, "alias")


def require_tags(tags: Mapping[str, str]) -> Mapping[str, str]:
    """The tags again; raises UsageError when a key is no name, or a value is too long."""
    for key, value in tags.items():
        require_name(key, "tag")
        if len(value) > _LONGEST_VALUE or "\0" in value or value != value.encode(errors="replace").decode():
            raise UsageError(f"tag '{key}': expected a text of at most {_LONGEST_VALUE} characters")
    return tags


def require_data_name(name: str) -> str:
    """The data set's name again; raises UsageError when it is empty, too long or not printable."""
    if not name.isprintable() or not 0 < len(name) <= _LONGEST_DATA_NAME:
        raise UsageError(f"data set {name[:80]!r}: expected 1 to {_LONGEST_DATA_NAME} printable characters")
    return name


def finite(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    """Metrics as JSON can say them: None for what is infinite or not a number."""
    return {
        name: float(value) if value is not None and math.isfinite(value) else None for name, value in metrics.items()
    }
