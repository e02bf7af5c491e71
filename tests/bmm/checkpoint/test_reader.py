from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from bmm.checkpoint.reader import Checkpoint, TensorInfo
from bmm.checkpoint.shards import INDEX
from bmm.errors import CheckpointError, UserError


def state(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("shard", [None, "5KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_the_one_transformers_loads(save, shard: str | None, dtype: torch.dtype) -> None:
    folder = save("m", dtype=dtype, max_shard_size=shard)
    expected = state(folder)
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.names() == tuple(sorted(expected))
        assert (len(checkpoint.weight_files) > 1) == (shard is not None)
        for name, tensor in expected.items():
            word = "F32" if dtype is torch.float32 else "BF16"
            assert checkpoint.info(name) == TensorInfo(name, tuple(tensor.shape), word)
            loaded = checkpoint.tensor(name)
            assert loaded.dtype == dtype
            torch.testing.assert_close(loaded, tensor.to(dtype), rtol=0, atol=0)
        assert checkpoint.config["model_type"] == "bert"


def test_tensors_can_be_read_again_after_close_and_writes_stay_in_memory(save) -> None:
    checkpoint = Checkpoint.open(save("m"))
    tensor = checkpoint.tensor("classifier.weight")
    before = tensor.clone()
    tensor.add_(1)
    checkpoint.close()
    torch.testing.assert_close(checkpoint.tensor("classifier.weight"), before, rtol=0, atol=0)


def test_opening_and_digesting_import_neither_torch_nor_transformers(save) -> None:
    folder = save("m", dtype=torch.bfloat16)
    code = (
        "import sys; from pathlib import Path; from bmm.checkpoint.reader import Checkpoint\n"
        f"c = Checkpoint.open(Path({str(folder)!r})); c.digest(); c.license\n"
        "assert c.info('classifier.bias').dtype == 'BF16'\n"
        "print(*{'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_legacy_layer_norm_names_appear_as_modern_ones(save, edit_weights) -> None:
    folder = save("m")
    expected = load_file(folder / "model.safetensors")["bert.embeddings.LayerNorm.weight"]

    def to_legacy(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "LayerNorm" in name]:
            legacy = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[legacy] = tensors.pop(name)

    names = Checkpoint.open(folder).names()
    edit_weights(folder, to_legacy)
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.names() == names
    torch.testing.assert_close(checkpoint.tensor("bert.embeddings.LayerNorm.weight"), expected)


def test_support_files_are_those_that_are_there(save) -> None:
    folder = save("m")
    for name in (
        "tokenizer.json",
        "vocab.txt",
        "spiece.model",
        "chat_template.jinja",
        "training_args.bin",
        "notes.txt",
    ):
        (folder / name).write_text("{}")
    names = [file.name for file in Checkpoint.open(folder).support_files]
    assert names == ["chat_template.jinja", "config.json", "spiece.model", "tokenizer.json", "vocab.txt"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_the_digest_follows_every_byte_that_matters(save, name: str) -> None:
    folder = save("m")
    (folder / "tokenizer.json").write_text('{"a": 1}')
    checkpoint = Checkpoint.open(folder)
    before = checkpoint.digest()
    (folder / "README.md").write_text("# text")
    assert checkpoint.digest() == before
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert checkpoint.digest() != before


def test_the_digest_does_not_depend_on_the_place(save) -> None:
    first, second = save("m", seed=3, max_shard_size="5KB"), save("n", seed=3, max_shard_size="5KB")
    assert Checkpoint.open(first).digest() == Checkpoint.open(second).digest()
    assert Checkpoint.open(first).digest() != Checkpoint.open(save("o", seed=4, max_shard_size="5KB")).digest()


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n", "apache-2.0"),
        ("---\nlicense: [mit, gpl-3.0]\n---\n", "mit, gpl-3.0"),
        ("---\ntags: [a]\n---\nlicense: mit\n", None),
        ("# Model\nlicense: mit\n", None),
        ("---\nlicense: [\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_that_of_the_model_card(save, card: str | None, expected: str | None) -> None:
    folder = save("m")
    if card is not None:
        (folder / "README.md").write_text(card)
    assert Checkpoint.open(folder).license == expected


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none", str(tmp_path / "none"), "no model folder")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", str(tmp_path / "file"), "is a file")


@pytest.mark.parametrize("text", ["{", "[1]", "\xff", "[" * 100_000])
def test_a_broken_config_is_refused(save, text: str) -> None:
    folder = save("m")
    (folder / "config.json").write_text(text, encoding="latin-1")
    refused(folder, str(folder / "config.json"), "JSON")


def test_a_missing_config_is_refused(save) -> None:
    folder = save("m")
    (folder / "config.json").unlink()
    refused(folder, str(folder), "config.json")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "a.pt", "a.pth", "a.ckpt", "a.pkl"]
)
def test_a_pickle_is_refused_and_never_loaded(save, tmp_path: Path, name: str) -> None:
    folder = save("m")
    (folder / "model.safetensors").unlink()
    victim = tmp_path / "opened"
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch " + str(victim).encode() + b"'\ntR.")
    refused(folder, name, "pickle", "never loaded", "safetensors")
    assert not victim.exists()


def test_a_folder_without_weights_is_refused(save) -> None:
    folder = save("m")
    (folder / "model.safetensors").unlink()
    (folder / "training_args.bin").write_bytes(b"x")
    refused(folder, str(folder), "no weights", "model.safetensors")


def test_shards_without_their_index_are_refused(save) -> None:
    folder = save("m", max_shard_size="5KB")
    (folder / "model.safetensors.index.json").unlink()
    refused(folder, str(folder), "model.safetensors.index.json")


def test_a_missing_shard_is_refused(save) -> None:
    folder = save("m", max_shard_size="5KB")
    shard = sorted(folder.glob("model-00002-*"))[0]
    shard.unlink()
    refused(folder, shard.name, "no such file")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/other.safetensors", "sub/../../x", "..\\x", "C:x"])
def test_an_index_that_leads_outside_is_refused(save, edit_json, name: str) -> None:
    folder = save("m", max_shard_size="5KB")
    edit_json(folder / "model.safetensors.index.json", lambda v: v["weight_map"].update({"classifier.bias": name}))
    refused(folder, name, "classifier.bias", "outside")


@pytest.mark.parametrize(
    "index", ['{"weight_map": {}}', "{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}', "nope"]
)
def test_an_index_without_a_map_is_refused(save, index: str) -> None:
    folder = save("m", max_shard_size="5KB")
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, "model.safetensors.index.json")


def test_an_index_that_names_a_tensor_its_shard_lacks_is_refused(save, edit_json) -> None:
    folder = save("m", max_shard_size="5KB")
    file = folder / "model.safetensors.index.json"
    shard = json.loads(file.read_text())["weight_map"]["classifier.bias"]
    edit_json(file, lambda value: value["weight_map"].update({"ghost": shard}))
    refused(folder, "'ghost'", shard, "lacks")


def test_a_tensor_in_two_shards_is_refused(save) -> None:
    folder = save("m", max_shard_size="5KB")
    first, second = sorted(folder.glob("model-*"))[:2]
    tensors, doubled = load_file(first), load_file(second)
    name = sorted(doubled)[0]
    save_file({**tensors, name: doubled[name]}, first)
    refused(folder, f"'{name}'", first.name, second.name, "twice")


def test_a_tensor_under_its_old_and_new_name_is_refused(save, edit_weights) -> None:
    folder = save("m")
    edit_weights(
        folder,
        lambda t: t.update({"bert.embeddings.LayerNorm.gamma": t["bert.embeddings.LayerNorm.weight"].clone()}),
    )
    refused(folder, "bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight", "twice")


@pytest.mark.parametrize("damage", ["empty", "header", "data", "garbage", "pointer"])
def test_a_damaged_file_is_refused(save, damage: str) -> None:
    folder = save("m")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    damaged = {
        "empty": b"",
        "header": content[:100],
        "data": content[:-4],
        "garbage": b"\xff" * len(content),
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }
    file.write_bytes(damaged[damage])
    refused(folder, str(file), "not a whole safetensors file")


def test_a_packed_dtype_is_refused(save) -> None:
    folder = save("m")
    header = json.dumps({"packed": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    refused(folder, "'packed'", "F4")


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_a_wrapped_models_names_are_refused_as_transformers_would_not_find_them(save, edit_weights, wrapper) -> None:
    folder = save("m")

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[wrapper + name] = tensors.pop(name)

    edit_weights(folder, wrap)
    refused(folder, f"'{wrapper}'", "save_pretrained")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)[1]
    assert loaded["missing_keys"]


def test_8_bit_floats_are_refused_by_name(save, edit_weights) -> None:
    folder = save("m")
    name = "bert.pooler.dense.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    refused(folder, f"'{name}'", "F8_E4M3", "F32 or BF16")


def test_quantised_weights_are_refused(save, edit_json) -> None:
    folder = save("m")
    edit_json(folder / "config.json", lambda value: value.update(quantization_config={"quant_method": "gptq"}))
    refused(folder, "config.json", "gptq", "F32 or BF16")


def test_a_file_without_tensors_is_refused(save) -> None:
    folder = save("m")
    save_file({}, folder / "model.safetensors")
    refused(folder, "model.safetensors", "no tensor")


def test_remote_code_is_refused(save, edit_json) -> None:
    folder = save("m")
    edit_json(folder / "config.json", lambda value: value.update(auto_map={"AutoModel": "x.Model"}))
    refused(folder, str(folder / "config.json"), "auto_map")


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refused(tmp_path, str(tmp_path), "is a PEFT adapter", "name it as an expert")


def test_an_unknown_tensor_is_named(save) -> None:
    checkpoint = Checkpoint.open(save("m"))
    with pytest.raises(CheckpointError, match="'ghost'"):
        checkpoint.tensor("ghost")


def test_a_file_that_changes_under_the_reader_is_noticed(save, edit_weights) -> None:
    folder = save("m")
    checkpoint = Checkpoint.open(folder)
    edit_weights(folder, lambda tensors: tensors.update({"classifier.bias": torch.zeros(7)}))
    with pytest.raises(CheckpointError, match=r"'classifier\.bias'"):
        checkpoint.tensor("classifier.bias")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"'classifier\.weight'"):
        Checkpoint.tensor(Checkpoint(folder, {}, checkpoint._weights, ()), "classifier.weight")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_allowed_folders_is_refused(
    save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = save("allowed/m")
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("BMM_ALLOWED_FOLDERS", str(tmp_path / "allowed"))
    Checkpoint.open(folder)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=name):
        Checkpoint.open(folder)
    with pytest.raises(UserError, match="lies outside"):
        Checkpoint.open(tmp_path / "none")


def test_a_link_to_an_index_out_of_the_allowed_folders_is_not_followed(
    save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save("allowed/m", max_shard_size="1KB")
    monkeypatch.setenv("BMM_ALLOWED_FOLDERS", str(tmp_path / "allowed"))
    Checkpoint.open(folder)
    (folder / INDEX).rename(tmp_path / "elsewhere")
    (folder / INDEX).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=INDEX):
        Checkpoint.open(folder)
