"""Versions of a registry into a registry of MLflow, for those who look at models there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from propolis.clear_folder import clear_folder
from propolis.secure.errors import StorageError, UsageError
from propolis.server.registry import Registry
from propolis.server.registry_records import Version
from propolis.server.urls import without_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL_FILE = "model.safetensors"
_DIGEST, _VERSION = "propolis.sha256", "propolis.version"


def export_to_mlflow(registry: Registry, model: str, uri: str, artifacts: str | None = None) -> dict[int, int]:
    """Copy the versions of a model, with their lineage, figures, tags and aliases; those that are there stay.

    The models are in clear there.

    Args:
        registry: to copy from.
        model: whose versions.
        uri: of MLflow's tracking store and registry, such as ``sqlite:///mlflow.db`` or ``http://HOST:PORT``.
        artifacts: where MLflow keeps the files of an experiment that is made; MLflow's own choice by default.

    Returns:
        MLflow's number of each version.

    Raises:
        UsageError: MLflow is not installed, a version is encrypted, there is no such model, or MLflow refuses.
    """
    versions = registry.versions(model)
    for version in versions:
        version.require_readable("for MLflow, where models are in clear")
    client = _client(uri)
    with _reporting(uri):
        experiment = client.get_experiment_by_name(model)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(model, artifacts)
        if not client.search_registered_models(f"name = '{model}'"):
            client.create_registered_model(model)
        known = {
            int(each.tags[_VERSION]): int(each.version)
            for each in client.search_model_versions(f"name = '{model}'")
            if _VERSION in each.tags
        }
        for version in versions:
            if version.version not in known:
                known[version.version] = _add(client, experiment_id, registry, version)
            for alias in version.aliases:
                client.set_registered_model_alias(model, alias, str(known[version.version]))
    return known


def _client(uri: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read once, when it is imported
    try:
        from mlflow import MlflowClient
    except ModuleNotFoundError:
        raise UsageError("the export needs MLflow: pip install 'propolis[mlflow]'") from None
    with _reporting(uri):
        return MlflowClient(uri, uri)


@contextmanager
def _reporting(uri: str) -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise StorageError(f"MLflow at {without_secrets(uri)}: {without_secrets(said[0])[:300]}") from None


def _add(client: MlflowClient, experiment: str, registry: Registry, version: Version) -> int:
    run = client.create_run(experiment, run_name=str(version))
    run_id = run.info.run_id
    for name, value in version.lineage.configuration.items():
        client.log_param(run_id, name, value)
    for name, figure in version.lineage.metrics.items():
        if figure is not None:
            client.log_metric(run_id, name, figure, step=version.lineage.round or 0)
    for evaluation in version.evaluations:
        for name, value in evaluation.metrics.items():
            if value is not None:
                client.log_metric(run_id, f"{_known_letters(str(evaluation))}/{name}", value)
    with clear_folder(version.size) as folder:
        registry.export(version, folder / MODEL_FILE)
        client.log_artifact(run_id, str(folder / MODEL_FILE))
    client.set_terminated(run_id)
    made = client.create_model_version(version.model, run.info.artifact_uri, run_id, tags=_tags(version))
    return int(made.version)


def _tags(version: Version) -> dict[str, Any]:
    lineage = version.lineage
    ours = {
        _VERSION: version.version,
        _DIGEST: version.digest,
        "propolis.federation": lineage.federation,
        "propolis.run": lineage.run_id,
        "propolis.parent": lineage.parent,
        "propolis.uplink-bytes": lineage.uplink_bytes,
        "propolis.downlink-bytes": lineage.downlink_bytes,
        "propolis.survivors": lineage.survivors,
    }
    return {**version.tags, **{key: str(value) for key, value in ours.items() if value is not None}}


def _known_letters(name: str) -> str:
    """MLflow's metrics have names of letters, digits and a few signs."""
    return "".join(letter if letter.isalnum() or letter in "_-. " else "-" for letter in name)
