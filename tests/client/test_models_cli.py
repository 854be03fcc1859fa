"""A device's models as its owner meets them: installed, served, used."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from conftest import Command
from inferring import DEADLINE_S, tensor
from releasing import NOW, Publisher, key_for
from runnable import FLOAT, INPUTS, INT8, outputs_of, release, scaled

from harness import free_port
from propolis.client.infer import onnx_probe
from propolis.client.seal import Seal
from propolis.client.state import FileStore
from propolis.link.authority import Authority
from propolis.link.certificates import DeviceName, new_tls_key, signing_request, to_pem
from propolis.link.keys import save_private_key
from propolis.secure.secagg.policy import Policy

Mistake = Callable[..., str]


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    made = Publisher(tmp_path)
    made.on_disk()
    np.save(tmp_path / "in.npy", INPUTS["input"])
    return made


def install(publisher: Publisher, sequence: int, factor: float, **facts: object) -> None:
    package = publisher.seal(sequence, release(factor), **facts)
    publisher.device(probe=onnx_probe).install(package, key_for(package), NOW)


@contextmanager
def serving(folder: Path, *more: object) -> Iterator[tuple[subprocess.Popen[str], str, list[dict[str, object]]]]:
    """`propolis client serve` in a process, ready: its address, and its log as it grows."""
    flags = ["--listen", f"127.0.0.1:{free_port()}", "--metrics", "none", "--log-format", "json", *map(str, more)]
    line = [sys.executable, "-m", "propolis", "client", "serve", *flags]
    logged: list[dict[str, object]] = []
    with subprocess.Popen(line, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        reader = threading.Thread(target=_read_log, args=(process, logged), daemon=True)
        reader.start()
        try:
            eventually(lambda: any(entry["message"] == "serving" for entry in logged), process)
            yield process, flags[1], logged
        finally:
            process.kill()
            reader.join(DEADLINE_S)


def _read_log(process: subprocess.Popen[str], logged: list[dict[str, object]]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        entry = json.loads(line) if line.startswith("{") else {"message": line}
        logged.append(entry)


def eventually(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)


def ask(client: triton.InferenceServerClient, name: str = "digits") -> tuple[str, float]:
    """The version that answers, and the factor of its model."""
    answer = client.infer(name, [tensor("input", "FP32", INPUTS["input"])], client_timeout=DEADLINE_S)
    return answer.get_response().model_version, float(answer.as_numpy("output")[3, 1] / outputs_of(1)[3, 1])


def test_what_is_installed_is_served_and_a_newer_release_without_losing_a_request(publisher: Publisher) -> None:
    install(publisher, 1, 1.0)
    with serving(publisher.folder, "--dir", "device-0", "--refresh", 0.05) as (process, url, _):
        stop, answers, failures = threading.Event(), list[tuple[str, float]](), list[Exception]()

        def keep_asking() -> None:
            with triton.InferenceServerClient(url) as client:
                while not stop.is_set():
                    try:
                        answers.append(ask(client))
                    except Exception as error:
                        failures.append(error)

        callers = [threading.Thread(target=keep_asking) for _ in range(2)]
        for caller in callers:
            caller.start()
        try:
            eventually(lambda: len(answers) > 20, process)
            install(publisher, 2, 2.0, model_version=9)
            eventually(lambda: bool(answers) and answers[-1] == ("9", 2.0), process)
        finally:
            stop.set()
            for caller in callers:
                caller.join(DEADLINE_S)
        assert not failures
        assert set(answers) == {("1", 1.0), ("9", 2.0)}
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    content = b"".join(path.read_bytes() for path in (publisher.folder / "device-0").rglob("*") if path.is_file())
    assert scaled(2.0)[:40] not in content


def test_a_newer_release_that_does_not_run_here_leaves_the_one_that_is_served(publisher: Publisher) -> None:
    install(publisher, 1, 1.0)
    package = publisher.seal(2, release(2.0, int8=9.0, runs_as=9.0))
    with serving(publisher.folder, "--dir", "device-0", "--refresh", 0.05) as (process, url, logged):
        publisher.device().install(package, key_for(package), NOW)  # where nothing could try it
        eventually(lambda: any("slot b of digits" in str(entry["message"]) for entry in logged), process)
        with triton.InferenceServerClient(url) as client:
            assert ask(client) == ("1", 1.0)
        install(publisher, 3, 3.0)
        with triton.InferenceServerClient(url) as client:
            eventually(lambda: ask(client) == ("3", 3.0), process)


def test_all_models_are_served_or_those_that_are_named_and_files_beside_them(publisher: Publisher) -> None:
    install(publisher, 1, 1.0)
    install(publisher, 5, 2.0, name="faces")
    (publisher.folder / "own.onnx").write_bytes(scaled(4.0))
    with (
        serving(publisher.folder, "--dir", "device-0") as (_, url, _),
        triton.InferenceServerClient(url) as client,
    ):
        assert (ask(client), ask(client, "faces")) == (("1", 1.0), ("5", 2.0))
    flags = ("--dir", "device-0", "--model", "faces", "--model", "own=own.onnx", "--refresh", 0)
    with serving(publisher.folder, *flags) as (_, url, _), triton.InferenceServerClient(url) as client:
        assert (ask(client, "faces"), ask(client, "own")) == (("5", 2.0), ("3", 4.0))
        with pytest.raises(triton.InferenceServerException, match="there is no model 'digits'"):
            ask(client)


def test_one_model_that_cannot_be_opened_does_not_keep_the_others_from_being_served(publisher: Publisher) -> None:
    install(publisher, 1, 1.0)
    install(publisher, 5, 2.0, name="faces")
    (publisher.folder / "device-0/models/digits/slots/a/package").write_bytes(b"damaged")
    with (
        serving(publisher.folder, "--dir", "device-0") as (_, url, logged),
        triton.InferenceServerClient(url) as client,
    ):
        assert ask(client, "faces") == ("5", 2.0)
        assert any("digits is not served: no slot" in str(entry["message"]) for entry in logged)


def write_device_tls(folder: Path) -> None:
    """What a device's enrolment leaves for the link."""
    authority, key = Authority.create(bytes(32), NOW), new_tls_key()
    save_private_key(folder / "tls.key", key)
    certificate = authority.issue_for_device(signing_request(key), DeviceName(bytes(32), 0, bytes(32)), NOW)
    (folder / "tls.pem").write_bytes(to_pem(certificate))
    (folder / "ca.pem").write_bytes(authority.pem)


