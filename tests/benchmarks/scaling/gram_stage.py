"""The Gram stage on its cluster: two workers against one, one expert of eight changed, and nothing changed.

Beside the two workers stand two processes that compute the same shards without Dask: what the cores can give.

Experts are text classifiers of a 6-layer, 384-wide encoder with random weights; their rows are made-up words.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from benchmarks.measuring import by_turns, ratio, seconds

from bmm.memory import WORKER_ENVIRONMENT

EXPERTS = 8
WORDS = [f"w{index}" for index in range(900)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def measure(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Return what two workers gain, and what one changed expert costs."""
    rows = 64 if quick else 512
    with TemporaryDirectory(dir=folder) as place:
        recipe = make_experts(Path(place), rows, layers=2 if quick else 6)
        computed, changed = _workers(Path(place), recipe, 1 if quick else 3), _changed(Path(place), recipe)
    return {
        **{name: found["median"] for name, found in computed["spread"].items()},
        "one_of_eight_changed": changed["ratio"],
        "changed": changed,
        **computed,
    }


def _workers(place: Path, recipe: Path, repetitions: int) -> dict[str, Any]:
    """Run one expert's shards on one warm worker and on two, and on as many bare processes, by turns."""
    from contextlib import ExitStack

    from bmm.cluster.connection import workers
    from bmm.cluster.settings import ClusterSettings
    from bmm.grams.shards import compute_shard
    from bmm.pipeline import perform_here, run_stages
    from bmm.recipe import Recipe
    from bmm.requests import Requests
    from bmm.sources import fingerprint_inputs
    from bmm.stages.grams import plan_job
    from bmm.stages.request import Work
    from bmm.stages.setup import setup_of
    from bmm.store import Reference, Store

    asked = Recipe.from_yaml(recipe)
    inputs = fingerprint_inputs(asked)
    store = Store.open(place / "workers")
    results = run_stages(asked, inputs, store, perform_here, ("experts",))
    request = Requests(asked, inputs).build("grams", results)
    work = Work(store)
    setup = setup_of(work, request)
    readers = list({map_.input_group: map_ for map_ in reversed(setup.regressed)}.values())[::-1]
    data = Reference.from_json(request.inputs["experts"][setup.experts[0].name])
    job = plan_job(work, setup.experts[0], data, readers, shard_rows=32, batch_size=32)
    requests = [vars(shard) for shard in job.shards]

    def forget() -> None:
        for shard in job.shards:
            store.discard("gram-shard", shard.key())

    def shards(client: Any) -> None:
        forget()
        client.gather(client.map(compute_shard, requests, pure=False))

    def bare(pool: Executor) -> None:
        forget()
        list(pool.map(compute_shard, requests))

    with ExitStack() as stack:
        clusters = {count: stack.enter_context(workers(ClusterSettings(workers=count))) for count in (1, 2)}
        for count, cluster in clusters.items():
            cluster.client.wait_for_workers(count)
        clients = {str(count): cluster.client for count, cluster in clusters.items()}
        runs: dict[str, Callable[[], None]] = {
            name: lambda client=client: shards(client) for name, client in clients.items()
        }
        for count in (1, 2):
            pool = stack.enter_context(_bare_processes(count))
            runs[f"{count} bare"] = lambda pool=pool: bare(pool)
        for run in runs.values():
            # Imports and the expert's weights are in place when the clock starts.
            run()
        taken = by_turns({name: lambda run=run: seconds(run) for name, run in runs.items()}, repetitions)
    return {
        "seconds": taken,
        "shards": len(requests),
        "spread": {
            "two_workers_speedup": ratio(taken["1"], taken["2"]),
            "two_bare_processes_speedup": ratio(taken["1 bare"], taken["2 bare"]),
        },
    }


