"""An ONNX model from bytes in memory, checked before the runtime sees it, and run on the CPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError

from propolis.protos import onnx_pb2 as pb
from propolis.secure.errors import UsageError
from propolis.serving.faults import Fault, InferenceError
from propolis.serving.tensors import datatype_of, datatype_of_onnx, shape_in_words

if TYPE_CHECKING:
    import onnxruntime

METADATA_PREFIX = "propolis."  # of what our own export writes into a model's metadata
_UNNAMED_VERSION = "1"
_MOST_SHOWN = 33  # sizes of a shape that is refused


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a model takes or gives under a name.

    Attributes:
        name: of the input or output.
        datatype: the protocol's: FP32, INT64, BOOL, ...
        shape: sizes; None where any will do.
        is_batched: whether the first size is the number of examples.
    """

    name: str
    datatype: str
    shape: tuple[int | None, ...]
    is_batched: bool

    def require(self, datatype: str, shape: Sequence[int]) -> None:
        """Raise InferenceError (INVALID) unless an array of this type and shape is one of these."""
        if datatype != self.datatype:
            raise InferenceError(Fault.INVALID, f"input '{self.name}': expected {self.datatype}, got {datatype:.20}")
        fits = len(shape) == len(self.shape) and all(
            size in (None, given) for size, given in zip(self.shape, shape, strict=True)
        )
        if not fits:
            expected, got = shape_in_words(self.shape), list(shape[:_MOST_SHOWN])
            raise InferenceError(Fault.INVALID, f"input '{self.name}': expected shape {expected}, got {got}")


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is ready to run; make one with `load_model`. Several threads may run it at once.

    Attributes:
        name: that callers know it by.
        version: the same.
        inputs: all of them must be given.
        outputs: all that it computes.
        metadata: what the file says about itself: names of our own begin with `METADATA_PREFIX`.
    """

    name: str
    version: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metadata: Mapping[str, str]
    _session: onnxruntime.InferenceSession
    _options: onnxruntime.RunOptions

    @property
    def is_batched(self) -> bool:
        """Whether it takes any number of examples: inputs and outputs all have one and the same free first size."""
        return all(spec.is_batched for spec in (*self.inputs, *self.outputs))

    def require(self, inputs: Mapping[str, np.ndarray]) -> int:
        """Check that the inputs are what the model takes.

        Returns:
            The number of examples; 1 for a model that is not batched.

        Raises:
            InferenceError: a name, datatype or shape is another one, or the inputs have different numbers of
                examples, or none (INVALID).
        """
        self.require_described({name: (_datatype(array), array.shape) for name, array in inputs.items()})
        if not self.is_batched:
            return 1
        sizes = {len(array) for array in inputs.values()}
        if len(sizes) != 1 or 0 in sizes:
            raise InferenceError(Fault.INVALID, f"inputs of {sorted(sizes)} examples: expected one size, 1 or more")
        return sizes.pop()

    def require_described(self, inputs: Mapping[str, tuple[str, Sequence[int]]]) -> None:
        """Check datatypes and shapes by name, as far as they can be without the content; raises InferenceError."""
        expected, given = {spec.name for spec in self.inputs}, set(inputs)
        if odd := sorted(expected ^ given):
            which = "is missing" if odd[0] in expected else "is unknown"
            raise InferenceError(
                Fault.INVALID, f"input '{odd[0]:.100}' {which}: expected {', '.join(sorted(expected))}"
            )
        for spec in self.inputs:
            spec.require(*inputs[spec.name])

    def stop(self) -> None:
        """End the runs that are under way, once their current operators have ended; they fail, and so do later ones."""
        self._options.terminate = True

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs for these inputs, which `require` accepts, by name.

        Raises:
            InferenceError: the model fails on them (FAILED).
        """
        try:
            values = self._session.run(None, dict(inputs), self._options)
        except Exception as error:  # the runtime has no base class of its own
            raise InferenceError(Fault.FAILED, f"the model fails on these inputs: {_first_line(error)}") from None
        return {spec.name: value for spec, value in zip(self.outputs, values, strict=True)}


