"""The server process as its owner and its callers meet it: commands, TLS, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from conftest import Command
from inferring import DEADLINE_S, rows, running, tensor
from onnx import TensorProto
from onnx_models import WEIGHTS, copying, endless, external, linear, mixed
from serving_processes import serving

from harness import free_port, wait_until
from propolis.link.authority import Authority
from propolis.link.certificates import DeviceName, new_tls_key, signing_request, to_pem
from propolis.link.keys import save_private_key
from propolis.serving.model import load_model
from propolis.serving.server import load_server_tls

Mistake = Callable[..., str]
NOW = time.time()
AUTHORITY, STRANGER = (Authority.create(bytes([n]) * 32, NOW) for n in (1, 2))


def write_server(folder: Path, authority: Authority = AUTHORITY, now: float = NOW) -> Path:
    folder.mkdir()
    key = new_tls_key()
    save_private_key(folder / "tls.key", key)
    certificate = authority.issue_for_server(key.public_key(), ["localhost", "127.0.0.1"], 30, now)
    (folder / "tls.pem").write_bytes(to_pem(certificate))
    (folder / "ca.pem").write_bytes(authority.pem)
    return folder


def write_caller(folder: Path, authority: Authority) -> Path:
    folder.mkdir()
    key = new_tls_key()
    save_private_key(folder / "tls.key", key)
    certificate = authority.issue_for_device(signing_request(key), DeviceName(bytes(32), 1, bytes(32)), NOW)
    (folder / "tls.pem").write_bytes(to_pem(certificate))
    return folder


def secure_client(
    url: str, trusted: Authority, folder: Path, caller: Path | None = None
) -> triton.InferenceServerClient:
    (folder / "trusted.pem").write_bytes(trusted.pem)
    own = {"private_key": str(caller / "tls.key"), "certificate_chain": str(caller / "tls.pem")} if caller else {}
    return triton.InferenceServerClient(url, ssl=True, root_certificates=str(folder / "trusted.pem"), **own)


def answers(client: triton.InferenceServerClient) -> bool:
    try:
        with client:
            return bool(client.is_server_live(client_timeout=3))
    except triton.InferenceServerException:
        return False


def test_with_tls_only_who_trusts_the_authority_talks_to_it(tmp_path: Path) -> None:
    tls = load_server_tls(write_server(tmp_path / "server"))
    with running(load_model(linear()), tls=tls) as server:
        assert answers(secure_client(server.url, AUTHORITY, tmp_path))
        assert not answers(secure_client(server.url, STRANGER, tmp_path))
        assert not answers(triton.InferenceServerClient(server.url))


def test_with_mutual_tls_only_who_has_a_certificate_of_the_authority_is_answered(tmp_path: Path) -> None:
    tls = load_server_tls(write_server(tmp_path / "server"))
    own, strangers = write_caller(tmp_path / "own", AUTHORITY), write_caller(tmp_path / "stranger", STRANGER)
    with running(load_model(linear()), tls=tls, require_certificate=True) as server:
        assert answers(secure_client(server.url, AUTHORITY, tmp_path, own))
        assert not answers(secure_client(server.url, AUTHORITY, tmp_path, strangers))
        assert not answers(secure_client(server.url, AUTHORITY, tmp_path))


@pytest.mark.parametrize("command", [["serve"], ["client", "serve"]])
def test_a_file_is_served_until_sigterm(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "linear.onnx").write_bytes(linear())
    with serving(tmp_path, command, "--model", "mine=linear.onnx") as (process, url):
        with triton.InferenceServerClient(url) as client:
            answer = client.infer("mine", [tensor("input", "FP32", rows(2))]).as_numpy("output")
            assert np.allclose(answer, rows(2) @ WEIGHTS, atol=1e-6)
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0


def test_sigterm_finishes_what_waits_and_refuses_new_requests(tmp_path: Path) -> None:
    (tmp_path / "linear.onnx").write_bytes(linear())
    waiting = ("--max-delay-ms", 60_000, "--max-batch", 64)  # nothing is computed before the end
    with serving(tmp_path, ["serve"], "--model", "m=linear.onnx", *waiting) as (process, url):
        with triton.InferenceServerClient(url) as client, ThreadPoolExecutor(4) as callers:
            given = [tensor("input", "FP32", rows(1))]
            asked = [callers.submit(client.infer, "m", given, client_timeout=DEADLINE_S) for _ in range(4)]
            wait_for_pending(process, 4)
            process.send_signal(signal.SIGTERM)
            assert [call.result(DEADLINE_S).as_numpy("output").shape for call in asked] == [(1, 2)] * 4
            with pytest.raises(triton.InferenceServerException, match=r"UNAVAILABLE|unavailable|refused|closed"):
                client.infer("m", given, client_timeout=3)
        assert process.wait(DEADLINE_S) == 0


_SERVES = """
import asyncio, sys
from pathlib import Path
from propolis.link.address import Address
from propolis.serving.model import load_model_file
from propolis.serving.server import ServingOptions, serve