def test_mistakes_of_serve_are_one_line(publisher: Publisher, mistake: Mistake) -> None:
    def serve(*arguments: object) -> str:
        return mistake("client", "serve", *arguments)

    assert "nothing to serve: give --dir" in serve()
    assert "--model 'm': expected NAME=FILE.onnx, or --dir" in serve("--model", "m")
    assert "--refresh is for installed models" in serve("--model", "m=m.onnx", "--refresh", 1)
    assert "--refresh nan: expected a number" in serve("--dir", "device-0", "--refresh", "nan")
    assert "--passphrase-file is for the key in --tls" in serve("--model", "m=m.onnx", "--passphrase-file", "x")
    assert "no model is installed in device-0" in serve("--dir", "device-0")
    install(publisher, 1, 1.0)
    write_device_tls(publisher.folder / "device-0")
    own_tls = mistake_with_log(publisher.folder, "--dir", "device-0", "--tls", "device-0")
    assert "the certificate in tls.pem is a client's, such as a device's, which no caller accepts" in own_tls
    last = mistake_with_log(publisher.folder, "--dir", "device-0", "--model", "voices")
    assert last == "propolis: voices is not installed in device-0"
    (publisher.folder / "m.onnx").write_bytes(scaled(1.0))
    assert "two models have one name" in mistake_with_log(
        publisher.folder, "--dir", "device-0", "--model", "digits=m.onnx"
    )


