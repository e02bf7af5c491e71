from __future__ import annotations

import pytest
import torch

from bmm.checkpoint.tensors import TensorInfo, dtype_name, is_supported, torch_dtype

NAMES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U64",
    "U32",
    "U16",
    "U8",
    "BOOL",
]


@pytest.mark.parametrize("name", NAMES)
def test_sizes_kinds_and_names_are_torchs_own(name: str) -> None:
    dtype = torch_dtype(name)
    tensor = torch.empty((3, 5), dtype=dtype)
    info = TensorInfo("a", (3, 5), name)
    assert info.nbytes == tensor.untyped_storage().nbytes()
    assert info.is_float == dtype.is_floating_point
    assert dtype_name(dtype) == name


def test_a_scalar_has_one_element_and_an_empty_tensor_none() -> None:
    assert TensorInfo("a", (), "F32").nbytes == 4
    assert TensorInfo("a", (0, 7), "F32").nbytes == 0


@pytest.mark.parametrize("name", ["F4", "F8_E4M3", "F8_E5M2", "F8_E8M0"])
def test_floats_of_a_byte_or_less_are_not_supported(name: str) -> None:
    assert not is_supported(name)
