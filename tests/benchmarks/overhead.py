"""What scheduler and store cost beside the compute that they carry: the Gram stage with a sleep for each forward pass.

Everything but the forward pass is the product's: the list of what is missing, the requests' way through a Dask
scheduler to worker processes and back, rows read and tokenised, locks, drafts, checksums, fsync, the sum over all
shards and their removal. Matrices are small, so that what bytes cost (copying and hashing them, which grows with the
model as its forward pass does) is left out; so is the start of the workers, which a cluster has before.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bmm.cluster.settings import ClusterSettings
from bmm.evaluation.data import Split
from bmm.grams.collect import GramSum
from bmm.kinds.texts import TextRow
from bmm.modules.linear import LinearMap
from bmm.sources import Expert, fingerprint_model
from bmm.stages import grams
from bmm.stages.request import Work
from bmm.store import Draft, Store

GROUPS = 48
"""Input groups of the requests, as an encoder of twelve layers has them: they travel with each request."""


def store_overhead(shards: int = 10_000, seconds: float = 1.0, workers: int = 16) -> dict[str, float]:
    """Run a Gram stage of sleeps, and return what it took beyond them.

    Args:
        shards: how many, of one row each.
        seconds: of sleep in each, for its forward pass.
        workers: processes of one thread.

    Returns:
        `ratio`: time beyond the sleeps over the sleeps' own, by the wall clock and on as many workers; `seconds`: all
        of the stage; `shards`, `workers`, `sleep`: the arguments.
    """
    with TemporaryDirectory(prefix="overhead-") as folder:
        took = _seconds(Path(folder), shards, seconds, workers)
    ideal = shards * seconds / workers
    return {"ratio": took / ideal - 1, "seconds": took, "shards": shards, "workers": workers, "sleep": seconds}


def _seconds(folder: Path, shards: int, seconds: float, workers: int) -> float:
    """Run the stage in a folder and return how long it took, its workers being warm."""
    from distributed import Client, LocalCluster

    expert = _expert(folder)
    work = Work(Store.open(folder / "store"))
    with LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
        memory_limit=0,
        silence_logs=50,
    ) as cluster:
        settings = ClusterSettings(scheduler=str(cluster.scheduler_address))
        with Client(cluster) as client:
            client.wait_for_workers(workers, timeout=600)
            client.run(_prepare, 0.2)
            # Imports and the expert come with a worker's first shard, whatever that carries.
            grams.compute(work, [_job(work, expert, 4 * workers)], settings)
            client.run(_prepare, seconds)
        job = _job(work, expert, shards)
        started = time.perf_counter()
        grams.compute(work, [job], settings)
        return time.perf_counter() - started


def _expert(folder: Path) -> Expert:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    config = BertConfig(vocab_size=80, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForSequenceClassification(config).save_pretrained(folder / "expert")
    words = ["[PAD]", *(f"w{number}" for number in range(60))]
    tokenizer = Tokenizer(WordLevel({word: place for place, word in enumerate(words)}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder / "expert")
    task = {"kind": "text-classification", "max_length": 16}
    return Expert("expert", fingerprint_model("expert", folder, "the expert"), task, {})


def _job(work: Work, expert: Expert, shards: int) -> grams.GramJob:
    """Return a job of one row a shard, whose rows the store has."""
    rows = tuple(TextRow(f"w{number % 60} w{number // 60 % 60}", None, 0) for number in range(shards))
    split = Split("calibration", rows)

    def make(draft: Draft) -> None:
        (draft.path / "calibration.jsonl").write_text(split.to_jsonl(), encoding="utf-8")
        draft.write_json("expert.json", {"kind": "text-classification"})

    data = work.obtain("expert", {"rows": shards}, make)
    names = [f"encoder.layer.{number // 4}.part.{number % 4}.dense" for number in range(GROUPS)]
    maps = [LinearMap(name, 16, 16, name, "other", None, f"{name}.weight", f"{name}.bias") for name in names]
    return grams.plan_job(work, expert, data, maps, 1, 1)


def _prepare(seconds: float) -> None:
    """Let this worker sleep where it would run an expert."""
    import bmm.grams.shards

    def slept(
        _: Any, batches: Iterable[Mapping[str, Any]], maps: Sequence[LinearMap], _sample: None = None
    ) -> dict[str, GramSum]:
        for _batch in batches:
            time.sleep(seconds)
        return {map_.input_group: GramSum(torch.eye(map_.inputs, dtype=torch.float64), 1) for map_ in maps}

    bmm.grams.shards.collect = slept
