"""The command line as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Command

from propolis.settings import Settings

SMALL = ("--clients", "4", "--rounds", "2", "--epochs", "1")
Mistake = Callable[..., str]


def test_a_run_shows_a_row_per_round_and_says_where_its_files_are(propolis: Command, tmp_path: Path) -> None:
    done = propolis("simulate", *SMALL, "--out", "here")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["round", "accuracy", "loss", "up", "down", "survivors", "seconds"]
    assert [row[0] for row in rows[1:3]] == ["1", "2"]
    assert rows[1][7] == "4/4"
    assert done.stdout.splitlines()[-1].endswith("are in here")
    assert {path.name for path in (tmp_path / "here").iterdir()} == {
        *("result.json", "model.safetensors", "curves.png", "config.toml", "checkpoint.safetensors")
    }


def test_json_is_the_result_and_nothing_else(propolis: Command, tmp_path: Path) -> None:
    done = propolis("simulate", *SMALL, "--out", "here", "--json")
    assert json.loads(done.stdout) == json.loads((tmp_path / "here/result.json").read_text())


def test_flags_win_over_the_file(propolis: Command, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("clients = 4\nrounds = 9\nepochs = 1\n")
    done = propolis("simulate", "--config", "run.toml", "--rounds", 1, "--json")
    result = json.loads(done.stdout)
    assert (result["clients"], result["rounds"]) == (4, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "-3"], "rounds: expected greater than or equal to 1, got -3"),
        (["--rounds", "many"], "'many' is not a valid int"),
        (["--fraction", "0"], "fraction: expected greater than 0"),
        (["--fraction", "1.1"], "fraction: expected less than or equal to 1"),
        (["--strategy", "krum"], "'krum' is not one of"),
        (["--protection", "secagg", "--clients", "2"], "2 of 2 clients train in a round; a secure sum takes 3 or more"),
        (["--malicious"], "malicious is a kind of secagg: set protection to secagg"),
        (["--protection", "secagg", "--bits", "3"], "a ring of 3 bits is too small for 10 devices"),
        (["--codec", "thin"], "codec thin is for updates inside a secure sum"),
        (["--protection", "secagg", "--codec", "thin", "--density", "0"], "density"),
        (["--protection", "secagg", "--codec", "dense", "--clients", "200", "--bits", "3"], "3 bits is too small"),
        (["--protection", "secagg", "--codec", "float32", "--wraps", "0.5"], "wraps is for the codecs dense and thin"),
        (["--prune", "0.5", "--prune-end", "31"], "prune_end: expected a round from prune_begin to rounds"),
        (["--partition", "evenly"], "expected iid, dirichlet:ALPHA, shards:CLASSES or natural"),
        (["--partition", "natural"], "name no users"),
        (["--clients", "5000"], "5000 clients cannot share 1438 examples"),
        (["--task", "mnist"], "unknown task 'mnist'"),
        (["--task", "m\x1b[2J\nnist"], "unknown task 'm\\x1b[2J nist'"),
        (["--task", "absent:Task"], "cannot import absent"),
        (["--task", "fashion-mnist", "--data", "nowhere"], "sudo apt-get install dataset-fashion-mnist"),
        (["--data", "nowhere"], "the task digits reads no folder"),
        (["--backend", "ray", "--ray-cpus", "1000"], "a device cannot have 1000 of this machine's"),
        (["--out", "x" * 300], "File name too long"),
        (["--device", "meta"], "device 'meta' is not available"),
        (["--device", "cuda:77"], "device 'cuda:77' is not available"),
        (["--config", "absent.toml"], "cannot read absent.toml"),
        (["--resume", "absent"], "absent holds no run to resume"),
        (["--resume", "absent", "--force"], "leave out --out, --config and --force"),
        (["--ruonds", "3"], "No such option"),
        (["--out", "file/below"], "cannot write to file/below"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    mistake: Mistake, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "file").write_text("")
    assert message in mistake("simulate", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unknown_key_in_the_file_names_the_nearest(mistake: Mistake, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("learning_rate = 0.1\nbatchsize = 3\n")
    assert "unknown key" in mistake("simulate", "--config", "run.toml")
    (tmp_path / "run.toml").write_text("batchsize = 3\n")
    assert "the nearest known one is 'batch_size'" in mistake("simulate", "--config", "run.toml")


def test_a_checkpoint_of_another_model(propolis: Command, mistake: Mistake, tmp_path: Path) -> None:
    assert propolis("simulate", *SMALL, "--out", "here").returncode == 0
    (tmp_path / "narrow.py").write_text(
        "from torch import nn\nfrom propolis.simulations.tasks.digits import Digits\n"
        "class Narrow(Digits):\n    def model(self): return nn.Linear(64, 10)\n"
    )
    config = tmp_path / "here/config.toml"
    config.write_text(config.read_text().replace('task = "digits"', 'task = "narrow:Narrow"'))
    assert "is a checkpoint of another model" in mistake("simulate", "--resume", "here", "--rounds", 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_keeps_the_completed_rounds_and_resume_goes_on(propolis: Command, tmp_path: Path, workers: int) -> None:
    flags = ["--clients", "4", "--rounds", "400", "--epochs", "1", "--workers", str(workers), "--out", "here"]
    command = [sys.executable, "-u", "-m", "propolis", "simulate", *flags]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        while not process.stdout.readline().lstrip().startswith("3 "):
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)  # the terminal sends it to the workers too
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.count("\n") == 1
    assert "--resume" in errors
    kept = json.loads((tmp_path / "here/result.json").read_text())
    assert kept["status"] == "interrupted"
    done = len(kept["history"])
    assert 3 <= done < 400
    resumed = propolis("simulate", "--resume", "here", "--rounds", done + 1, "--json")
    assert len(json.loads(resumed.stdout)["history"]) == done + 1


def test_a_killed_run_resumes(propolis: Command, tmp_path: Path) -> None:
    flags = ["--clients", "4", "--rounds", "120", "--epochs", "1", "--out", "here"]
    with subprocess.Popen(
        [sys.executable, "-m", "propolis", "simulate", *flags], cwd=tmp_path, stdout=subprocess.DEVNULL
    ) as process:
        while not (tmp_path / "here/checkpoint.safetensors").exists():
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.3)
        process.kill()
    assert not (tmp_path / "here/result.json").exists()
    resumed = json.loads(propolis("simulate", "--resume", "here", "--json", "--rounds", 120).stdout)
    whole = json.loads(propolis("simulate", *flags[:-1], "whole", "--json").stdout)
    assert resumed["status"] == whole["status"] == "completed"
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("here", "whole")]
    assert models[0] == models[1]


def test_a_full_disk_is_one_line_and_the_checkpoint_stays_whole(propolis: Command, tmp_path: Path) -> None:
    assert propolis("simulate", *SMALL, "--out", "here").returncode == 0
    before = (tmp_path / "here/checkpoint.safetensors").read_bytes()
    limited = (
        "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "sys.argv = ['propolis', 'simulate', '--resume', 'here', '--rounds', '5']; "
        "runpy.run_module('propolis', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert "cannot write here/checkpoint.safetensors" in done.stderr
    assert "the previous one is whole" in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "here/checkpoint.safetensors").read_bytes() == before
    assert json.loads(propolis("simulate", "--resume", "here", "--rounds", 3, "--json").stdout)["status"] == "completed"


def test_every_setting_is_a_flag(propolis: Command) -> None:
    text = propolis("simulate", "--help").stdout
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text


def test_no_arguments_show_the_help(propolis: Command) -> None:
    for arguments in ([], ["--help"], ["bench"]):
        done = propolis(*arguments)
        assert "Usage: propolis" in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
