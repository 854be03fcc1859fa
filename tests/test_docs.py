"""Documentation that cannot rot: its commands, flags, links and example are checked against the code."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import Command
from pydantic import BaseModel

from propolis.cli import app
from propolis.client.config import ClientConfig
from propolis.client.state import _POLICY_KEYS
from propolis.server.config import SIMULATED_ONLY, ServerConfig
from propolis.server.roster import load_roster
from propolis.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
README = (ROOT / "README.md").read_text()


@cache
def command_line() -> Any:
    """All commands; making them takes half a second."""
    return typer.main.get_command(app)


def known_flags(*path: str) -> set[str]:
    command = command_line()
    for name in path:
        command = command.commands[name]
    return {flag for parameter in command.params for flag in parameter.opts}


def table_of_flags(header: str) -> dict[str, str]:
    """The rows of the README's table whose first column is called so."""
    _, found, rest = README.partition(f"\n| {header} | meaning |\n")
    assert found, header
    return dict(re.findall(r"^\| `(--[a-z0-9-]+)` \| (.*) \|$", rest.split("\n\n")[0], re.MULTILINE))


def require_defaults(rows: dict[str, str], model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        if isinstance(field.default, (str, int, float)):
            assert rows[f"--{name.replace('_', '-')}"].endswith(f" (`{field.default}`)")


def test_every_flag_is_documented_with_its_default() -> None:
    rows = table_of_flags("flag")
    assert set(rows) == known_flags("simulate") - {"--help"}
    require_defaults(rows, Settings)


def test_every_flag_of_the_processes_is_documented_with_its_default() -> None:
    server, client = table_of_flags("flag of `propolis server`"), table_of_flags("flag of `propolis client run`")
    settings = {f"--{name.replace('_', '-')}" for name in Settings.model_fields.keys() - SIMULATED_ONLY}
    assert set(server) == known_flags("server") - {"--help"} - settings
    assert set(client) == known_flags("client", "run") - {"--help"}
    require_defaults(server, ServerConfig)
    require_defaults(client, ClientConfig)


@pytest.mark.parametrize("command", ["serve", "predict", "export", "models publish"])
def test_every_flag_of_the_commands_for_models_is_documented_with_its_default(command: str) -> None:
    rows = table_of_flags(f"flag of `propolis {command}`")
    found = command_line()
    for name in command.split():
        found = found.commands[name]
    flags = [parameter for parameter in found.params if parameter.param_type_name == "option"]
    for parameter in flags:
        (flag,) = parameter.opts
        shown = parameter.default not in (None, False, "", ...) and not (parameter.required or parameter.is_flag)
        assert not shown or rows[flag].endswith(f" (`{parameter.default}`)"), flag
    assert set(rows) == {flag for parameter in flags for flag in parameter.opts}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_flags_in_the_pages_exist(page: Path) -> None:
    commands = "simulate|server|serve|predict|export|bench|federation|client|models|package|rollout"
    for line in re.findall(rf"propolis (?:{commands})\b[^`\n|]*", page.read_text()):
        words = shlex.split(line.split("#")[0].rstrip(".;,"))
        depth = (
            3 if words[1] in ("bench", "federation", "client", "models", "package", "rollout") and len(words) > 2 else 2
        )
        flags = {word for word in words if word.startswith("--")}
        assert flags <= known_flags(*words[1:depth]), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_security_claim_names_a_test_that_exists() -> None:
    claims = re.findall(r"\[`(test_\w+)`\]\(([^)]+)\)", (ROOT / "SECURITY.md").read_text())
    assert claims
    for test, path in claims:
        assert f"def {test}(" in (ROOT / path).read_text()


def test_make_targets_in_the_pages_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z]+)`", page.read_text())) <= targets


def test_the_readmes_example_is_short_and_works(propolis: Command, tmp_path: Path) -> None:
    (source,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "class Diabetes" in block)
    assert source.count("\n") < 60
    (tmp_path / "diabetes.py").write_text(source)
    (line,) = re.findall(r"^propolis (simulate --task diabetes:Diabetes.*)$", README, re.MULTILINE)
    done = propolis(*shlex.split(line), "--rounds", 3)
    assert done.returncode == 0, done.stderr


def test_the_readme_makes_a_federation_that_can_be_used(tmp_path: Path) -> None:
    (source,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "make_federation" in block)
    subprocess.run([sys.executable, "-c", source], cwd=tmp_path, check=True)
    assert load_roster(tmp_path / "fed" / "server").require_member(1)
    assert (tmp_path / "fed" / "device-1" / "device.state").is_file()


def test_every_policy_key_is_documented() -> None:
    assert set(re.findall(r"`(propolis-[a-z-]+)`", README)) == set(_POLICY_KEYS)


def test_public_functions_have_docstrings() -> None:
    import propolis

    assert all(inspect.getdoc(getattr(propolis, name)) for name in propolis.__all__)
