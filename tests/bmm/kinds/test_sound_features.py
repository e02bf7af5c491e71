from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sounds import CONFIGS, RATE, encoded, extractor, sound

from bmm.errors import CheckpointError, DataError
from bmm.kinds.sound_features import SoundReader
from bmm.kinds.sounds import SoundRow


def row_of(seed: int, seconds: float) -> SoundRow:
    return SoundRow.of(encoded(sound(seed, seconds)), 0)


@pytest.mark.parametrize("family", CONFIGS)
def test_features_are_the_extractors_own_and_no_row_knows_of_another(tmp_path: Path, family: str) -> None:
    extractor(family).save_pretrained(tmp_path)
    rows = [row_of(seed, seconds=0.05 + 0.05 * (seed % 2)) for seed in range(5)]
    prepared = SoundReader(tmp_path, CONFIGS[family](), "birds", 30).prepare(rows)
    batches = list(prepared.batches(2))
    assert sorted(prepared.order) == list(range(5))
    assert [len(batch[name]) for batch in batches for name in batch] == {"wav2vec2": [2, 1, 2]}.get(family, [2, 2, 1])
    read = [values for batch in batches for values in batch[next(iter(batch))]]
    own = extractor(family)
    for values, index in zip(read, prepared.order, strict=True):
        alone = own(rows[index].heard(RATE, 30), sampling_rate=RATE, return_tensors="pt")
        torch.testing.assert_close(values, alone[own.model_input_names[0]][0])
    again = [values for batch in prepared.batches(2) for values in batch[next(iter(batch))]]
    assert all(torch.equal(one, other) for one, other in zip(read, again, strict=True))


def test_long_sounds_are_cut(tmp_path: Path) -> None:
    extractor("wav2vec2").save_pretrained(tmp_path)
    (batch,) = SoundReader(tmp_path, CONFIGS["wav2vec2"](), "birds", 0.02).prepare([row_of(0, 0.5)]).batches(4)
    assert batch["input_values"].shape == (1, 320)


def test_a_feature_extractor_that_does_not_fit_or_none_is_refused(tmp_path: Path) -> None:
    whisper = CONFIGS["whisper"]()
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config\.json"):
        SoundReader(tmp_path, whisper, "birds", 30)
    extractor("ast").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="makes features of 20 x 8, but the model takes 8 x 100"):
        SoundReader(tmp_path, whisper, "birds", 30).prepare([row_of(0, seconds=0.1)])
    extractor("wav2vec2").save_pretrained(tmp_path)
    with pytest.raises(DataError, match="has 80 samples at 16000 Hz, but the model needs 290; remove the row"):
        SoundReader(tmp_path, CONFIGS["wav2vec2"](), "birds", 30).prepare([row_of(0, seconds=0.005)])
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"the feature extractor in .* cannot be read"):
        SoundReader(tmp_path, whisper, "birds", 30)