def load_model(data: bytes, name: str | None = None, version: str | None = None, threads: int = 1) -> Model:
    """A model from an ONNX file's content.

    Nothing but these bytes is read: a file that has tensors elsewhere is refused, because a path in it would be
    opened with this process's rights, and some runtimes take an address in memory for one.

    Args:
        data: the whole file.
        name: that callers know it by; by default what the file says.
        version: the same; 1 where the file says nothing.
        threads: that one run may use.

    Raises:
        UsageError: it is no ONNX model, has tensors elsewhere, or the runtime cannot run it; or there is no runtime.
    """
    require_self_contained(data)
    session, options = _session(data, threads)
    metadata = dict(session.get_modelmeta().custom_metadata_map)
    batch = _batch_symbol([*session.get_inputs(), *session.get_outputs()])
    return Model(
        name or metadata.get(f"{METADATA_PREFIX}name") or "model",
        version or metadata.get(f"{METADATA_PREFIX}version") or _UNNAMED_VERSION,
        tuple(_spec(node, batch) for node in session.get_inputs()),
        tuple(_spec(node, batch) for node in session.get_outputs()),
        metadata,
        session,
        options,
    )


def load_model_file(path: Path, name: str | None = None, version: str | None = None, threads: int = 1) -> Model:
    """A model from an ONNX file, as `load_model` takes it; raises UsageError also when it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    try:
        return load_model(data, name, version, threads)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def require_self_contained(data: bytes) -> None:
    """Refuse what is no ONNX model, or has tensors outside of the file; raises UsageError."""
    try:
        model = pb.Model.FromString(data)
    except DecodeError:
        raise UsageError("this is no ONNX model") from None
    if not model.graph.node:
        raise UsageError("this is no ONNX model: it has no graph")
    graphs = [model.graph, *(g for info in model.training_info for g in (info.initialization, info.algorithm))]
    within = chain.from_iterable(map(_tensors_of_graph, graphs))
    functions = (_tensors_of_attributes(f.attribute_proto) for f in model.functions)
    nodes = (_tensors_of_nodes(f.node) for f in model.functions)
    for tensor in chain(within, *functions, *nodes):
        if tensor.data_location or tensor.external_data:
            raise UsageError("the model has external data: export it as one file with everything in it")


def _tensors_of_graph(graph: pb.Graph) -> Iterator[pb.Tensor]:
    yield from graph.initializer
    yield from _tensors_of_sparse(graph.sparse_initializer)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Iterable[pb.Node]) -> Iterator[pb.Tensor]:
    for node in nodes:
        yield from _tensors_of_attributes(node.attribute)


def _tensors_of_attributes(attributes: Iterable[pb.Attribute]) -> Iterator[pb.Tensor]:
    """Those of subgraphs (If, Loop, Scan) included; the parser bounds how deep they are nested."""
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
        yield from _tensors_of_sparse((attribute.sparse_tensor, *attribute.sparse_tensors))
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from _tensors_of_graph(graph)


def _tensors_of_sparse(tensors: Iterable[pb.SparseTensor]) -> Iterator[pb.Tensor]:
    for tensor in tensors:
        yield from (tensor.values, tensor.indices)


def _session(data: bytes, threads: int) -> tuple[onnxruntime.InferenceSession, onnxruntime.RunOptions]:
    try:
        import onnxruntime
    except ImportError:
        raise UsageError("inference needs ONNX Runtime: pip install 'propolis[serve]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what fails is raised
    options.add_session_config_entry("session.load_model_format", "ONNX")  # and no other, which nobody has looked at
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # an idle server takes no processor
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime has no base class of its own
        raise UsageError(f"ONNX Runtime cannot run this model: {_first_line(error)}") from None
    return session, onnxruntime.RunOptions()


def _batch_symbol(nodes: Iterable[Any]) -> str | None:
    """The name of the free first size that all of these have."""
    (symbol, *others) = {node.shape[0] if node.shape else None for node in nodes}
    return symbol if isinstance(symbol, str) and not others else None


def _spec(node: Any, batch: str | None) -> TensorSpec:
    datatype = datatype_of_onnx(node.type)
    if datatype is None:
        raise UsageError(f"the model's '{node.name}' is a {node.type}, which cannot be served")
    shape = tuple(size if isinstance(size, int) else None for size in node.shape)
    return TensorSpec(node.name, datatype, shape, batch is not None)


def _datatype(array: np.ndarray) -> str:
    return datatype_of(array) or str(array.dtype)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
