"""What is known of a stored tensor without loading it, and safetensors' names of dtypes. No files here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# safetensors' name -> (torch's name, bytes an element). Left out: what is packed below one byte, and the 8-bit floats,
# which mean nothing without the scales of their quantiser.
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
_NAMES = {torch_name: name for name, (torch_name, _) in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name, shape and dtype of one tensor; `dtype` is safetensors' word for it ("F32", "BF16", "I64")."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor's elements take in a file."""
        return math.prod(self.shape) * _DTYPES[self.dtype][1]

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return is_float(self.dtype)


def is_supported(dtype: str) -> bool:
    """Return whether tensors of this safetensors dtype can be read and written."""
    return dtype in _DTYPES


def is_float(dtype: str) -> bool:
    """Return whether a safetensors dtype holds floating-point numbers."""
    return _DTYPES[dtype][0].startswith(("float", "bfloat"))


def torch_dtype(dtype: str) -> torch.dtype:
    """Return torch's dtype for a safetensors dtype ("BF16" -> `torch.bfloat16`)."""
    import torch

    found = getattr(torch, _DTYPES[dtype][0])
    assert isinstance(found, torch.dtype)  # noqa: S101 - narrows the type
    return found


def dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' word for a torch dtype (`torch.bfloat16` -> "BF16")."""
    return _NAMES[str(dtype).removeprefix("torch.")]
