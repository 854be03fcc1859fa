"""The service as a client of somebody else's sees it: Triton's own."""

from __future__ import annotations

import asyncio
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from inferring import ANYWHERE, DEADLINE_S, Running, rows, running, tensor
from onnx import TensorProto
from onnx_models import WEIGHTS, copying, linear, mixed
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from propolis.link.address import Address
from propolis.secure.errors import UsageError
from propolis.serving.batching import Batcher, Batching
from propolis.serving.model import load_model
from propolis.serving.server import InferenceServer, ServingOptions
from propolis.serving.service import InferenceService


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(load_model(linear()), load_model(mixed(), "mixed"), batching=Batching(largest=16)) as server:
        yield server


@pytest.fixture
def client(served: Running) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(served.url) as client:
        yield client


def test_tritons_client_finds_the_server_and_its_models(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("linear")
    assert client.is_model_ready("linear", "3")
    assert client.get_server_metadata().name == "propolis"
    metadata = client.get_model_metadata("mixed", as_json=True)
    assert metadata["versions"] == ["1"]
    assert metadata["inputs"][0] == {"name": "index", "datatype": "INT64", "shape": ["-1"]}
    assert [output["datatype"] for output in metadata["outputs"]] == ["FP32", "BOOL"]


def test_tritons_client_infers_several_types(client: triton.InferenceServerClient) -> None:
    inputs = [
        tensor("index", "INT64", np.array([2, 0, 1])),
        tensor("mask", "BOOL", np.array([True, True, False])),
        tensor("default", "FP32", np.full(3, -1, np.float32)),
    ]
    result = client.infer("mixed", inputs, request_id="seven")
    assert result.get_response().id == "seven"
    assert result.as_numpy("output").tolist() == [30, 10, -1]
    assert result.as_numpy("left_out").tolist() == [False, False, True]
    some = client.infer("mixed", inputs, outputs=[triton.InferRequestedOutput("left_out")])
    assert some.as_numpy("output") is None
    assert some.as_numpy("left_out").tolist() == [False, False, True]


TYPES = ("BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP16", "FP32", "FP64")
ONNX_TYPES = {name: {"FP16": "FLOAT16", "FP32": "FLOAT", "FP64": "DOUBLE"}.get(name, name) for name in TYPES}


def test_every_datatype_of_triton_goes_through_a_model() -> None:
    models = [load_model(copying(getattr(TensorProto, kind)), name) for name, kind in ONNX_TYPES.items()]
    with running(*models) as server, triton.InferenceServerClient(server.url) as client:
        for name in TYPES:
            array = np.array([[0, 1, 1], [1, 0, 0]]).astype(triton_to_np_dtype(name))
            answer = client.infer(name, [tensor("input", name, array)]).as_numpy("output")
            assert answer.dtype == array.dtype
            assert np.array_equal(answer, array)


def typed_request(**changes: Any) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name="linear", **changes)
    given = request.inputs.add(name="input", datatype="FP32", shape=[2, 4])
    given.contents.fp32_contents.extend(range(8))
    return request


def stub(server: Running) -> Any:
    from tritonclient.grpc import service_pb2_grpc

    return service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(server.url))


def test_typed_contents_are_answered_in_their_own_form(served: Running) -> None:
    response = stub(served).ModelInfer(typed_request(), timeout=DEADLINE_S)
    assert not response.raw_output_contents
    expected = np.arange(8, dtype=np.float32).reshape(2, 4) @ WEIGHTS
    assert list(response.outputs[0].contents.fp32_contents) == expected.ravel().tolist()
    assert (response.model_name, response.model_version) == ("linear", "3")


def status_of(client: triton.InferenceServerClient, model: str, *inputs: triton.InferInput, **more: Any) -> str:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(model, list(inputs), **more)
    return f"{caught.value.status()} {caught.value.message()}"


@pytest.mark.parametrize(
    ("model", "array", "datatype", "more", "expected"),
    [
        ("absent", rows(1), "FP32", {}, "NOT_FOUND there is no model 'absent'"),
        ("linear", rows(1), "FP32", {"model_version": "4"}, "NOT_FOUND model 'linear' has no version '4' here, but 3"),
        ("linear", rows(1)[:, :3], "FP32", {}, "INVALID_ARGUMENT input 'input': expected shape [-1, 4], got [1, 3]"),
        ("linear", rows(1).astype(np.float64), "FP64", {}, "INVALID_ARGUMENT input 'input': expected FP32, got FP64"),
        ("linear", rows(17), "FP32", {}, "INVALID_ARGUMENT 17 examples: expected at most 16"),
        ("mixed", rows(1), "FP32", {}, "INVALID_ARGUMENT input 'default' is missing"),
        (
            *("linear", rows(1), "FP32", {"outputs": [triton.InferRequestedOutput("nothing")]}),
            "INVALID_ARGUMENT output 'nothing' is unknown: model 'linear' has output",
        ),
        (
            *("linear", rows(1), "FP32", {"outputs": [triton.InferRequestedOutput("output", class_count=2)]}),
            "INVALID_ARGUMENT output 'output': classification is not available",
        ),
    ],
)
def test_errors_are_statuses(
    client: triton.InferenceServerClient, model: str, array: np.ndarray, datatype: str, more: Any, expected: str
) -> None:
    assert status_of(client, model, tensor("input", datatype, array), **more).startswith(f"StatusCode.{expected}")


