from __future__ import annotations

from types import SimpleNamespace

import distributed
import pytest
import torch

from bmm.device import placed, worker_device


def test_without_a_gpu_it_is_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert worker_device() == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "count", "index"),
    [(0, 2, 0), (3, 2, 1), ("bmm-worker-5", 4, 1), ("pod-7f", 4, 0), ("SLURMCluster-2", 1, 0)],
)
def test_workers_of_one_machine_share_its_gpus_out(
    name: object, count: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(distributed, "get_worker", lambda: SimpleNamespace(name=name))
    assert worker_device() == torch.device("cuda", index)
    assert not torch.backends.cudnn.allow_tf32


def test_outside_of_a_worker_it_is_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert worker_device() == torch.device("cuda", 0)


def test_batches_come_to_the_device() -> None:
    batch = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3)}
    (found,) = placed([batch], torch.device("meta"))
    assert {name: (tensor.device.type, tensor.shape) for name, tensor in found.items()} == {
        name: ("meta", tensor.shape) for name, tensor in batch.items()
    }
