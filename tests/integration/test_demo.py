"""The demo's command, as the Makefile has it, on the real data."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import Command

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_reaches_its_accuracy_and_brings_its_model_home(propolis: Command, tmp_path: Path) -> None:
    (line,) = re.findall(r"^demo:.*\n\t\$\(BIN\)/propolis (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    done = propolis(*shlex.split(line))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "runs/demo/result.json").read_text())
    assert (result["task"], result["clients"]) == ("digits", 10)
    assert result["accuracy"] >= 0.95
    assert (tmp_path / "runs/demo/curves.png").exists()
    assert "delivered  to 10 of 10 devices" in done.stdout
    (said,) = re.findall(r"^predicted .* accuracy (\S+)$", done.stdout, re.MULTILINE)
    assert float(said) == pytest.approx(result["accuracy"], abs=1e-4)  # what the devices have is what was trained