def refusal(server: Running, request: service_pb2.ModelInferRequest) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        stub(server).ModelInfer(request, timeout=DEADLINE_S)
    return f"{caught.value.code()} {caught.value.details()}"


def test_what_does_not_fit_the_model_is_refused_before_it_is_decoded(served: Running) -> None:
    many = typed_request()
    many.outputs.extend([service_pb2.ModelInferRequest.InferRequestedOutputTensor()] * 800_000)
    assert refusal(served, many) == "StatusCode.INVALID_ARGUMENT 800000 outputs: model 'linear' has 1"
    many = typed_request()
    many.inputs.extend([service_pb2.ModelInferRequest.InferInputTensor()] * 800_000)
    assert refusal(served, many) == "StatusCode.INVALID_ARGUMENT 800001 inputs: model 'linear' has 1"
    wrong = typed_request()
    wrong.inputs[0].shape[:] = [1] * 400_000
    assert "expected shape [-1, 4], got [1, 1, 1" in (said := refusal(served, wrong))
    assert len(said) < 300
    wrong = typed_request()
    wrong.inputs[0].datatype = "INT64"  # which its content is not either
    assert refusal(served, wrong) == "StatusCode.INVALID_ARGUMENT input 'input': expected FP32, got INT64"


def test_what_is_no_message_is_refused(served: Running) -> None:
    call = grpc.insecure_channel(served.url).unary_unary("/inference.GRPCInferenceService/ModelInfer")
    with pytest.raises(grpc.RpcError, match="this is no ModelInferRequest"):
        call(b"\xff", timeout=DEADLINE_S)


def test_a_request_that_waits_takes_its_message_and_its_arrays_and_no_more() -> None:
    """Each is 2 MB on the wire and 16 MB as an array; what protobuf decodes it to takes as much once more."""
    count, size = 6, 2_000_000
    request = service_pb2.ModelInferRequest(model_name="wide")
    request.inputs.add(name="input", datatype="INT64", shape=[1, size]).contents.int64_contents.extend([1] * size)
    data = request.SerializeToString()
    del request

    async def ask() -> float:
        service, release = InferenceService(), threading.Event()
        service.is_ready = True
        model = load_model(copying(TensorProto.INT64), "wide")
        batcher = Batcher(model, Batching(largest=1, delay_s=0, queue_bytes=10**10))
        service.put(batcher)
        batcher._thread._calls.put(lambda: release.wait(DEADLINE_S) and None)
        handler = service.handlers().service(SimpleNamespace(method="/inference.GRPCInferenceService/ModelInfer"))
        assert handler.request_deserializer is None, "gRPC would hold what it decodes"
        before = memory()
        context = SimpleNamespace(time_remaining=lambda: None)
        asked = [asyncio.create_task(handler.unary_unary(bytes(bytearray(data)), context)) for _ in range(count)]
        while len(batcher._waiting) < count - 1:
            await asyncio.sleep(0.01)
        held = memory() - before
        release.set()
        await asyncio.gather(*asked)
        await batcher.close(DEADLINE_S)
        return held / count

    assert asyncio.run(ask()) < 35e6


