"""The demo's folder made from tiny archives and a pico base: complete, idempotent, healing."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from made_packages import write_zip

from bmm.digest import digest_file
from bmm.errors import OutputError
from bmm.kinds.registry import kind_of
from bmm.recipe import Recipe
from bmm.zoo import layout
from bmm.zoo.layout import prepare
from bmm.zoo.learners import ImageTraining, TextTraining
from bmm.zoo.packages import Package
from bmm.zoo.pictures import Picture
from bmm.zoo.sets import Row, Source
from bmm.zoo.splits import SplitSizes
from bmm.zoo.zoos import TEXT, VISION, Base, Zoo

FEW = TextTraining(steps=2, batch_size=4, max_length=8, warmup_steps=1)
SMALL = SplitSizes(calibration=6, validation=5, test=4)


IMAGES = ImageTraining(steps=2, batch_size=4, warmup_steps=1)


def _lines(archive: Path) -> list[str]:
    with zipfile.ZipFile(archive) as opened:
        return opened.read("rows.txt").decode().split("\n")


def _read_texts(archive: Path) -> tuple[list[Row], list[Row] | None]:
    return [(line, "red" if "red" in line else "blue") for line in _lines(archive)], None


def _read_pictures(archive: Path) -> tuple[list[Row], list[Row] | None]:
    rows = enumerate(_lines(archive))
    return [(Picture("L", 1, 2, bytes([index, 9])), "red" if "red" in line else "blue") for index, line in rows], None


def _unpack(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(folder)


def pico_zoo(real: Zoo, base: Path, cache: Path, read: Callable[[Path], tuple[list[Row], list[Row] | None]]) -> Zoo:
    """Two small sets and a pico base, whose archives are in the cache already."""
    cache.mkdir(parents=True)

    def pack(name: str, members: dict[str, bytes]) -> Package:
        path = write_zip(cache / f"{name}.whl", members)
        return Package(name, "1", path.name, digest_file(path), path.stat().st_size, "mit")

    package = pack("base", {path.name: path.read_bytes() for path in base.iterdir()})
    numbers = ("one", "two", "three", "four", "five", "six")
    texts = [f"{word} {a} {b}" for word in ("red", "blue") for a in numbers for b in numbers]
    sources = {
        name: Source(pack(name, {"rows.txt": "\n".join(f"{name} {text}" for text in texts).encode()}), name, read)
        for name in ("sea", "sun")
    }
    return replace(real, base=Base(package, _unpack, "a pico", None), sources=sources, four=("sea", "sun"))


@pytest.fixture
def zoo(pico_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A demo folder for texts."""
    folder = tmp_path / "demo"
    made = pico_zoo(TEXT, pico_base, folder / "packages", _read_texts)
    monkeypatch.setattr(layout, "ZOOS", {"text": made})
    return folder


