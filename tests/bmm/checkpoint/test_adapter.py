"""Adapters against PEFT's own merge of the same files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from bmm.checkpoint.adapter import AdapterCheckpoint
from bmm.checkpoint.architecture import encoder_names
from bmm.checkpoint.reader import Checkpoint
from bmm.checkpoint.verified import fingerprint, open_checkpoint
from bmm.errors import CheckpointError

SIZES: dict[str, Any] = {"vocab_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
HEADS = {"classification": AutoModelForSequenceClassification, "causal": AutoModelForCausalLM}
# What a run of PEFT says of adapters of which it thinks that one would not want them.
pytestmark = pytest.mark.filterwarnings("ignore")


def bases() -> dict[str, PreTrainedModel]:
    return {
        "bert": BertModel(BertConfig(hidden_size=16, **SIZES)),
        "bert-masked": BertForMaskedLM(BertConfig(hidden_size=16, **SIZES)),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=20)),
        "llama": LlamaForCausalLM(LlamaConfig(hidden_size=16, tie_word_embeddings=False, **SIZES)),
        "llama-tied": LlamaForCausalLM(LlamaConfig(hidden_size=16, tie_word_embeddings=True, **SIZES)),
    }


@pytest.fixture
def base(tmp_path: Path) -> Callable[[str], Path]:
    def save(kind: str) -> Path:
        torch.manual_seed(0)
        bases()[kind].save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return save


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Path]:
    """Save an adapter, each of its tensors changed at random as training would, and return its folder."""

    def run(base: Path, head: str = "classification", resize: int = 0, **settings: Any) -> Path:
        torch.manual_seed(1)
        task = {"classification": "SEQ_CLS", "causal": "CAUSAL_LM"}[head]
        options = {"num_labels": 3} if head == "classification" else {}
        model = HEADS[head].from_pretrained(base, **options)
        model.config.pad_token_id = 0
        if resize:
            model.resize_token_embeddings(resize)
        settings = {"task_type": task, "r": 4, "lora_alpha": 6, **settings}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, LoraConfig(**settings))
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.3 * torch.randn_like(parameter))
            adapted.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return run


def by_peft(base: Path, adapter: Path, head: str = "classification", resize: int = 0) -> dict[str, torch.Tensor]:
    model = HEADS[head].from_pretrained(base, **({"num_labels": 3} if head == "classification" else {}))
    if resize:
        model.resize_token_embeddings(resize)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return {name: tensor.detach() for name, tensor in merged.state_dict().items()}


def ours(base: Path, adapter: Path) -> AdapterCheckpoint:
    opened = open_checkpoint(adapter, base)
    assert isinstance(opened, AdapterCheckpoint)
    return opened


def same(found: AdapterCheckpoint, wanted: dict[str, torch.Tensor], *, lacking: set[str] = frozenset()) -> None:
    assert set(wanted) - set(found.names()) == set(lacking)
    for name in found.names():
        tensor = found.tensor(name)
        assert tensor.dtype == torch.float32
        assert found.info(name).shape == tuple(tensor.shape)
        assert found.info(name).dtype == "F32"
        torch.testing.assert_close(tensor, wanted[name], rtol=2e-6, atol=2e-7)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank stabilised": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layer.0.*": 2, "h.0.*": 2, "layers.0.*": 2}, "alpha_pattern": {r".*\.1\..*": 11}},
    "stabilised patterns": {"use_rslora": True, "rank_pattern": {r".*\.1\..*": 3}},
    "DoRA": {"use_dora": True},
    "DoRA patterns": {"use_dora": True, "rank_pattern": {r".*\.0\..*": 2}},
    "all biases": {"bias": "all"},
    "adapted biases": {"bias": "lora_only", "use_dora": True},
    "biases of B": {"lora_bias": True},
}
TARGETS = {
    "bert": ["query", "dense"],
    "bert-masked": ["value"],
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "down_proj"],
}


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("case", CASES)
def test_each_tensor_is_what_peft_merges(base, train, kind: str, case: str) -> None:
    if case == "biases of B" and kind == "llama":
        pytest.skip("Llama's linear maps have no biases")
    folder = base(kind)
    adapter = train(folder, target_modules=TARGETS[kind], **CASES[case])
    found = ours(folder, adapter)
    wanted = by_peft(folder, adapter)
    same(found, wanted)
    changed = [name for name in found.names() if not torch.equal(found.tensor(name), _plain(folder, name, wanted))]
    assert len(changed) > 2


def _plain(base: Path, name: str, wanted: dict[str, torch.Tensor]) -> torch.Tensor:
    stored = load_file(base / "model.safetensors")
    short = name.partition(".")[2]
    return stored.get(name, stored.get(short, torch.zeros_like(wanted[name])))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
@pytest.mark.parametrize(("kind", "target"), [("gpt2", "wte"), ("bert", "word_embeddings"), ("llama", "embed_tokens")])
def test_adapters_on_embeddings(base, train, kind: str, target: str, settings: dict[str, Any]) -> None:
    folder = base(kind)
    adapter = train(folder, target_modules=[target], **settings)
    same(ours(folder, adapter), by_peft(folder, adapter))


def test_the_heads_of_a_masked_language_model_are_left_out(base, train) -> None:
    folder = base("bert-masked")
    adapter = train(folder, target_modules=TARGETS["bert-masked"])
    # The base has no pooler, and PEFT made up one for the classifier: it is not in the adapter's file.
    found = ours(folder, adapter)
    wanted = {name: tensor for name, tensor in by_peft(folder, adapter).items() if ".pooler." not in name}
    same(found, wanted)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama-tied"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["embed_tokens", "wte"]},
        {"trainable_token_indices": [1, 7]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "wte"]},
        {"resize": 44},
    ],
    ids=["plain", "embeddings", "tokens", "output", "input", "more tokens"],
)
def test_language_models_tied_and_untied(base, train, kind: str, settings: dict[str, Any]) -> None:
    folder, resize = base(kind), settings.get("resize", 0)
    adapter = train(folder, "causal", **{"target_modules": TARGETS[kind.partition("-")[0]], **settings})
    found = ours(folder, adapter)
    tied = kind != "llama" and "lm_head.weight" not in found.names()
    same(found, by_peft(folder, adapter, "causal", resize), lacking={"lm_head.weight"} if tied else set())
    assert found.config["vocab_size"] == (resize or 40)


def test_convolutions_and_a_class_that_peft_was_not_told(tmp_path: Path) -> None:
    config = ViTConfig(hidden_size=16, image_size=8, patch_size=4, **{**SIZES, "vocab_size": 1})
    torch.manual_seed(0)
    ViTForImageClassification(config).save_pretrained(tmp_path / "base")
    for settings in ({}, {"use_dora": True}):
        model = ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
        targets = ["projection", "q_proj"]
        adapted = get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=["classifier"], **settings))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / "adapter")
        again = ViTForImageClassification.from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True)
        wanted = PeftModel.from_pretrained(again, tmp_path / "adapter").merge_and_unload().state_dict()
        found = ours(tmp_path / "base", tmp_path / "adapter")
        same(found, dict(wanted))
        # Reading them as any checkpoint's finds the same names again.
        assert encoder_names(found, "vit") == {n.removeprefix("vit."): n for n in found.names() if "vit." in n}
        assert found.config["architectures"] == ["ViTForImageClassification"]
        assert len(found.config["id2label"]) == 3


@pytest.fixture
def plain(base, train) -> tuple[Path, Path]:
    folder = base("bert")
    return folder, train(folder, target_modules=["query"])


def test_without_a_config_the_head_gives_the_number_of_classes(plain) -> None:
    folder, adapter = plain
    config = ours(folder, adapter).config
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert config["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["hidden_size"] == 16


def test_a_config_beside_the_adapter_names_the_classes(plain) -> None:
    folder, adapter = plain
    named = {"id2label": {"0": "no", "1": "maybe", "2": "yes"}}
    (adapter / "config.json").write_text(json.dumps({"model_type": "bert", **named}))
    config = ours(folder, adapter).config
    assert config["id2label"] == named["id2label"]
    assert config["hidden_size"] == 16


def test_the_digest_covers_the_adapter_and_its_base(plain) -> None:
    folder, adapter = plain
    first = ours(folder, adapter).digest()
    assert fingerprint(ours(folder, adapter)) == first
    for file in (adapter / "adapter_model.safetensors", folder / "model.safetensors"):
        before = fingerprint(ours(folder, adapter))
        tensors = load_file(file)
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})
        assert fingerprint(ours(folder, adapter)) == ours(folder, adapter).digest() != before
    before = fingerprint(ours(folder, adapter))
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 7}))
    assert fingerprint(ours(folder, adapter)) != before


def test_the_tokenizer_is_the_adapters_or_else_the_bases(plain) -> None:
    folder, adapter = plain
    (folder / "vocab.txt").write_text("[PAD]")
    assert ours(folder, adapter).tokenizer_folder == folder
    assert [file.parent for file in ours(folder, adapter).tokenizer_files] == [folder]
    (adapter / "tokenizer.json").write_text("{}")
    assert ours(folder, adapter).tokenizer_folder == adapter
    assert [file.name for file in ours(folder, adapter).tokenizer_files] == ["tokenizer.json"]


def test_half_precision_adapters_and_bases_are_added_in_float32(base, train) -> None:
    folder = base("bert")
    adapter = train(folder, target_modules=["query"])
    for file in (folder / "model.safetensors", adapter / "adapter_model.safetensors"):
        halved = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(file).items()}
        save_file(halved, file, metadata={"format": "pt"})
    found = ours(folder, adapter)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    stored = load_file(adapter / "adapter_model.safetensors")
    down, up = (stored[f"base_model.model.{name.removesuffix('weight')}lora_{part}.weight"].float() for part in "AB")
    weight = load_file(folder / "model.safetensors")[name.removeprefix("bert.")].float()
    torch.testing.assert_close(found.tensor(name), weight + 1.5 * (up @ down), rtol=1e-6, atol=1e-7)
    assert found.info(name).dtype == "F32"
    assert found.info("bert.embeddings.LayerNorm.bias").dtype == "BF16"


def test_an_adapters_own_image_processor_reads_its_rows(plain) -> None:
    folder, adapter = plain
    assert ours(folder, adapter).tokenizer_folder == folder
    (adapter / "preprocessor_config.json").write_text("{}")
    assert ours(folder, adapter).tokenizer_folder == adapter


def refused(base: Path, adapter: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        ours(base, adapter).names()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "IA3"}, ("peft_type 'IA3'", "only LORA")),
        ({"alora_invocation_tokens": [5]}, ("LORA", "'alora_invocation_tokens'")),
        ({"init_lora_weights": "pissa"}, ("LORA", "'init_lora_weights: pissa'")),
        ({"r": "many"}, ("adapter_config.json", "many")),
        ({"rank_pattern": {"*.query": 2}}, ("adapter_config.json", "nothing to repeat")),
        ({"r": 8}, ("does not fit the base", "(4, 16)")),
        ({"task_type": "SINGING"}, ("SINGING",)),
        ({"task_type": None, "auto_mapping": {"base_model_class": "os"}}, ("'os'",)),
    ],
)
def test_other_adapters_are_refused(plain, change: dict[str, Any], words: tuple[str, ...]) -> None:
    folder, adapter = plain
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **change}))
    refused(folder, adapter, *words)


def test_an_adapter_of_another_base_is_refused(plain, tmp_path: Path) -> None:
    _, adapter = plain
    wide = BertModel(BertConfig(hidden_size=24, **SIZES))
    wide.save_pretrained(tmp_path / "wide")
    refused(tmp_path / "wide", adapter, "does not fit the base", "(24, 24)", "(4, 16)", str(tmp_path / "bert"))
    shallow = BertModel(BertConfig(hidden_size=16, **{**SIZES, "num_hidden_layers": 1}))
    shallow.save_pretrained(tmp_path / "shallow")
    refused(tmp_path / "shallow", adapter, "layer.1.attention", "has no place")


def edit(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def test_tensors_that_make_no_adapter_are_refused(plain) -> None:
    folder, adapter = plain
    query = "base_model.model.bert.encoder.layer.0.attention.self.query"
    edit(adapter, lambda tensors: tensors.pop(f"{query}.lora_B.weight"))
    refused(folder, adapter, "only one part", "layer.0.attention.self.query")
    edit(adapter, lambda tensors: tensors.update({f"{query}.lora_magic": torch.ones(2)}))
    refused(folder, adapter, "lora_magic")


def test_an_adapter_without_a_head_is_refused(plain) -> None:
    folder, adapter = plain
    edit(adapter, lambda tensors: [tensors.pop(name) for name in list(tensors) if "classifier" in name])
    refused(folder, adapter, "holds no head", "'classifier.bias'", "modules_to_save")


def test_pickled_adapters_are_refused(plain) -> None:
    folder, adapter = plain
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(folder, adapter, "adapter_model.safetensors", "never loaded")


def test_an_adapter_is_no_base(plain) -> None:
    _, adapter = plain
    with pytest.raises(CheckpointError, match="name it as an expert"):
        Checkpoint.open(adapter)