def memory() -> float:
    """Bytes of this process."""
    return float(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_model_that_fails_is_internal(client: triton.InferenceServerClient) -> None:
    inputs = (
        tensor("index", "INT64", np.array([7])),
        tensor("mask", "BOOL", np.array([True])),
        tensor("default", "FP32", np.zeros(1, np.float32)),
    )
    assert "StatusCode.INTERNAL the model fails on these inputs" in status_of(client, "mixed", *inputs)


def test_a_message_over_the_limit_is_refused() -> None:
    one = load_model(linear())
    with running(one, largest_message=1024) as server, triton.InferenceServerClient(server.url) as client:
        assert client.infer("linear", [tensor("input", "FP32", rows(8))]).as_numpy("output").shape == (8, 2)
        assert "RESOURCE_EXHAUSTED" in status_of(client, "linear", tensor("input", "FP32", rows(100)))


def test_a_compressed_message_is_refused_before_it_is_inflated(client: triton.InferenceServerClient) -> None:
    given = tensor("input", "FP32", np.zeros((16, 4), np.float32))
    assert "UNIMPLEMENTED" in status_of(client, "linear", given, compression_algorithm="gzip")


def test_concurrent_callers_are_batched_and_counted() -> None:
    with running(load_model(linear()), batching=Batching(largest=16, delay_s=0.05)) as server:
        with triton.InferenceServerClient(server.url) as client, ThreadPoolExecutor(12) as callers:

            def call(seed: int) -> bool:
                result = client.infer("linear", [tensor("input", "FP32", rows(2, seed))], client_timeout=DEADLINE_S)
                return np.allclose(result.as_numpy("output"), rows(2, seed) @ WEIGHTS, atol=1e-6)

            assert all(callers.map(call, range(24)))
            status_of(client, "linear", tensor("input", "FP32", rows(17)))
        found = server.metrics()
    labels = '{model="linear",version="3"}'
    assert found[f"nv_inference_request_success{labels}"] == 24
    assert found[f"nv_inference_count{labels}"] == 48
    assert found[f"nv_inference_exec_count{labels}"] < 24
    assert found['nv_inference_request_failure{model="linear",reason="OTHER",version="3"}'] == 1
    assert found[f"nv_inference_pending_request_count{labels}"] == 0
    for name in ("request", "queue", "compute_input", "compute_infer", "compute_output"):
        assert found[f"nv_inference_{name}_duration_us{labels}"] > 0


def test_a_newer_version_takes_the_place_of_the_one_that_is_served() -> None:
    with running(load_model(linear())) as server, triton.InferenceServerClient(server.url) as client:
        server.do(server.server.install(load_model(linear(), version="4")))
        assert {label for label in ("3", "4") if f'version="{label}"' in str(server.metrics())} == {"4"}
        answer = client.infer("linear", [tensor("input", "FP32", rows(1))])
        assert answer.get_response().model_version == "4"
        assert "NOT_FOUND" in status_of(client, "linear", tensor("input", "FP32", rows(1)), model_version="3")


def test_grpcs_own_health_checks_are_answered(served: Running) -> None:
    health = health_pb2_grpc.HealthStub(grpc.insecure_channel(served.url))
    for name in ("", "inference.GRPCInferenceService"):
        reply = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=DEADLINE_S)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_health_is_not_watched(served: Running) -> None:
    with pytest.raises(grpc.RpcError, match="use Check"):
        next(health_pb2_grpc.HealthStub(grpc.insecure_channel(served.url)).Watch(health_pb2.HealthCheckRequest()))


def test_one_connection_does_not_take_all_calls() -> None:
    async def ask(url: str) -> int:
        own = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(url, own) as greedy, grpc.aio.insecure_channel(url, own) as other:
            begin = greedy.stream_unary("/inference.GRPCInferenceService/ModelInfer")
            calls = [begin() for _ in range(200)]  # whose message never comes
            await asyncio.sleep(1)
            with pytest.raises(grpc.RpcError, match="DEADLINE_EXCEEDED"):
                await greedy.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=1)
            answer = other.unary_unary(
                "/inference.GRPCInferenceService/ModelInfer",
                service_pb2.ModelInferRequest.SerializeToString,
                service_pb2.ModelInferResponse.FromString,
            )
            response = await answer(typed_request(), timeout=DEADLINE_S)
            assert not any(call.done() for call in calls)
            return len(response.outputs)

    with running(load_model(linear()), batching=Batching(largest=4, queue=4)) as server:
        assert asyncio.run(ask(server.url)) == 1


def test_our_messages_and_tritons_are_the_same_on_the_wire() -> None:
    from propolis.protos import inference_pb2 as ours

    for name, message in ours.DESCRIPTOR.message_types_by_name.items():
        theirs = service_pb2.DESCRIPTOR.message_types_by_name[name]
        require_same_fields(message, theirs)


def require_same_fields(ours: Any, theirs: Any) -> None:
    fields = [{(f.number, f.name, f.type, f.is_repeated) for f in message.fields} for message in (ours, theirs)]
    assert fields[0] == fields[1], ours.full_name
    for nested in ours.nested_types:
        require_same_fields(nested, theirs.nested_types_by_name[nested.name])


def test_two_models_of_one_name_and_a_port_in_use_are_refused(served: Running) -> None:
    with (
        pytest.raises(UsageError, match="two models have one name"),
        running(load_model(linear()), load_model(linear())),
    ):
        pass
    taken = [Address("127.0.0.1", port) for port in (served.server.port, served.server.metrics_port)]
    for options in (ServingOptions(taken[0]), ServingOptions(ANYWHERE, taken[1])):
        with pytest.raises(UsageError, match=r"cannot listen on 127\.0\.0\.1:"):
            asyncio.run(started_and_stopped(options))


async def started_and_stopped(options: ServingOptions) -> None:
    server = InferenceServer(options)
    try:
        await server.start([load_model(linear())])
    finally:
        await server.stop()
