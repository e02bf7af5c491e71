from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from bmm.checkpoint.reader import Checkpoint
from bmm.checkpoint.vocabulary import check_tokens, extra_name, read_tokens, vocabulary_size, with_vocabulary
from bmm.errors import CheckpointError

WORDS = ["[PAD]", "[UNK]", "a", "b"]
Write = Callable[[Path, list[str]], None]


def tokenizer_json(folder: Path, words: list[str]) -> None:
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words[:3])}, unk_token="[UNK]"))
    made.add_tokens(words[3:])
    made.save(str(folder / "tokenizer.json"))


def unigram(folder: Path, words: list[str]) -> None:
    made = Tokenizer(models.Unigram([(word, 0.0) for word in words], unk_id=1))
    made.save(str(folder / "tokenizer.json"))


def vocab_txt(folder: Path, words: list[str]) -> None:
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))


def vocab_json(folder: Path, words: list[str]) -> None:
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words[:4])}))
    (folder / "added_tokens.json").write_text(json.dumps({word: 4 + index for index, word in enumerate(words[4:])}))


WRITERS = [tokenizer_json, unigram, vocab_txt, vocab_json]


@pytest.mark.parametrize("write", WRITERS)
def test_every_form_of_a_tokenizer_gives_the_same_tokens(tmp_path: Path, write: Write) -> None:
    words = [*WORDS, "c", "d"]
    write(tmp_path, words)
    assert read_tokens(sorted(tmp_path.iterdir())) == dict(enumerate(words))


@pytest.fixture
def models_of(save) -> Callable[..., tuple[Checkpoint, dict[str, Checkpoint]]]:
    def run(write: Write, **words: list[str] | None) -> tuple[Checkpoint, dict[str, Checkpoint]]:
        opened = {}
        for name, said in words.items():
            folder = save(name, "encoder" if name == "base" else "classifier")
            if said is not None:
                write(folder, said)
            opened[name] = Checkpoint.open(folder)
        return opened.pop("base"), opened

    return run


@pytest.mark.parametrize("write", WRITERS)
def test_tokens_behind_the_bases_are_an_experts_own(models_of: Any, write: Write) -> None:
    base, experts = models_of(write, base=WORDS, news=[*WORDS, "c"], mail=WORDS, chat=[*WORDS, "d", "e"])
    assert check_tokens(base, experts) == ("news", "chat")


@pytest.mark.parametrize("write", WRITERS)
def test_one_id_for_two_tokens_is_refused_by_name(models_of: Any, write: Write) -> None:
    base, experts = models_of(write, base=WORDS, news=WORDS, mail=["[PAD]", "[UNK]", "z", "y"])
    with pytest.raises(CheckpointError, match=r"expert 'mail' .* calls the token 2 'z', the base .* calls it 'a'"):
        check_tokens(base, experts)


def test_without_a_base_tokenizer_the_first_experts_counts(models_of: Any) -> None:
    base, experts = models_of(vocab_txt, base=None, news=WORDS, mail=[*WORDS[:3], "z"])
    with pytest.raises(CheckpointError, match="the token 3 'z', expert 'news' calls it 'b'"):
        check_tokens(base, experts)
    assert check_tokens(base, {"news": experts["news"]}) == ()


def test_models_without_plain_tokenizers_are_not_compared(models_of: Any) -> None:
    assert check_tokens(*models_of(vocab_txt, base=None, news=None, mail=None)) == ()
    assert check_tokens(*models_of(vocab_txt, base=WORDS, news=None, mail=WORDS)) == ()


def test_a_damaged_tokenizer_is_named(models_of: Any) -> None:
    base, experts = models_of(vocab_txt, base=WORDS, news=WORDS)
    (experts["news"].path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="news has a tokenizer that cannot be read"):
        check_tokens(base, {"news": Checkpoint.open(experts["news"].path)})


def test_sizes_in_plain_and_nested_configs() -> None:
    assert vocabulary_size({"vocab_size": 7}) == 7
    assert vocabulary_size({"text_config": {"vocab_size": 8, "x": 1}}) == 8
    assert vocabulary_size({"hidden_size": 8}) is None
    assert with_vocabulary({"vocab_size": 7, "x": 1}, 9) == {"vocab_size": 9, "x": 1}
    assert with_vocabulary({"text_config": {"vocab_size": 8, "x": 1}}, 9) == {"text_config": {"vocab_size": 9, "x": 1}}


def test_names_of_further_rows() -> None:
    assert extra_name("bert.embeddings.word_embeddings.weight") == "bert.embeddings.word_embeddings.extra_weight"
    assert extra_name("weight") == "extra_weight"
