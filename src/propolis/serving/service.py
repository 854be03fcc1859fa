"""The service ``inference.GRPCInferenceService``: the Open Inference Protocol v2 over gRPC."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, NoReturn, Protocol

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from propolis.protos import inference_pb2 as pb
from propolis.secure.errors import TrustError
from propolis.serving.batching import Batcher
from propolis.serving.faults import Fault, InferenceError
from propolis.serving.model import Model, TensorSpec
from propolis.serving.tensors import decode_inputs, encode_outputs

SERVICE = "inference.GRPCInferenceService"
_PLATFORM = "onnx_onnxruntime"
_STATUSES = {
    Fault.UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Fault.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Fault.BUSY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Fault.EXPIRED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Fault.STOPPING: grpc.StatusCode.UNAVAILABLE,
    Fault.FAILED: grpc.StatusCode.INTERNAL,
}
# What we would have to do differently if an output were asked for with it.
_REFUSED_PARAMETERS = ("classification", "shared_memory_region")


# Given a caller's certificate, PEM; raises TrustError for one who is not to be answered.
Admit = Callable[[bytes], None]


class Context(Protocol):
    """Of gRPC's context of a call, what is used here."""

    def time_remaining(self) -> float | None:
        """Seconds until the caller's deadline."""

    def auth_context(self) -> Mapping[str, Sequence[bytes]]:
        """What TLS found out about the caller."""

    async def abort(self, code: Any, details: str) -> NoReturn:
        """End the call with a status."""


@dataclass(frozen=True, slots=True)
class _Asked:
    batcher: Batcher
    id: str
    inputs: dict[str, np.ndarray]
    outputs: list[str]
    is_raw: bool


class InferenceService:
    """Answers the protocol's calls from the models that it was given; belongs to one event loop.

    Args:
        admit: asked about the certificate of every caller; None answers whoever can connect.
    """

    def __init__(self, admit: Admit | None = None) -> None:
        self._admit = admit
        self._batchers: dict[str, Batcher] = {}
        self.is_ready = False

    def put(self, batcher: Batcher) -> Batcher | None:
        """Serve a model from now on; returns the one of its name that it takes the place of."""
        before = self._batchers.get(batcher.model.name)
        self._batchers[batcher.model.name] = batcher
        return before

    async def close(self, seconds: float) -> None:
        """Finish what waits, for as long as `seconds`; new requests are refused."""
        self.is_ready = False
        until = time.monotonic() + seconds
        for batcher in self._batchers.values():
            await batcher.close(max(0.0, until - time.monotonic()))

    def handlers(self) -> grpc.GenericRpcHandler:
        """What a gRPC server registers."""
        methods = {
            "ServerLive": (self._server_live, pb.ServerLiveRequest),
            "ServerReady": (self._server_ready, pb.ServerReadyRequest),
            "ModelReady": (self._model_ready, pb.ModelReadyRequest),
            "ServerMetadata": (self._server_metadata, pb.ServerMetadataRequest),
            "ModelMetadata": (self._model_metadata, pb.ModelMetadataRequest),
            "ModelInfer": (self._model_infer, None),  # which reads it itself
        }
        return grpc.method_handlers_generic_handler(
            SERVICE, {name: _unary(answer, request, self._admit) for name, (answer, request) in methods.items()}
        )

    def _find(self, name: str, asked: str) -> Batcher:
        batcher = self._batchers.get(name)
        if batcher is None:
            raise InferenceError(Fault.UNKNOWN, f"there is no model '{name:.100}'")
        if asked not in ("", batcher.model.version):
            served = batcher.model.version
            raise InferenceError(Fault.UNKNOWN, f"model '{name}' has no version '{asked:.100}' here, but {served}")
        return batcher

    async def _server_live(self, _: pb.ServerLiveRequest, __: Context) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def _server_ready(self, _: pb.ServerReadyRequest, __: Context) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self.is_ready)

    async def _model_ready(self, request: pb.ModelReadyRequest, _: Context) -> pb.ModelReadyResponse:
        self._find(request.name, request.version)
        return pb.ModelReadyResponse(ready=self.is_ready)

    async def _server_metadata(self, _: pb.ServerMetadataRequest, __: Context) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(name="propolis", version=version("propolis"))

    async def _model_metadata(self, request: pb.ModelMetadataRequest, _: Context) -> pb.ModelMetadataResponse:
        model = self._find(request.name, request.version).model
        return pb.ModelMetadataResponse(
            name=model.name,
            versions=[model.version],
            platform=_PLATFORM,
            inputs=map(_tensor, model.inputs),
            outputs=map(_tensor, model.outputs),
        )

    async def _model_infer(self, message: bytes, context: Context) -> pb.ModelInferResponse:
        asked = self._read(message)
        batcher, remaining = asked.batcher, context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        outputs = await batcher.infer(asked.inputs, deadline, len(message))
        response = pb.ModelInferResponse(
            model_name=batcher.model.name, model_version=batcher.model.version, id=asked.id
        )
        encode_outputs({name: outputs[name] for name in asked.outputs}, asked.is_raw, response)
        return response

    def _read(self, message: bytes) -> _Asked:
        """What a message asks for. The message in its decoded form, which may be many times as large, ends here."""
        try:
            request = pb.ModelInferRequest.FromString(message)
        except DecodeError:
            raise InferenceError(Fault.INVALID, "this is no ModelInferRequest") from None
        batcher = self._find(request.model_name, request.model_version)
        try:
            if not self.is_ready:
                raise InferenceError(Fault.STOPPING, "the server is not ready")
            wanted = _outputs_asked_for(request, batcher.model)
            _require_inputs(request, batcher.model)
            inputs = decode_inputs(request)
        except InferenceError as error:
            batcher.metrics.count_failure(error.fault)
            raise
        return _Asked(batcher, request.id, inputs, wanted, bool(request.raw_input_contents))