@contextmanager
def _bare_processes(count: int) -> Iterator[Executor]:
    """Yield processes of one thread with the memory settings of workers, and nothing else of theirs."""
    with (
        patch.dict(os.environ, {**WORKER_ENVIRONMENT, "OMP_NUM_THREADS": "1"}),
        ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool,
    ):
        yield pool


def _changed(place: Path, recipe: Path) -> dict[str, Any]:
    """Run the Gram stage in full, with one expert changed, and with nothing changed.

    All three find the process that workers are forked from with its imports done, by `_workers`.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from bmm.pipeline import perform_here, run_stages
    from bmm.recipe import Recipe
    from bmm.sources import fingerprint_inputs
    from bmm.store import Store

    store = Store.open(place / "changed")
    asked = Recipe.from_yaml(recipe)

    def grams() -> Any:
        inputs = fingerprint_inputs(asked)
        before = run_stages(asked, inputs, store, perform_here, ("experts",))
        with _started() as count:
            from bmm.requests import Requests

            result = perform_here(store, Requests(asked, inputs).build("grams", before))
        return result, count[0]

    full, _ = grams()
    weights = place / "expert-0" / "model.safetensors"
    state = load_file(weights)
    save_file({name: value + 1e-3 * torch.ones_like(value) for name, value in state.items()}, weights)
    one, clusters = grams()
    none, unneeded = grams()
    assert (full.state, one.state, none.state, clusters, unneeded) == ("ran", "ran", "cached", 1, 0)
    return {
        "ratio": one.seconds / full.seconds,
        "target": 1 / EXPERTS + 0.05,
        "seconds": {"full": full.seconds, "one changed": one.seconds, "nothing changed": none.seconds},
        "clusters_started_with_nothing_changed": unneeded,
    }


@contextmanager
def _started() -> Iterator[list[int]]:
    """Count the local clusters that are started inside the block."""
    from distributed import LocalCluster

    count, real = [0], LocalCluster.__init__

    def counted(self: Any, *given: Any, **named: Any) -> None:
        count[0] += 1
        real(self, *given, **named)

    LocalCluster.__init__ = counted
    try:
        yield count
    finally:
        LocalCluster.__init__ = real


def make_experts(folder: Path, rows: int, layers: int) -> Path:
    """Write base, experts, their calibration rows and a recipe; return the recipe's path."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=384,
        num_hidden_layers=layers,
        num_attention_heads=6,
        intermediate_size=1536,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    tokenizer = _tokenizer()
    BertModel(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = BertModel.from_pretrained(folder / "base").state_dict()
    entries = []
    for index in range(EXPERTS):
        torch.manual_seed(index + 1)
        model = BertForSequenceClassification(config)
        model.bert.load_state_dict({name: value + 0.01 * torch.randn(value.shape) for name, value in base.items()})
        model.save_pretrained(folder / f"expert-{index}")
        tokenizer.save_pretrained(folder / f"expert-{index}")
        words = random.Random(index)
        texts = [" ".join(words.choices(WORDS, k=words.randint(40, 62))) for _ in range(rows)]
        lines = [json.dumps({"text": text, "label": f"LABEL_{place % 2}"}) for place, text in enumerate(texts)]
        (folder / f"rows-{index}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        split = {"path": "json", "data_files": str(folder / f"rows-{index}.jsonl"), "rows": rows}
        task = {"kind": "text-classification", "max_length": 64, "calibration": split}
        entries.append({"name": f"e{index}", "model": str(folder / f"expert-{index}"), "task": task})
    recipe = {"base_model": str(folder / "base"), "experts": entries, "output": str(folder / "out")}
    recipe |= {"cluster": {"workers": 2, "memory_limit": "4GiB"}, "search": {"trials": 0}}
    # The walk, which is the default, reads no Gram matrices.
    recipe |= {"regression": {"mode": "module-wise"}}
    # YAML takes JSON.
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return folder / "recipe.yaml"


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate([*SPECIAL, *WORDS])}, unk_token=SPECIAL[1])
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)
