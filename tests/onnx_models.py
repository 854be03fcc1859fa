"""Small ONNX models, made by hand with the public `onnx` package."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

WEIGHTS = np.arange(8, dtype=np.float32).reshape(4, 2) / 8
_OPSET = [helper.make_opsetid("", 20)]


def proto_of(nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], outputs: list[onnx.ValueInfoProto],
             weights: dict[str, np.ndarray] | None = None, **metadata: str) -> onnx.ModelProto:  # fmt: skip
    initializers = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=_OPSET, ir_version=10)
    helper.set_model_props(model, {name.replace("_", "."): value for name, value in metadata.items()})
    return model


def value(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def linear_proto(batch: int | str = "batch") -> onnx.ModelProto:
    """output = input @ WEIGHTS; (batch, 4) -> (batch, 2)."""
    nodes = [helper.make_node("MatMul", ["input", "weights"], ["output"])]
    inputs, outputs = value("input", TensorProto.FLOAT, batch, 4), value("output", TensorProto.FLOAT, batch, 2)
    return proto_of(nodes, [inputs], [outputs], {"weights": WEIGHTS}, propolis_name="linear", propolis_version="3")


def linear(batch: int | str = "batch") -> bytes:
    return bytes(linear_proto(batch).SerializeToString())


def copying(kind: int, shape: tuple[int | str, ...] = ("batch", "n")) -> bytes:
    """output = input, of any type."""
    nodes = [helper.make_node("Identity", ["input"], ["output"])]
    return bytes(proto_of(nodes, [value("input", kind, *shape)], [value("output", kind, *shape)]).SerializeToString())


def mixed() -> bytes:
    """Three inputs of three types: output = where(mask, table[index], default)."""
    nodes = [helper.make_node("Gather", ["table", "index"], ["picked"]),
             helper.make_node("Where", ["mask", "picked", "default"], ["output"]),
             helper.make_node("Not", ["mask"], ["left_out"])]  # fmt: skip
    inputs = [value("index", TensorProto.INT64, "batch"), value("mask", TensorProto.BOOL, "batch"),
              value("default", TensorProto.FLOAT, "batch")]  # fmt: skip
    outputs = [value("output", TensorProto.FLOAT, "batch"), value("left_out", TensorProto.BOOL, "batch")]
    return bytes(proto_of(nodes, inputs, outputs, {"table": np.array([10, 20, 30], np.float32)}).SerializeToString())


def endless() -> bytes:
    """output = input, after 2^62 rounds of a loop."""
    size = ("batch", 4)
    goes_on, carried = value("goes_on", TensorProto.BOOL), value("carried", TensorProto.FLOAT, *size)
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in ("goes_on", "carried")]
    body = helper.make_graph(
        nodes,
        "body",
        [value("round", TensorProto.INT64), goes_on, carried],
        [value("goes_on_out", TensorProto.BOOL), value("carried_out", TensorProto.FLOAT, *size)],
    )
    loop = helper.make_node("Loop", ["rounds", "begins", "input"], ["output"], body=body)
    weights = {"rounds": np.array(2**62, np.int64), "begins": np.array(True)}
    inputs, outputs = value("input", TensorProto.FLOAT, *size), value("output", TensorProto.FLOAT, *size)
    return bytes(proto_of([loop], [inputs], [outputs], weights).SerializeToString())


def external(where: str) -> onnx.ModelProto:
    """The linear model with a tensor in this place that is said to be in another file."""
    tensor = numpy_helper.from_array(WEIGHTS, "elsewhere")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    tensor.ClearField("raw_data")
    model = linear_proto()
    PLACES[where](model, tensor)
    return model


def _constant(tensor: TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["elsewhere"], value=tensor)


def _several(model: onnx.ModelProto, tensor: TensorProto) -> None:
    node = model.graph.node.add(op_type="Odd")
    node.attribute.add(name="tensors", type=onnx.AttributeProto.TENSORS).tensors.append(tensor)


def _branch(model: onnx.ModelProto, nodes: list[onnx.NodeProto], tensors: list[TensorProto]) -> None:
    branch = helper.make_graph(nodes, "branch", [], [value("elsewhere", TensorProto.FLOAT, 4, 2)], tensors)
    model.graph.node.append(helper.make_node("If", ["c"], ["x"], then_branch=branch, else_branch=branch))


PLACES: dict[str, Callable[[onnx.ModelProto, TensorProto], object]] = {
    "initializer": lambda model, tensor: model.graph.initializer.append(tensor),
    "sparse initializer": lambda model, tensor: model.graph.sparse_initializer.add(values=tensor),
    "attribute": lambda model, tensor: model.graph.node.append(_constant(tensor)),
    "attribute with several tensors": _several,
    "subgraph": lambda model, tensor: _branch(model, [_constant(tensor)], []),
    "subgraph's initializer": lambda model, tensor: _branch(model, [], [tensor]),
    "function": lambda model, tensor: model.functions.append(
        helper.make_function("own", "F", [], ["elsewhere"], [_constant(tensor)], _OPSET)
    ),
    "training": lambda model, tensor: model.training_info.add().algorithm.initializer.append(tensor),
}