def _outputs_asked_for(request: pb.ModelInferRequest, model: Model) -> list[str]:
    known = [spec.name for spec in model.outputs]
    _require_number("outputs", len(request.outputs), len(known), model)
    asked = [output.name for output in request.outputs]
    if odd := [name for name in asked if name not in known]:
        raise InferenceError(
            Fault.INVALID, f"output '{odd[0]:.100}' is unknown: model '{model.name}' has {', '.join(known)}"
        )
    for output in request.outputs:
        if refused := [name for name in _REFUSED_PARAMETERS if name in output.parameters]:
            raise InferenceError(Fault.INVALID, f"output '{output.name}': {refused[0]} is not available here")
    return list(dict.fromkeys(asked)) or known


def _require_inputs(request: pb.ModelInferRequest, model: Model) -> None:
    """Refuse what does not fit the model before its content is looked at, which takes time."""
    _require_number("inputs", len(request.inputs), len(model.inputs), model)
    model.require_described({tensor.name: (tensor.datatype, tensor.shape) for tensor in request.inputs})


def _require_number(what: str, given: int, known: int, model: Model) -> None:
    if given > known:
        raise InferenceError(Fault.INVALID, f"{given} {what}: model '{model.name}' has {known}")


def _tensor(spec: TensorSpec) -> pb.ModelMetadataResponse.TensorMetadata:
    shape = [-1 if size is None else size for size in spec.shape]
    return pb.ModelMetadataResponse.TensorMetadata(name=spec.name, datatype=spec.datatype, shape=shape)


def _unary(
    answer: Callable[[Any, Context], Awaitable[Any]], request: Any, admit: Admit | None
) -> grpc.RpcMethodHandler:
    """A method's handler: what it raises for the caller becomes a status."""

    async def handle(message: Any, context: Context) -> Any:
        try:
            if admit is not None:
                admit(context.auth_context()["x509_pem_cert"][0])
            return await answer(message, context)
        except InferenceError as error:
            await context.abort(_STATUSES[error.fault], str(error))
        except TrustError as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))

    return grpc.unary_unary_rpc_method_handler(
        handle,
        request_deserializer=None if request is None else request.FromString,
        response_serializer=lambda message: message.SerializeToString(),
    )
