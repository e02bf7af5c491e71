from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, T5Config, T5ForSequenceClassification, T5Model

from bmm.checkpoint.architecture import Architecture
from bmm.checkpoint.comparison import compare
from bmm.checkpoint.reader import Checkpoint
from bmm.prediction import StoredWeights
from bmm.sources import fingerprint_model
from bmm.stages.anchor import published_dtypes
from bmm.stages.publish import _head_config, _write_weights
from bmm.stages.request import Request, Work
from bmm.stages.setup import Setup
from bmm.store import Draft, Store


def test_the_output_stores_a_tied_parameter_under_the_names_that_the_base_stores(tmp_path: Path) -> None:
    settings = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 30}
    for name, model_class in (("base", T5Model), ("news", T5ForSequenceClassification)):
        torch.manual_seed(len(name))
        model_class(T5Config(**settings)).save_pretrained(tmp_path / name)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"].clone()}, file)
    with Checkpoint.open(tmp_path / "base") as base, Checkpoint.open(tmp_path / "news") as news:
        classifier = Architecture("AutoModelForSequenceClassification", "text classifier")
        layout = compare(base, {"news": news}, {"news": classifier})
        work = Work(Store.open(tmp_path / "store"))

        def make(draft: Draft) -> None:
            merged = {one.name: torch.randn(one.shape) for one in layout.shared}
            save_file(merged, draft.path / "model.safetensors")

        search = work.obtain("search", {}, make)
        setup = Setup(fingerprint_model("base", tmp_path, "base_model"), (), layout, (), frozenset())
        asked = Request("publish", {"search": search.to_json()}, {"dtype": "base", "max_shard_size": "1GiB"})
        output = tmp_path / "output"
        output.mkdir()
        merged = StoredWeights(work.read(search))
        _write_weights(asked, setup, base, output, merged, published_dtypes(setup, None))
    written = load_file(output / "model.safetensors")
    wanted = load_file(work.read(search).file("model.safetensors"))
    assert written.keys() == load_file(file).keys()
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        assert torch.equal(written[name], wanted["shared.weight"])
    (output / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    model = AutoModel.from_pretrained(output)
    assert torch.equal(model.decoder.embed_tokens.weight, wanted["shared.weight"])


def test_a_heads_configuration_says_nothing_of_the_machine_that_trained_it() -> None:
    config = {"hidden_size": 8, "_name_or_path": "/home/somebody/run-7", "id2label": {"0": "LABEL_0"}}
    assert _head_config(config, ["no"]) == {"hidden_size": 8, "id2label": {"0": "no"}}
