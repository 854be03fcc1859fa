"""The package is what the tree says it is."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import propolis

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("client", "protos", "secure", "server", "simulations")


def tracked_sources() -> set[str]:
    """What the wheel must hold: every source of the rooms and of src/propolis, by its installed path."""
    expected = {f"propolis/{p.name}" for p in (ROOT / "src/propolis").glob("*.py")} | {"propolis/py.typed"}
    for layer in ("link", "serving"):
        expected |= {f"propolis/{layer}/{p.name}" for p in (ROOT / "src/propolis" / layer).glob("*.py")}
    for room in ROOMS:
        expected |= {
            f"propolis/{p.relative_to(ROOT).as_posix()}"
            for p in (ROOT / room).rglob("*")
            if p.suffix in (".py", ".pyi")
        }
    return expected


def test_the_wheel_holds_exactly_the_tree(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert files == tracked_sources()


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_reached_by_relative_links(room: str) -> None:
    link = ROOT / "src/propolis" / room
    assert link.is_symlink()
    assert link.readlink() == Path("../..") / room


def test_public_names_are_there() -> None:
    for name in propolis.__all__:
        assert getattr(propolis, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        propolis.nothing  # noqa: B018


def test_import_and_help_load_nothing_heavy() -> None:
    code = (
        "import sys, propolis, propolis.cli; "
        "heavy = {'torch', 'flwr', 'ray', 'matplotlib', 'tenseal', 'onnx', 'onnxruntime', 'grpc', 'cryptography'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_telemetry_is_off_unless_asked_for() -> None:
    code = "import propolis, flwr.supercore.telemetry as t; print(t.FLWR_TELEMETRY_ENABLED)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "0"


def test_constraints_pin_what_the_package_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    for requirement in project["dependencies"]:
        name = requirement.split("=")[0].split("<")[0].split(">")[0].lower()
        assert name in pinned, f"{name} is not in constraints.txt"


def test_the_version_is_said_once_everywhere() -> None:
    done = subprocess.run([sys.executable, "-m", "propolis", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == propolis.__version__
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == propolis.__version__
