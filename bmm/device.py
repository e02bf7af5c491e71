"""Where a worker's forward passes run: on its GPU if torch sees one, else on the processor."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch


def worker_device() -> torch.device:
    """Return the device of the worker that this thread belongs to; of one machine's workers, each has its own in turn.

    `CUDA_VISIBLE_DEVICES` says which GPUs torch sees; empty, there is none. Products stay float32 on a GPU as well.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return torch.device("cpu")
    # Ten bits of mantissa are not enough for convolutions either.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", _place() % count)


def placed(batches: Iterable[Mapping[str, torch.Tensor]], device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches with their tensors on a device."""
    for batch in batches:
        yield {name: tensor.to(device) for name, tensor in batch.items()}


def _place() -> int:
    """Return the number at the end of the worker's name, which Dask counts up; 0 outside of a worker."""
    from distributed import get_worker

    try:
        name = str(get_worker().name)
    except ValueError:
        return 0
    number = re.search(r"\d+$", name)
    return int(number[0]) if number else 0
