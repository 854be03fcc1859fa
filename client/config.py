"""What a device process is told: ``client.toml`` in the device's folder, a file of its owner's, and flags on top."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from propolis.secure.errors import UsageError
from propolis.settings import build, given, read_toml

SETTINGS_FILE = "client.toml"
_LARGEST_MB, _LARGEST_MODEL_MB = 2**30, 4096
_PAIR = re.compile(r"([A-Za-z0-9_.-]+)=('[^']*'|\"[^\"]*\"|\S+)(?:\s+|$)")

NodeConfig = dict[str, bool | int | float | str]


class ClientConfig(BaseModel):
    """A device process. Frozen; unknown keys are refused; a description is the flag's help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    server: str | None = Field(None, description="HOST:PORT of the server; the one enrolled with by default.")
    task: str | None = Field(
        None,
        description="Task of the ready app and of encrypted models: built-in, or MODULE:CLASS installed here.",
    )
    data: str | None = Field(None, description="The device's own data, which the task reads.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps.")
    threads: int = Field(1, ge=0, le=1024, description="Threads that the ready app trains with; 0 leaves it to torch.")
    app: str | None = Field(None, description="MODULE:NAME of a Flower ClientApp to run in place of the ready one.")
    largest_message: int = Field(4096, ge=1, le=_LARGEST_MB, description="Largest request of the server, in MiB.")
    install: bool = Field(True, description="Install the models that are released to this device.")
    largest_model: int = Field(1024, ge=1, le=_LARGEST_MODEL_MB, description="Largest model to take, in MiB.")
    download_rate: int = Field(
        0, ge=0, le=_LARGEST_MB, description="KiB per second that models are fetched with at most; 0 is no bound."
    )
    store_plain: bool = Field(
        False, description="Leave the files of models unencrypted on the disk, for other programs."
    )
    log_format: Literal["text", "json"] = Field("text", description="How the log is written to standard error.")
    node: NodeConfig = Field(default_factory=dict, description="Flower's node configuration; policies are part of it.")


def load_client_config(folder: Path, config: Path | None, flags: Mapping[str, Any], node_config: str) -> ClientConfig:
    """A device's configuration.

    Args:
        folder: the device's, which enrolment made.
        config: a TOML file of its owner's.
        flags: win over both files; a value of None means "not given".
        node_config: ``key=value`` pairs, as Flower's own command takes them; they win over ``[node]``.

    Raises:
        UsageError: the device has not enrolled, a file cannot be read, a key is unknown, or a value out of range.
    """
    enrolled = folder / SETTINGS_FILE
    if not enrolled.is_file():
        raise UsageError(f"{folder} holds no enrolled device: run propolis client enroll first")
    values = {**read_toml(enrolled), **(read_toml(config) if config else {})}
    node = {**values.pop("node", {}), **parse_pairs(node_config)}
    return build(ClientConfig, {**values, **given(flags), "node": node}, source=str(config or enrolled))


def config_in(folder: Path, flags: Mapping[str, Any]) -> ClientConfig:
    """`load_client_config` for what needs no server: also of a device that has no file, as in a simulation."""
    if (folder / SETTINGS_FILE).is_file():
        return load_client_config(folder, None, flags, "")
    return build(ClientConfig, given(flags), source="flags")


def parse_pairs(text: str) -> NodeConfig:
    """``partition-id=3 name='a b'`` as a table.

    Raises:
        UsageError: it is not ``key=value`` pairs, or a value is no TOML scalar.
    """
    text = text.strip()
    pairs, end = NodeConfig(), 0
    while (found := _PAIR.match(text, end)) is not None:
        end = found.end()
        try:
            (pairs[found[1]],) = tomllib.loads(f"value = {found[2]}").values()
        except ValueError:
            raise UsageError(f"node configuration: {found[1]} needs a number, true, false or a quoted text") from None
    if end != len(text):
        raise UsageError(f"node configuration: expected KEY=VALUE pairs, got '{text[end:]}'")
    return pairs