options = ServingOptions(Address.parse(sys.argv[1]), drain_s=0.5)
asyncio.run(serve([load_model_file(Path("endless.onnx"), "m")], options))
"""


def test_a_model_that_never_ends_does_not_keep_the_process(tmp_path: Path) -> None:
    (tmp_path / "endless.onnx").write_bytes(endless())
    url = f"127.0.0.1:{free_port()}"
    with subprocess.Popen([sys.executable, "-c", _SERVES, url], cwd=tmp_path) as process:
        try:
            with triton.InferenceServerClient(url) as client:
                wait_until(lambda: is_ready(client), DEADLINE_S)
                with ThreadPoolExecutor(1) as caller:
                    asked = caller.submit(client.infer, "m", [tensor("input", "FP32", rows(1))], client_timeout=60)
                    threading.Event().wait(0.5)
                    process.send_signal(signal.SIGTERM)
                    assert process.wait(DEADLINE_S) == 0
                    assert isinstance(asked.exception(DEADLINE_S), triton.InferenceServerException)
        finally:
            process.kill()


def is_ready(client: triton.InferenceServerClient) -> bool:
    try:
        return bool(client.is_server_ready(client_timeout=1))
    except triton.InferenceServerException:
        return False


def wait_for_pending(process: subprocess.Popen[str], count: int) -> None:
    import urllib.request

    arguments = list(process.args)  # type: ignore[arg-type]
    url = f"http://{arguments[arguments.index('--metrics') + 1]}/metrics"
    until = time.monotonic() + DEADLINE_S
    while time.monotonic() < until:
        with urllib.request.urlopen(url, timeout=DEADLINE_S) as reply:
            if f'nv_inference_pending_request_count{{model="m",version="3"}} {count}.0' in reply.read().decode():
                return
        threading.Event().wait(0.02)
    raise AssertionError(f"{count} requests never waited")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m"], "--model 'm': expected NAME=FILE.onnx"),
        (["--model", "=a.onnx"], "expected NAME=FILE.onnx"),
        (["--model", "m=absent.onnx"], "cannot read absent.onnx"),
        (["--model", "m=text.onnx"], "text.onnx: this is no ONNX model"),
        (["--model", "m=external.onnx"], "external.onnx: the model has external data"),
        (["--model", "m=a.onnx", "--model", "m=a.onnx"], "two models have one name"),
        (["--model", "m=a.onnx", "--listen", "nowhere"], "'nowhere' is no address"),
        (["--model", "m=a.onnx", "--listen", "127.0.0.1:1x"], "is no address"),
        (["--model", "m=a.onnx", "--max-batch", "0"], "0 is not in the range"),
        (["--model", "m=a.onnx", "--require-certificate"], "give --tls too"),
        (
            ["--model", "m=a.onnx", "--passphrase-file", "x"],
            "--passphrase-file is for the key in --tls: give --tls too",
        ),
        (["--model", "m=a.onnx", "--max-delay-ms", "nan"], "--max-delay-ms nan: expected a number"),
        (["--model", "m", "--registry", "r", "--refresh", "nan"], "--refresh nan: expected a number"),
        (["--model", "m=a.onnx", "--refresh", "5"], "--refresh is for models of --registry: give --model NAME too"),
        (["--model", "m=a.onnx", "--prefer-int8"], "--prefer-int8 is for models of --registry: give --model NAME too"),
        (["--model", "m=a.onnx", "--tls", "absent"], "absent/tls.key"),
        (["--model", "m=a.onnx", "--tls", "old"], "expired on"),
        (["--model", "m=a.onnx", "--log-format", "xml"], "log format: expected text or json"),
        ([], "Missing option '--model'"),
    ],
)
def test_mistakes_are_one_line(mistake: Mistake, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "a.onnx").write_bytes(linear())
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "external.onnx").write_bytes(external("initializer").SerializeToString())
    if "old" in arguments:
        write_server(tmp_path / "old", now=NOW - 90 * 24 * 3600)
    assert message in mistake("serve", *arguments)


def test_a_port_in_use_ends_the_log_with_one_line(propolis: Command, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(linear())
    with running(load_model(linear())) as server:
        done = propolis("serve", "--model", "m=a.onnx", "--listen", server.url, "--metrics", "none")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"propolis: cannot listen on {server.url}")
    assert "Traceback" not in done.stderr


def test_predict_reads_and_writes_both_forms(propolis: Command, tmp_path: Path) -> None:
    (tmp_path / "linear.onnx").write_bytes(linear())
    np.save(tmp_path / "in.npy", rows(3))
    (tmp_path / "in.json").write_text(json.dumps({"input": rows(3).tolist()}))
    (tmp_path / "list.json").write_text(json.dumps(rows(3).tolist()))
    for name in ("in.npy", "in.json", "list.json"):
        done = propolis("predict", "--model", "linear.onnx", "--input", name, "--output", "out.npy", "--json")
        assert done.returncode == 0, done.stderr
        expected = rows(3) @ WEIGHTS
        assert np.allclose(json.loads(done.stdout)["output"], expected, atol=1e-6)
        assert np.allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)
    shown = propolis("predict", "--model", "linear.onnx", "--input", "in.npy", "--output", "out.json").stdout
    assert shown.startswith("output: float32 [3, 2]\n")
    assert json.loads((tmp_path / "out.json").read_text()).keys() == {"output"}


@pytest.mark.parametrize(
    ("model", "content", "arguments", "message"),
    [
        ("linear", "[[1, 2, 3]]", [], "in.json: input 'input': expected shape [-1, 4], got [1, 3]"),
        ("linear", "[[1, 2], [3]]", [], "nested lists of equal lengths, of FP32"),
        ("linear", '{"other": [[1, 2, 3, 4]]}', [], "input 'input' is missing"),
        ("linear", "{", [], "in.json is no .json file"),
        ("linear", "[[1, 2, 3, 4]]", ["--output", "x.txt"], "expected a name that ends with .npy or .json"),
        ("mixed", "[1]", [], "the model has the inputs index, mask, default"),
        ("mixed", '{"index": [1], "mask": [true], "default": [0]}', ["--output", "x.npy"], "write .json"),
        ("mixed", '{"index": [9], "mask": [true], "default": [0]}', [], "the model fails on these inputs"),
        ("bytes", "[[300]]", [], "of UINT8"),
        ("bytes", "[[1.7]]", [], "must be nested lists of UINT8, there is a number with a fraction in it"),
        ("bytes", "[[1, true]]", [], "there is true or false in it"),
        ("linear", "[[1, 2, 3, null]]", [], "there is null in it"),
        ("linear", '[[1, 2, 3, "4"]]', [], "there is a text in it"),
        ("linear", "[[1, 2, 3, true]]", [], "there is true or false in it"),
        ("mixed", '{"index": [1], "mask": [1], "default": [0]}', [], "lists of BOOL, there is a number in it"),
    ],
)
def test_mistakes_of_predict_are_one_line(
    mistake: Mistake, tmp_path: Path, model: str, content: str, arguments: list[str], message: str
) -> None:
    files = {"linear": linear(), "mixed": mixed(), "bytes": copying(TensorProto.UINT8)}
    (tmp_path / "m.onnx").write_bytes(files[model])
    (tmp_path / "in.json").write_text(content)
    assert message in mistake("predict", "--model", "m.onnx", "--input", "in.json", *arguments)


def npy(header: str) -> bytes:
    """A file of numpy's first version with this header and no data."""
    line = f"{header}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line


HUGE = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 4)}")
ZIP = b"PK\x03\x04 and nothing more"


@pytest.mark.parametrize(
    "content", [ZIP, HUGE, npy("{'descr': '<f4', 'shape': (1, 2, }("), npy("(\x00"), b"", HUGE[:9]]
)
def test_an_npy_file_that_is_none_is_one_line(mistake: Mistake, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(linear())
    (tmp_path / "in.npy").write_bytes(content)
    assert "in.npy is no .npy file: " in mistake("predict", "--model", "m.onnx", "--input", "in.npy")


def test_an_npy_file_with_code_in_it_is_refused(mistake: Mistake, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(linear())
    np.save(tmp_path / "in.npy", np.array([os.getpid, print], dtype=object), allow_pickle=True)
    assert "in.npy is no .npy file" in mistake("predict", "--model", "m.onnx", "--input", "in.npy")
