"""Pico experts for tests of whole merges: real checkpoints, trained for a moment, in temporary folders."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import HubServer, running_hub
from nights import compute_here
from object_server import ObjectServer, running_server

WORDS = [f"w{index}" for index in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LABELS = ["yes", "no"]
# Put before a program, this makes it note every artefact that it makes in the store's `made.log`.
RECORDING = """
from bmm.store import Store

# Dask loads a preload module twice into one process.
Store.unrecorded = getattr(Store, "unrecorded", Store._make)

def noted(self, kind, key, *rest):
    self.root.mkdir(parents=True, exist_ok=True)
    with (self.root / "made.log").open("a") as log:
        log.write(f"{kind} {key}\\n")
    return self.unrecorded(kind, key, *rest)

Store._make = noted
"""
ROWS = {"training": 240, "calibration": 48, "validation": 60, "test": 60}
SERVERS = {"dask_scheduler", "object_server", "prefect_server", "scheduler"}
"""Fixtures of the session that run a server from their first test on."""


def pytest_configure() -> None:
    """Take Ctrl-C as a terminal's commands do, and have what the tests start do so.

    What a shell starts in its background ignores it, and so does all that comes of it: a test that presses Ctrl-C would
    wait for ever.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of the longest tests first, and those that ask a server of the session last.

    A server that nobody asks takes its 2 to 5 % of a core all the same, six of them for as long as the session lasts;
    and of two processes that share out files, none should begin the longest when the other is done.
    """
    asking = {item.path for item in items if SERVERS & set(getattr(item, "fixturenames", ()))}
    items.sort(key=lambda item: (item.path in asking, item.path.parent.name != "end_to_end"))


def pytest_collection_finish() -> None:
    """Pass over for good what the tests' imports have made: each search for garbage would look at all of it."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _isolated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep caches, the store and Prefect's home of the whole session out of the user's home."""
    home = tmp_path_factory.mktemp("home")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    patch.setenv("HF_HOME", str(home / "huggingface"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setenv("PREFECT_HOME", str(home / "prefect"))
    patch.setenv("PREFECT_RESULTS_LOCAL_STORAGE_PATH", str(home / "prefect" / "storage"))
    patch.setenv("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    for name in ("BMM_STORE", "BMM_ALLOWED_FOLDERS", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
        patch.delenv(name, raising=False)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    yield
    patch.undo()


@pytest.fixture(scope="session")
def pico_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, three experts, their data and a recipe, built once; copy it, don't change it."""
    folder = tmp_path_factory.mktemp("pico")
    build_pico(folder, experts=3)
    return folder


@pytest.fixture
def pico(pico_source: Path, tmp_path: Path) -> Path:
    """A copy of the pico folder that a test may change; its recipe is `recipe.yaml`."""
    folder = tmp_path / "pico"
    shutil.copytree(pico_source, folder)
    return folder


@pytest.fixture(scope="session")
def merged_source(pico_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pico folder that has been merged (few trials), with its store at `store`; copy it, don't change it."""
    from bmm.pipeline import merge
    from bmm.recipe import Recipe

    folder = tmp_path_factory.mktemp("merged") / "pico"
    shutil.copytree(pico_source, folder)
    path = folder / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe |= {"search": {"trials": 5}, "cluster": {"workers": 1}}
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    merge(Recipe.from_yaml(path), store=folder / "store")
    return folder


@pytest.fixture
def merged(merged_source: Path, tmp_path: Path) -> Path:
    """A copy of the merged pico folder that a test may change."""
    folder = tmp_path / "merged-pico"
    shutil.copytree(merged_source, folder)
    return folder


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute Gram shards and walks in this process, for tests that are about something else than Dask."""
    compute_here(monkeypatch)


@pytest.fixture(scope="session")
def dask_scheduler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running Dask scheduler with two workers; they stay warm, so that merges which use it are quick.

    Each artefact that a worker makes leaves a line in the `made.log` of its store.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    folder = tmp_path_factory.mktemp("dask")
    commands = (
        ("scheduler", "--host", address, "--no-dashboard"),
        ("worker", address, "--nworkers", "2", "--nthreads", "1", "--no-dashboard", "--local-directory", str(folder)),
    )
    started = []
    try:
        for what, *arguments in commands:
            command = [sys.executable, "-m", f"distributed.cli.dask_{what}", *arguments]
            if what == "worker":
                (folder / "recording.py").write_text(RECORDING, encoding="utf-8")
                command += ["--preload", str(folder / "recording.py")]
            with (folder / f"{what}.log").open("w") as log:
                started.append(
                    subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
                )
        from distributed import Client

        with Client(address, timeout=120) as client:
            client.wait_for_workers(2, timeout=120)
        yield address
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="session")
def object_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """An S3-speaking server of the session's own."""
    with running_server(tmp_path_factory.mktemp("objects")) as server:
        yield server


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on loopback that this process asks, with nothing fetched yet."""
    with running_hub() as server:
        server.asked_here(monkeypatch, tmp_path / "huggingface")
        yield server


@pytest.fixture(scope="session")
def recording() -> str:
    """Python that, run before a merge, notes every artefact made by that process in the store's `made.log`."""
    return RECORDING


@pytest.fixture(scope="session")
def finished(
    pico_source: Path, tmp_path_factory: pytest.TempPathFactory, dask_scheduler: str
) -> tuple[Path, Path, Any]:
    """A pico folder, a store and what `bmm.merge` made of them without a server; copy them, don't change them."""
    import bmm

    place = tmp_path_factory.mktemp("finished")
    folder, store = place / "pico", place / "store"
    shutil.copytree(pico_source, folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    recipe |= {"cluster": {"scheduler": dask_scheduler}, "search": {"per": "type", "trials": 5}}
    # RegMean reads Gram matrices, which nothing else here does.
    recipe["evaluation"]["compare"] = ["average", "regmean"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return folder, store, bmm.merge(bmm.Recipe.from_yaml(folder / "recipe.yaml"), store=store)


@pytest.fixture
def edit_recipe() -> Callable[..., Path]:
    """Return a function that sets top-level keys of a folder's recipe (None removes) and returns the recipe's path."""

    def edit(folder: Path, **changes: Any) -> Path:
        path = folder / "recipe.yaml"
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        recipe.update(changes)
        recipe = {key: value for key, value in recipe.items() if value is not None}
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    return edit


def build_pico(folder: Path, experts: int) -> None:
    """Build base, experts, data and recipe: BERT of two layers, 16 wide, on made-up sentences of made-up words."""
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = pico_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    entries = []
    for index in range(experts):
        name = f"task{index}"
        rows = pico_rows(index)
        train_pico(folder / "base", folder / "experts" / name, rows["training"], tokenizer, seed=index)
        data = folder / "data" / name
        data.mkdir(parents=True)
        for split in ("calibration", "validation", "test"):
            text = "".join(json.dumps(row) + "\n" for row in rows[split])
            (data / f"{split}.jsonl").write_text(text, encoding="utf-8")
        splits = {
            split: {"path": "json", "data_files": f"data/{name}/{split}.jsonl"}
            for split in ("calibration", "validation", "test")
        }
        task = {"kind": "text-classification", "max_length": 16, **splits}
        entries.append({"name": name, "model": f"./experts/{name}", "task": task})
    recipe = {
        "base_model": "./base",
        "experts": entries,
        "output": "./merged",
        "anchor": {"method": "wudi"},
        "grams": {"shard_rows": 24},
        "search": {"per": "type", "trials": 10},
        "evaluation": {"bootstrap_samples": 200},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def pico_tokenizer() -> Any:
    """Return a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def pico_rows(index: int) -> dict[str, list[dict[str, str]]]:
    """Return distinct rows of each split: the class says whether words of the task's own set are frequent."""
    generator = random.Random(index)
    own = set(WORDS[10 * index : 10 * index + 20])
    texts: dict[str, str] = {}
    while len(texts) < sum(ROWS.values()):
        words = [generator.choice(WORDS) for _ in range(generator.randint(4, 12))]
        share = sum(word in own for word in words) / len(words)
        texts.setdefault(" ".join(words), "yes" if share > 1 / 3 else "no")
    rows = iter([{"text": text, "label": label} for text, label in texts.items()])
    return {split: [next(rows) for _ in range(count)] for split, count in ROWS.items()}


def train_pico(base: Path, target: Path, rows: list[dict[str, str]], tokenizer: Any, seed: int) -> None:
    """Fine-tune an ordinary sequence classifier for a moment."""
    import torch
    from transformers import AutoModelForSequenceClassification

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    names = dict(enumerate(LABELS))
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=len(LABELS), id2label=names, label2id={name: index for index, name in names.items()}
    )
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for start in [*range(0, len(rows), 20)] * 4:
        batch = rows[start : start + 20]
        inputs = tokenizer([row["text"] for row in batch], padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        labels = torch.tensor([LABELS.index(row["label"]) for row in batch])
        model(**inputs, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    torch.set_num_threads(threads)
