"""Inference beside the link: in clear for this machine, and from elsewhere for the devices of the federation."""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from delivering import Site
from onnx_models import linear
from registries import model_file

from harness import free_port
from propolis.link.certificates import Tls, load_tls
from propolis.link.options import credentials_of
from propolis.protos import inference_pb2 as pb
from propolis.secure.errors import UsageError
from propolis.secure.manifest import Kind
from propolis.server.config import ServerConfig
from propolis.server.inference import inference
from propolis.server.registry import Registry

READY = "/inference.GRPCInferenceService/ModelReady"


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path)
    registry = Registry.make(tmp_path / "registry")
    version = registry.register("digits", model_file(tmp_path))
    registry.attach(version, "model.onnx", Kind.ONNX, linear())
    registry.promote("digits", 1)
    return made


def config(site: Site, **changes: Any) -> ServerConfig:
    told = {"serve": ["digits"], "serve_listen": f"127.0.0.1:{free_port()}", "serve_metrics": "none"}
    told["registry"] = str(site.folder / "registry")
    return ServerConfig(federation=str(site.server_folder), **{**told, **changes})


def ready(port: int, tls: Tls | None = None) -> bool:
    """Ask as a device would; the certificate is for this machine's name."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    address = f"localhost:{port}"
    channel = grpc.insecure_channel(address, options) if tls is None else grpc.secure_channel(
        address, credentials_of(tls), options
    )  # fmt: skip
    with channel:
        call = channel.unary_unary(READY, pb.ModelReadyRequest.SerializeToString, pb.ModelReadyResponse.FromString)
        answer: bool = call(pb.ModelReadyRequest(name="digits"), timeout=10).ready
        return answer


def open_port() -> int:
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))  # noqa: S104
        port: int = probe.getsockname()[1]
        return port


def test_on_loopback_whoever_is_on_this_machine_is_answered(site: Site) -> None:
    with inference(config(site), load_tls(site.server_folder), site.membership) as port:
        assert ready(port)


def test_from_elsewhere_devices_of_the_roster_are_answered_and_nobody_else(site: Site, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    stranger = Site(tmp_path / "other")
    listen = f"0.0.0.0:{open_port()}"
    with inference(config(site, serve_listen=listen), load_tls(site.server_folder), site.membership) as port:
        assert ready(port, site.tls(0))
        for tls in (None, Tls(stranger.tls().private_key, stranger.tls().certificate, site.tls().authority)):
            with pytest.raises(grpc.RpcError) as refused:
                ready(port, tls)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        site.put_roster(site.roster.revoking(0))
        with pytest.raises(grpc.RpcError) as refused:
            ready(port, site.tls(0))
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert "revoked" in str(refused.value.details())
        assert ready(port, site.tls(1))


def test_a_model_that_has_no_champion_yet_is_served_as_soon_as_it_has(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("propolis.server.inference._LOOK_S", 0.2)
    registry = Registry(site.folder / "registry")
    version = registry.register("cnn", model_file(site.folder, seed=2))
    registry.attach(version, "model.onnx", Kind.ONNX, linear())
    asked = pb.ModelReadyRequest(name="cnn")
    with (
        caplog.at_level(logging.WARNING),
        inference(config(site, serve=["cnn"]), load_tls(site.server_folder), site.membership) as port,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        call = channel.unary_unary(READY, pb.ModelReadyRequest.SerializeToString, pb.ModelReadyResponse.FromString)
        with pytest.raises(grpc.RpcError) as unknown:
            call(asked)
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        registry.promote("cnn", 1)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                assert call(asked).ready
                break
            except grpc.RpcError:
                time.sleep(0.1)
        else:
            pytest.fail("it was never served")
    assert "not served yet" in caplog.text


def test_what_cannot_be_is_said_before_anything_listens(site: Site) -> None:
    tls = load_tls(site.server_folder)
    for changes, error in (
        ({"registry": None}, "say in which registry"),
        ({"registry": str(site.folder / "none")}, "there is no registry"),
        ({"serve": ["digits@"]}, "expected NAME"),
        ({"serve_listen": "nowhere"}, "HOST:PORT"),
    ):
        with pytest.raises(UsageError, match=error), inference(config(site, **changes), tls, site.membership):  # type: ignore[arg-type]
            pass
    taken = free_port()
    with inference(config(site, serve_listen=f"127.0.0.1:{taken}"), tls, site.membership):
        again = config(site, serve_listen=f"127.0.0.1:{taken}")
        with pytest.raises(UsageError, match="cannot listen"), inference(again, tls, site.membership):
            pass


def test_without_models_there_is_no_server(site: Site) -> None:
    with inference(config(site, serve=[]), load_tls(site.server_folder), site.membership) as port:
        assert port == 0
