"""The vision zoo for real: the base out of its package, two image experts trained for a moment, merged, loaded back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from datasets import load_dataset
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from bmm.zoo import layout
from bmm.zoo.layout import prepare
from bmm.zoo.learners import ImageTraining
from bmm.zoo.splits import SplitSizes
from bmm.zoo.zoos import VISION

pytestmark = pytest.mark.slow

BMM = Path(sys.executable).with_name("bmm")
# The two whose packages are small.
NAMES = ("animals", "digits")
CLASS_TOKEN = [0.75609, 0.45585, 2.29471, -4.63331]
LAST_PATCH = [1.26945, 1.04838, 0.69856, -5.07118]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's folder with two experts of a few steps, merged by the real command from a plain anchor."""
    folder = tmp_path_factory.mktemp("demo-vision")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "ZOOS", {"vision": replace(VISION, four=NAMES)})
        recipe = prepare(
            folder,
            zoo="vision",
            training=ImageTraining(steps=30, batch_size=16, warmup_steps=4),
            sizes=SplitSizes(calibration=32, validation=40, test=80),
            anchor="average",
            trials=2,
        )
    document = yaml.safe_load(recipe.read_text())
    document["evaluation"] = {"compare": ["average"]}
    recipe.write_text(yaml.safe_dump(document))
    command = [BMM, "merge", recipe.name, "--no-server", "--json", "--store", "store"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_rebuilt_base_sees_what_the_published_encoder_sees(demo: Path) -> None:
    """Against numbers of the ONNX file itself, run once by onnxruntime 1.31 on a picture of 224 × 224 pixels."""
    steps = torch.linspace(-2, 2, 224)
    pixels = torch.stack([steps[None, :] * scale + steps[:, None] for scale in (1.0, 0.5, -1.0)])[None]
    with torch.inference_mode():
        seen = AutoModel.from_pretrained(demo / "base").eval()(pixels).last_hidden_state[0]
    assert tuple(seen.shape) == (257, 384)
    assert seen[0, :4].tolist() == pytest.approx(CLASS_TOKEN, abs=2e-4)
    assert seen[256, :4].tolist() == pytest.approx(LAST_PATCH, abs=2e-4)


def test_experts_beat_the_base_and_the_merge_beats_its_anchor(demo: Path) -> None:
    document = json.loads((demo / "merged" / "merge.json").read_text(encoding="utf-8"))
    for name in NAMES:
        entry = document["metrics"]["test"][name]
        assert entry["expert"] > entry["base"] + 0.1, name
    shares = {row["method"]: row["share_of_experts"]["mean"] for row in document["methods"]}
    assert shares["merged"] > shares["average"] > shares["base"]
    assert shares["merged"] > 0.85


def test_the_output_loads_and_answers_as_it_was_measured(demo: Path) -> None:
    output = demo / "merged"
    _, loading = AutoModel.from_pretrained(output, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    processor = AutoImageProcessor.from_pretrained(output, backend="pil")
    document = json.loads((output / "merge.json").read_text(encoding="utf-8"))
    for name in NAMES:
        head = output / "heads" / f"{name}.safetensors"
        with safe_open(head, framework="pt") as handle:
            config = json.loads(handle.metadata()["config"])
        kind = config.pop("model_type")
        model = AutoModelForImageClassification.from_pretrained(output, config=AutoConfig.for_model(kind, **config))
        assert not model.load_state_dict(load_file(head), strict=False).unexpected_keys
        file, cache = str(demo / "data" / name / "test.parquet"), str(demo / "cache")
        rows = load_dataset("parquet", data_files=file, split="train", cache_dir=cache)
        inputs = processor(images=[image.convert("RGB") for image in rows["image"]], return_tensors="pt")
        with torch.inference_mode():
            answers = model.eval()(**inputs).logits.argmax(1).tolist()
        right = sum(config["id2label"][str(a)] == label for a, label in zip(answers, rows["label"], strict=True))
        measured = document["metrics"]["test"][name]["merged"]
        # One row may stand on the edge between two classes and fall to either side with the batch.
        assert right / len(rows) == pytest.approx(measured, abs=1.5 / len(rows))
