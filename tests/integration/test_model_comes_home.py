"""A model from training to an answer on a device, by the commands that users give, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from conftest import Command
from sklearn.datasets import load_digits

from harness import free_port, wait_until

WAIT_S = 60.0


class Server:
    """``propolis server --idle`` with the registry of the run, in a process."""

    def __init__(self, folder: Path) -> None:
        self.port, self.enroll, self.inference = free_port(), free_port(), free_port()
        arguments = ["--federation", "fed/server", "--listen", f"127.0.0.1:{self.port}", "--out", "srv"]
        arguments += ["--enroll", f"127.0.0.1:{self.enroll}", "--registry", "registry", "--serve", "digits"]
        arguments += ["--serve-listen", f"127.0.0.1:{self.inference}", "--serve-metrics", "none"]
        self.log = folder / "server.log"
        with self.log.open("w") as errors:
            command = [sys.executable, "-m", "propolis", "server", "--idle", *arguments]
            self.process = subprocess.Popen(command, cwd=folder, stderr=errors)

    def wait_for(self, said: str) -> None:
        wait_until(lambda: said in self.log.read_text(), WAIT_S)


@pytest.fixture
def done(propolis: Command) -> Callable[..., str]:
    """What a command printed that went well."""

    def run(*arguments: object) -> str:
        finished = propolis(*arguments)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    return run


@pytest.fixture
def server(done: Callable[..., str], tmp_path: Path) -> Iterator[Server]:
    """A federation with a trained model in the registry, and its server."""
    done("simulate", "--task", "digits", "--clients", 4, "--rounds", 2, "--out", "run", "--registry", "registry")
    done("federation", "init", "fed")
    started = Server(tmp_path)
    try:
        started.wait_for("listening")
        yield started
    finally:
        started.process.kill()
        started.process.wait()


def test_a_model_goes_from_the_registry_to_a_device_and_answers_there(
    server: Server, propolis: Command, done: Callable[..., str], mistake: Callable[..., str], tmp_path: Path
) -> None:
    to_server = ("--federation", "fed/server")
    done("federation", "release-key", "fed", "--out", "release.key")
    (tmp_path / "token").write_text(done("federation", "invite", "fed", "clinic"))
    enrolling = ("--server", f"localhost:{server.enroll}", "--token", "@token", "--dir", "clinic")
    done("client", "enroll", *enrolling)
    assert "nothing new" in done("client", "fetch", "--dir", "clinic")

    publishing = (*to_server, "--release-key", "release.key", "--registry", "registry")
    said = done("models", "publish", "digits", 1, *publishing, "--post-quantum", "--json")
    assert json.loads(said)["kem"] == "mlkem768_x25519"
    assert "release 1 of digits" in done("client", "fetch", "--dir", "clinic")
    images = load_digits().images.reshape(-1, 64)[:50] / 16
    np.save(tmp_path / "images.npy", images.astype(np.float32))
    answer = json.loads(done("predict", "--dir", "clinic", "--input", "images.npy", "--json"))
    guesses = np.argmax(np.array(answer["outputs"]["output"]), axis=1)
    assert np.mean(guesses == load_digits().target[:50]) > 0.7  # after two rounds

    (shown,) = json.loads(done("rollout", "show", "digits", *to_server, "--json"))
    assert [each["outcome"] for each in shown["devices"]] == ["installed"]

    done("models", "promote", "digits", 1, "--registry", "registry")
    server.wait_for("model ready")
    with triton.InferenceServerClient(f"127.0.0.1:{server.inference}") as client:
        assert client.is_model_ready("digits", "1")

    second = json.loads(done("models", "publish", "digits", "champion", *publishing, "--json"))
    assert second["sequence"] == 2
    done("rollout", "stop", "digits", *to_server)
    assert "nothing new" in done("client", "fetch", "--dir", "clinic")
    assert "was stopped, for good" in mistake("rollout", "resume", "digits", "--sequence", 2, *to_server)
    assert "no release of cnn" in mistake("rollout", "set", "cnn", "--percent", 5, *to_server)

    done("federation", "revoke", "fed", "clinic")
    refused = propolis("client", "fetch", "--dir", "clinic")
    assert (refused.returncode, "is revoked" in refused.stderr) == (1, True)
    server.process.terminate()
    assert server.process.wait(WAIT_S) == 0
