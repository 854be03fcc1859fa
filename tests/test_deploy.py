"""The files of deploy/ are read as systemd, compose and Propolis read them; only their programs are missing."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from propolis.client.config import SETTINGS_FILE, load_client_config
from propolis.client.state import policy_of
from propolis.server.config import load_served

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
PROGRAM = "/opt/propolis/bin/propolis"
KNOWN = {
    "Unit": {"Description", "Wants", "After"},
    "Service": {
        "CapabilityBoundingSet", "ExecStart", "KillMode", "KillSignal", "LimitCORE", "LimitNOFILE", "LockPersonality",
        "Nice", "NoNewPrivileges", "PrivateDevices", "PrivateTmp", "ProtectClock", "ProtectControlGroups",
        "ProtectHome", "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables",
        "ProtectSystem", "Restart", "RestartPreventExitStatus", "RestartSec", "RestrictAddressFamilies",
        "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID", "StateDirectory", "StateDirectoryMode",
        "SuccessExitStatus", "SystemCallArchitectures", "SystemCallFilter", "TimeoutStopSec", "Type", "UMask", "User",
        "WorkingDirectory",
    },
    "Install": {"WantedBy"},
}  # fmt: skip


def sections(unit: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    current: dict[str, str] = {}
    for line in unit.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            current = found.setdefault(line.strip("[]"), {})
        else:
            key, value = line.split("=", 1)
            assert key not in current, f"{key} is given twice"
            current[key] = value
    return found


def toml(name: str) -> dict[str, Any]:
    return tomllib.loads((DEPLOY / name).read_text())


def compose() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return read


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_units_have_known_keys_only_and_are_hardened(unit: Path) -> None:
    found = sections(unit)
    assert found.keys() == KNOWN.keys()
    for section, keys in found.items():
        assert keys.keys() <= KNOWN[section], section
    service = found["Service"]
    assert (service["User"], service["StateDirectory"]) == ("propolis", "propolis")
    assert (service["NoNewPrivileges"], service["ProtectSystem"]) == ("yes", "strict")
    assert service["Restart"] == "on-failure"
    assert service["ExecStart"].startswith(f"{PROGRAM} ")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here to ask")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_has_nothing_to_say_of_the_units(unit: Path, tmp_path: Path) -> None:
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace(PROGRAM, "/bin/true"))
    command = ["systemd-analyze", "verify", "--man=no", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert unit.stem not in done.stderr
    assert done.returncode == 0, done.stderr


def test_services_and_containers_run_the_same_commands() -> None:
    services = compose()["services"]
    assert services.keys() == {unit.stem.removeprefix("propolis-") for unit in UNITS}
    for name, service in services.items():
        command = shlex.split(sections(DEPLOY / f"propolis-{name}.service")["Service"]["ExecStart"])
        assert command[1:] == service["command"]


def test_what_the_containers_are_made_of_exists() -> None:
    read = compose()
    for service in read["services"].values():
        context = (DEPLOY / service["build"]["context"]).resolve()
        assert context == ROOT
        assert (context / service["build"]["dockerfile"]).is_file()
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).is_file() if source.startswith(".") else source in read["volumes"]
        assert set(service.get("depends_on", [])) <= read["services"].keys()
    mounts = {volume.split(":")[0] for service in read["services"].values() for volume in service["volumes"]}
    assert read["volumes"].keys() <= mounts


def test_ports_are_those_that_the_server_listens_on() -> None:
    settings = toml("server.toml")["server"]
    listening = [settings[key].rsplit(":", 1)[1] for key in ("listen", "enroll")]
    assert compose()["services"]["server"]["ports"] == [f"{port}:{port}" for port in listening]


def test_the_image_installs_torch_first_and_every_room() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = {source for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for source in line.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    assert copied >= {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "src"}
    assert copied >= {link.name for link in (ROOT / "src/propolis").iterdir() if link.is_symlink()}
    installs = re.findall(r"^RUN pip install .*--constraint constraints.txt (\S+)$", text, re.MULTILINE)
    assert installs == ["torch", "'.[demo]'"]


def test_the_servers_settings_are_valid() -> None:
    served = load_served(DEPLOY / "server.toml", {})
    assert served.settings.is_protected
    assert served.settings.max_weight is not None
    assert served.settings.clients == served.config.wait_for
    state = "/var/lib/propolis/"
    assert all(folder.startswith(state) for folder in (served.config.federation, served.config.out))


def test_the_devices_settings_are_valid(tmp_path: Path) -> None:
    (tmp_path / SETTINGS_FILE).write_text('server = "cloud.example:7441"\n')
    config = load_client_config(tmp_path, DEPLOY / "client.toml", {}, "")
    assert policy_of(config.node).min_cohort == 3
    assert config.server == "cloud.example:7441"
