"""What a registry's key says of its rows: nobody who only writes to the database can make or change one unseen."""

from __future__ import annotations

import hmac
import json
from dataclasses import asdict

from propolis.secure.errors import UsageError
from propolis.server.at_rest import RegistryKey
from propolis.server.registry_records import Artifact, Format, Lineage, Version


def code_of_version(
    key: RegistryKey, model: str, version: int, digest: str, size: int, lineage: Lineage, form: Format
) -> str:
    """The authentication code of a version's row: over all that is in it, but for when it was made.

    The format is left out where it is safetensors: so the codes of rows hold that were made before there was another.
    """
    said = [json.dumps(asdict(lineage), sort_keys=True), *([] if form is Format.SAFETENSORS else [form.value])]
    return key.code_of("version", model, str(version), digest, str(size), *said)


def code_of_artifact(key: RegistryKey, model: str, version: int, name: str, kind: str, digest: str, size: int) -> str:
    """The authentication code of an artifact's row, bound to the version that it is of."""
    return key.code_of("artifact", model, str(version), name, kind, digest, str(size))


def require_authentic(key: RegistryKey, version: Version, artifact: Artifact | None = None) -> None:
    """Raises UsageError unless who has the key wrote what is said of a version, and of one of its artifacts."""
    of_version = (version.model, version.version, version.digest, version.size, version.lineage, version.format)
    made = code_of_version(key, *of_version)
    whole = hmac.compare_digest(made.encode(), version.code.encode())
    if artifact is not None:
        of = (artifact.name, artifact.kind, artifact.digest, artifact.size)
        made = code_of_artifact(key, version.model, version.version, *of)
        whole &= hmac.compare_digest(made.encode(), artifact.code.encode())
    if not whole:
        what = f"{artifact.name} of {version}" if artifact else version
        raise UsageError(f"{what}: somebody without the registry's key changed what its database says of it")
