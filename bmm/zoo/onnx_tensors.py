"""The initialisers and nodes of an ONNX file, read from its protobuf wire format with the standard library and NumPy.

Only what a checkpoint needs to be rebuilt lives here: named float tensors, and which node takes which tensor.
Nothing is executed; external data, sub-graphs and other element types than float32 are not read. Field numbers are
those of `onnx.proto` (ModelProto, GraphProto, NodeProto, TensorProto), the wire format that of protocol buffers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bmm.errors import BMMError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FLOAT32 = 1
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_NAME, _NODE_OPERATOR = 1, 3, 4
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_FLOATS, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 4, 8, 9
_VARINT_BITS = 64


class OnnxError(BMMError):
    """The file is not an ONNX model, or is cut short."""


@dataclass(frozen=True)
class Node:
    """One operation: its name, its operator (`MatMul`, …) and the names of the tensors that it takes."""

    name: str
    operator: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """The nodes in their order, and the float32 initialisers by name, in the shapes the file gives them."""

    nodes: tuple[Node, ...]
    tensors: dict[str, NDArray[np.float32]]


def read_graph(content: bytes) -> Graph:
    """Return the graph of an ONNX model held in memory; tensors are copies.

    Raises:
        OnnxError: the bytes are not a protobuf message with a graph, or a tensor's data do not fill its shape.
    """
    graphs = [value for number, value in fields(memoryview(content)) if number == _MODEL_GRAPH]
    if len(graphs) != 1 or not isinstance(graphs[0], memoryview):
        raise OnnxError("the file holds no ONNX graph; delete it and run again")
    nodes, tensors = [], {}
    for number, value in fields(graphs[0]):
        if number == _GRAPH_NODE:
            nodes.append(_node(_message(value)))
        elif number == _GRAPH_INITIALIZER:
            name, tensor = _tensor(_message(value))
            if tensor is not None:
                tensors[name] = tensor
    return Graph(tuple(nodes), tensors)


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value) of a protobuf message: an integer for a varint, a view of the bytes otherwise.

    Raises:
        OnnxError: the bytes end within a field, or are not of the wire format.
    """
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if kind == _BYTES:
            size, position = _varint(message, position)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise OnnxError(f"the file is not an ONNX model (wire type {kind}); delete it and run again")
        if position + size > len(message):
            raise OnnxError("the ONNX file is cut short; delete it and run again")
        yield number, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return the integer at `position`, seven bits a byte, lowest first, and the position after it."""
    value = 0
    for shift in range(0, _VARINT_BITS + 6, 7):
        if position >= len(message):
            raise OnnxError("the ONNX file is cut short; delete it and run again")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise OnnxError("the file is not an ONNX model (an integer of more than 64 bits); delete it and run again")


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise OnnxError("the file is not an ONNX model (a number where a message belongs); delete it and run again")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode("utf-8", errors="replace")


def _node(message: memoryview) -> Node:
    name = operator = ""
    inputs = []
    for number, value in fields(message):
        if number == _NODE_INPUT:
            inputs.append(_text(value))
        elif number == _NODE_NAME:
            name = _text(value)
        elif number == _NODE_OPERATOR:
            operator = _text(value)
    return Node(name, operator, tuple(inputs))


def _tensor(message: memoryview) -> tuple[str, NDArray[np.float32] | None]:
    """Return a tensor's name and values, None where it does not hold float32."""
    name, kind = "", 0
    shape: list[int] = []
    raw: list[bytes] = []
    for number, value in fields(message):
        if number == _TENSOR_DIMS:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif number == _TENSOR_TYPE and isinstance(value, int):
            kind = value
        elif number == _TENSOR_NAME:
            name = _text(value)
        elif number in (_TENSOR_RAW, _TENSOR_FLOATS):
            # Both are little-endian float32: `float_data` packed, one value a field in old files.
            raw.append(bytes(_message(value)))
    if kind != _FLOAT32:
        return name, None
    values: NDArray[Any] = np.frombuffer(b"".join(raw), dtype="<f4") if sum(map(len, raw)) % 4 == 0 else np.empty(0)
    if values.size != prod(shape):
        raise OnnxError(f"the tensor '{name}' of the ONNX file lacks data for its shape; delete the file and run again")
    return name, values.astype(np.float32).reshape(shape)


def _packed(message: memoryview) -> list[int]:
    numbers, position = [], 0
    while position < len(message):
        number, position = _varint(message, position)
        numbers.append(number)
    return numbers