def mistake_with_log(folder: Path, *arguments: str) -> str:
    """The last line of what is written to standard error."""
    line = [sys.executable, "-m", "propolis", "client", "serve", *arguments]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    return done.stderr.splitlines()[-1]


def test_predict_computes_with_what_is_installed_and_says_what_that_is(publisher: Publisher, propolis: Command) -> None:
    install(publisher, 1, 1.0)
    package = publisher.seal(2, release(2.0, int8=9.0))
    publisher.device(probe=onnx_probe).install(package, key_for(package), NOW)
    done = propolis("predict", "--dir", "device-0", "--input", "in.npy", "--output", "out.npy")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"release 2 of digits, {FLOAT}\noutput: float32 [4, 2]\n")
    assert np.array_equal(np.load(publisher.folder / "out.npy"), outputs_of(2.0))
    told = json.loads(
        propolis("predict", "--dir", "device-0", "--model", "digits", "--input", "in.npy", "--json").stdout
    )
    assert np.array_equal(told.pop("outputs")["output"], outputs_of(2.0))
    assert told == {"name": "digits", "sequence": 2, "file": FLOAT, "fell_back": False}


def test_predict_opens_keys_under_a_passphrase(publisher: Publisher, propolis: Command, mistake: Mistake) -> None:
    install(publisher, 1, 1.0)
    folder, secret = publisher.folder / "device-0", publisher.folder / "passphrase"
    state = FileStore(folder, Policy()).change(lambda device: device.state)
    (folder / "device.state").unlink()
    FileStore.create(folder, state, Seal(b"open sesame"))
    secret.write_text("open sesame\n")
    secret.chmod(0o600)
    asked = ("predict", "--dir", "device-0", "--input", "in.npy")
    assert "is encrypted: give its passphrase" in propolis(*asked).stderr
    assert propolis(*asked, "--passphrase-file", "passphrase").stdout.startswith(f"release 1 of digits, {INT8}\n")
    with serving(publisher.folder, "--dir", "device-0", "--passphrase-file", "passphrase") as (_, url, _):
        assert ask(triton.InferenceServerClient(url)) == ("1", 1.0)


def test_mistakes_of_predict_are_one_line(publisher: Publisher, mistake: Mistake) -> None:
    install(publisher, 1, 1.0)
    (publisher.folder / "m.onnx").write_bytes(scaled(1.0))
    asked = ("predict", "--input", "in.npy")
    assert "which model? give --model FILE.onnx, or --dir" in mistake(*asked)
    assert "leave one of them out" in mistake(*asked, "--dir", "device-0", "--model", "m.onnx")
    assert "voices is not installed in device-0" in mistake(*asked, "--dir", "device-0", "--model", "voices")
    assert "--passphrase-file is for a device's keys" in mistake(*asked, "--model", "m.onnx", "--passphrase-file", "x")


def test_install_says_what_was_tried(publisher: Publisher, propolis: Command) -> None:
    def said(sequence: int, files: dict) -> str:  # type: ignore[type-arg]
        package = publisher.seal(sequence, files)
        done = propolis("client", "install", package, f"{package}.keys", "--dir", "device-0")
        return done.stdout if done.returncode == 0 else done.stderr

    assert said(1, release(1.0)) == "installed: release 1 of digits; tried: int8, differs by 0\n"
    assert said(2, release(2.0, int8=9.0)) == "installed: release 2 of digits; tried: onnx, differs by 0\n"
    package = publisher.seal(3, release(3.0))
    done = propolis("client", "install", package, f"{package}.keys", "--dir", "device-0", "--json")
    assert json.loads(done.stdout) == {"name": "digits", "sequence": 3, "tried": INT8, "difference": 0.0}
    refused = said(4, release(3.0, int8=9.0, runs_as=4.0))
    assert refused == "propolis: outputs on the golden batch differ by 0.875, 0.001 at most\n"