def marks(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {name for name in before | after if before.get(name) != after.get(name)}


def test_the_folder_is_complete_and_a_second_call_touches_nothing(zoo: Path) -> None:
    path = prepare(zoo, training=FEW, sizes=SMALL)
    recipe = Recipe.from_yaml(path)
    assert path == zoo / "recipe.yaml"
    assert (recipe.anchor.method, recipe.search.trials) == ("wudi", 24)
    for expert in recipe.experts:
        assert (recipe.resolve(expert.model) / "model.safetensors").is_file()
        assert expert.task.max_length == FEW.max_length
        for split, source in expert.task.splits().items():
            assert isinstance(source.data_files, str)
            lines = recipe.resolve(source.data_files).read_text().splitlines()
            assert len(lines) == getattr(SMALL, split)
    assert (recipe.resolve(recipe.base_model) / "model.safetensors").is_file()
    before = marks(zoo)
    assert prepare(zoo, training=FEW, sizes=SMALL) == path
    assert changed(before, marks(zoo)) == set()


def test_only_what_is_missing_or_damaged_is_made_again(zoo: Path) -> None:
    prepare(zoo, training=FEW, sizes=SMALL)
    before = marks(zoo)
    (zoo / "data" / "sea" / "test.jsonl").write_text("")
    prepare(zoo, training=FEW, sizes=SMALL)
    assert changed(before, marks(zoo)) == {"data/sea/test.jsonl"}
    before = marks(zoo)
    (zoo / "experts" / "sun" / "model.safetensors").unlink()
    prepare(zoo, training=FEW, sizes=SMALL)
    assert {name.split("/")[1] for name in changed(before, marks(zoo))} == {"sun"}
    with (zoo / "base" / "model.safetensors").open("r+b") as handle:
        handle.seek(-4, 2)
        handle.write(b"\x00\x01\x02\x03")
    before = marks(zoo)
    prepare(zoo, training=FEW, sizes=SMALL)
    assert {name.split("/")[0] for name in changed(before, marks(zoo))} == {"base"}


def test_finished_parts_do_not_need_the_archives(zoo: Path) -> None:
    prepare(zoo, training=FEW, sizes=SMALL)
    for archive in (zoo / "packages").iterdir():
        archive.unlink()
    prepare(zoo, training=FEW, sizes=SMALL)
    assert list((zoo / "packages").iterdir()) == []


def test_the_two_variants_stand_side_by_side(zoo: Path) -> None:
    prepare(zoo, training=FEW, sizes=SMALL)
    before = marks(zoo)
    path = prepare(zoo, "all", training=FEW, sizes=SMALL, anchor="tsv", trials=3)
    assert path == zoo / "recipe-all.yaml"
    added = changed(before, marks(zoo))
    assert {name.split("/")[0] for name in added} == {"recipe-all.yaml", "experts-all", "data-all"}
    recipe = Recipe.from_yaml(path)
    assert (recipe.anchor.method, recipe.search.trials, recipe.output) == ("tsv", 3, "./merged-all")
    assert layout.plan(layout.ZOOS["text"], "all", FEW).training.steps == 5


def test_another_setting_trains_again_and_another_seed_draws_again(zoo: Path) -> None:
    prepare(zoo, training=FEW, sizes=SMALL)
    before = marks(zoo)
    prepare(zoo, training=TextTraining(**{**vars(FEW), "steps": 3}), sizes=SMALL)
    assert {name.split("/")[0] for name in changed(before, marks(zoo))} == {"experts"}
    before = marks(zoo)
    prepare(zoo, training=FEW, sizes=SMALL, seed=1)
    assert {name.split("/")[0] for name in changed(before, marks(zoo))} == {"experts", "data", "recipe.yaml"}


def test_an_image_zoo_is_made_and_healed_the_same_way(
    pico_vision_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "demo"
    made = pico_zoo(VISION, pico_vision_base, folder / "packages", _read_pictures)
    monkeypatch.setattr(layout, "ZOOS", {"vision": made})
    recipe = Recipe.from_yaml(prepare(folder, zoo="vision", training=IMAGES, sizes=SMALL))
    for expert in recipe.experts:
        assert expert.task.kind == "image-classification"
        config = json.loads((recipe.resolve(expert.model) / "config.json").read_text())
        assert config["architectures"] == ["Dinov2ForImageClassification"]
        assert (recipe.resolve(expert.model) / "preprocessor_config.json").is_file()
        card = (recipe.resolve(expert.model) / "README.md").read_text()
        assert "pipeline_tag: image-classification" in card
        for split, source in expert.task.splits().items():
            rows = kind_of(expert.task.kind).load_split(source, expert.task, ("blue", "red"), recipe.folder, split)
            assert len(rows) == getattr(SMALL, split)
    before = marks(folder)
    prepare(folder, zoo="vision", training=IMAGES, sizes=SMALL)
    assert changed(before, marks(folder)) == set()
    (folder / "data" / "sea" / "test.parquet").write_bytes(b"")
    prepare(folder, zoo="vision", training=IMAGES, sizes=SMALL)
    assert changed(before, marks(folder)) == {"data/sea/test.parquet"}


def test_an_unwritable_folder_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("a file")
    with pytest.raises(OutputError):
        prepare(tmp_path / "demo")


def test_importing_the_layout_does_not_load_torch() -> None:
    code = "import sys, bmm.zoo.layout; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
