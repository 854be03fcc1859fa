"""The generated code that is checked in is that of the wire formats that are checked in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROTOS = sorted(path.stem for path in (ROOT / "protos").glob("*.proto"))
WITH_SERVICES = {path.stem for path in (ROOT / "protos").glob("*.proto") if "\nservice " in path.read_text()}
ENDINGS = ["_pb2.py", "_pb2.pyi", "_pb2_grpc.py"]


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the compiler writes to."""
    out = tmp_path_factory.mktemp("generated")
    sources = [f"propolis/protos/{name}.proto" for name in PROTOS]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-Ipropolis/protos=protos"]
    subprocess.run([*command, f"--python_out={out}", f"--pyi_out={out}", *sources], check=True, cwd=ROOT)
    services = [f"propolis/protos/{name}.proto" for name in sorted(WITH_SERVICES)]
    subprocess.run([*command, f"--grpc_python_out={out}", *services], check=True, cwd=ROOT)
    return out / "propolis" / "protos"


@pytest.mark.parametrize("name", PROTOS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_generated_code_is_up_to_date(generated: Path, name: str, ending: str) -> None:
    if ending == ENDINGS[2] and name not in WITH_SERVICES:
        assert not (ROOT / "protos" / (name + ending)).exists()
        return
    assert (ROOT / "protos" / (name + ending)).read_bytes() == (generated / (name + ending)).read_bytes()


def test_no_generated_code_is_left_over(generated: Path) -> None:
    checked_in = {path.name for path in (ROOT / "protos").glob("*_pb2*")}
    assert checked_in == {path.name for path in generated.iterdir()}
    assert {"identity_pb2.py", "secagg_pb2.py"} <= checked_in
