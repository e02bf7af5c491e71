"""The reader against messages encoded by hand, after the protobuf wire format."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bmm.zoo.onnx_tensors import Node, OnnxError, fields, read_graph


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, content: bytes | str) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return varint(field << 3 | 2) + varint(len(content)) + content


def tensor(name: str, values: np.ndarray, *, kind: int = 1, packed: bool = False, floats: bool = False) -> bytes:
    dims = message(1, b"".join(map(varint, values.shape))) if packed else b"".join(number(1, n) for n in values.shape)
    data = values.astype("<f4").tobytes()
    return dims + number(2, kind) + message(8, name) + message(4 if floats else 9, data)


def model(graph: bytes) -> bytes:
    # A version and a producer before the graph, as exporters write them; fixed-size fields are skipped too.
    return number(1, 8) + message(2, "exporter") + message(7, graph) + varint(99 << 3 | 5) + b"1234"


@given(
    st.lists(
        st.tuples(
            st.text(min_size=1, max_size=12),
            arrays.arrays(np.float32, arrays.array_shapes(max_dims=4, max_side=5), elements=st.floats(width=32)),
            st.booleans(),
            st.booleans(),
        ),
        unique_by=lambda item: item[0],
        max_size=4,
    )
)
@settings(max_examples=25, deadline=None)
def test_tensors_come_back_bit_for_bit(items: list[tuple[str, np.ndarray, bool, bool]]) -> None:
    graph = b"".join(message(5, tensor(name, a, packed=packed, floats=floats)) for name, a, packed, floats in items)
    read = read_graph(model(graph)).tensors
    assert list(read) == [name for name, *_ in items]
    for name, values, *_ in items:
        assert read[name].shape == values.shape
        assert read[name].tobytes() == values.tobytes()


def test_single_floats_scalars_and_other_types() -> None:
    singles = (
        number(1, 2)
        + number(2, 1)
        + message(8, "old")
        + b"".join(varint(4 << 3 | 5) + struct.pack("<f", value) for value in (1.5, -2.0))
    )
    scalar = tensor("scalar", np.float32(3.0).reshape(()))
    integers = tensor("integers", np.zeros(4), kind=7)
    read = read_graph(model(message(5, singles) + message(5, scalar) + message(5, integers))).tensors
    assert read["old"].tolist() == [1.5, -2.0]
    assert read["scalar"].shape == ()
    assert set(read) == {"old", "scalar"}


def test_nodes_keep_their_order_and_inputs() -> None:
    node = message(1, "x") + message(1, "weight") + message(2, "y") + message(3, "/fc/MatMul") + message(4, "MatMul")
    read = read_graph(model(message(1, node) + message(1, message(4, "Constant"))))
    assert read.nodes == (Node("/fc/MatMul", "MatMul", ("x", "weight")), Node("", "Constant", ()))


@given(st.integers(0, 2**64 - 1), st.integers(1, 2**28))
@settings(max_examples=25, deadline=None)
def test_a_number_of_any_size_is_read(value: int, field: int) -> None:
    assert list(fields(memoryview(number(field, value)))) == [(field, value)]


GOOD = model(message(5, tensor("w", np.ones((2, 3)))))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no ONNX graph"),
        (number(1, 8), "no ONNX graph"),
        (number(7, 1), "no ONNX graph"),
        (GOOD[:-20], "cut short"),
        (b"\x80", "cut short"),
        (b"\xff" * 11, "more than 64 bits"),
        (b"<html>", "not an ONNX model"),
        (model(number(5, 1)), "a number where a message belongs"),
        (model(message(5, tensor("w", np.ones(6)).replace(number(1, 6), number(1, 7)))), "'w' .* lacks data"),
        (model(message(5, number(1, 1) + number(2, 1) + message(8, "w") + message(9, b"123"))), "'w' .* lacks data"),
    ],
)
def test_what_is_no_model_is_refused(content: bytes, said: str) -> None:
    with pytest.raises(OnnxError, match=said):
        read_graph(content)


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255))
@settings(max_examples=25, deadline=None)
def test_no_damage_escapes_as_another_error(position: int, byte: int) -> None:
    with contextlib.suppress(OnnxError):
        read_graph(GOOD[:position] + bytes([byte]) + GOOD[position + 1 :])
