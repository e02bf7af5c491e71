"""The log keeps what it was given, to the bit, and forgets no more than what was damaged."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmm.errors import BMMError, OutputError
from bmm.search.model import inside
from bmm.search.setting import Setting
from bmm.search.space import Space
from bmm.search.study import Study
from bmm.search.trial import Trial, best_of

IDENTITY = {"experts": ["a", "b"], "seed": 0}
finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(max_size=8)
hyperparameters = st.builds(
    Setting,
    st.one_of(st.floats(0, 1e300), st.just(math.inf)),
    finite,
    finite,
    st.one_of(st.none(), st.floats(0, 1)),
    st.lists(st.tuples(names, finite), max_size=2, unique_by=lambda pair: pair[0]).map(tuple),
)


@st.composite
def trials(draw: st.DrawFn, index: int = 0) -> Trial:
    failed = draw(st.booleans())
    return Trial(
        index=index,
        origin=draw(st.sampled_from(["anchor", "global", "sobol", "bayesian"])),
        settings=draw(st.dictionaries(names, hyperparameters, max_size=3)),
        objective=None if failed else draw(finite),
        tasks=draw(st.dictionaries(names, finite, max_size=3)),
        point=tuple(draw(st.lists(st.floats(0, 1), max_size=4))),
        state="failed" if failed else "complete",
        reason=draw(st.text(max_size=20)) if failed else None,
        seed=draw(st.integers(0, 2**31 - 1)),
        variance=draw(st.one_of(st.none(), finite)),
        seen=draw(st.floats(0, 1)),
    )


def a_trial(index: int, objective: float | None = 0.5) -> Trial:
    return Trial(
        index=index,
        origin="global",
        settings={"späte": Setting(0.1 * (index + 1), 1.0), "early": Setting(math.inf, 1 / 3)},
        objective=objective,
        tasks={"news": 0.1 + index, "banking": 2 / 3},
        point=(1 / 3, 0.1),
        state="failed" if objective is None else "complete",
        reason=None if objective is not None else "singular\n\udcff",
        seed=7,
    )


@pytest.fixture
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of reopenings need not wait for the disk; `test_every_append_is_synced` is not spared."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def a_log(path: Path, count: int = 3) -> list[Trial]:
    study = Study.open(path, IDENTITY)
    for index in range(count):
        study.append(a_trial(index, None if index == 1 else 0.5 + index / 7))
    return list(study.trials)


@settings(deadline=None, max_examples=25)
@given(trials())
def test_json_round_trip_is_exact(trial: Trial) -> None:
    text = json.dumps(trial.to_json(), allow_nan=False)
    again = Trial.from_json(json.loads(text))
    assert again == trial
    assert json.dumps(again.to_json()) == text


def test_trials_survive_reopening(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "study.jsonl"
    written = a_log(path)
    study = Study.open(path, dict(reversed(IDENTITY.items())))
    assert list(study.trials) == written
    assert [trial.to_json() for trial in study.trials] == [trial.to_json() for trial in written]
    study.append(a_trial(3))
    assert Study.open(path, IDENTITY).trials == study.trials
    assert [entry.name for entry in path.parent.iterdir()] == ["study.jsonl"]


def test_trials_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_trial(0).index = 1  # type: ignore[misc]


@pytest.mark.usefixtures("no_sync")
def test_truncation_at_every_byte_keeps_exactly_the_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    written = a_log(path)
    content = path.read_bytes()
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        study = Study.open(path, IDENTITY)
        kept = max(content[:size].count(b"\n") - 1, 0)
        assert list(study.trials) == written[:kept], size
        # What is left on disk is the kept prefix and nothing else, and it can be continued.
        assert path.read_bytes() == b"".join(content.splitlines(keepends=True)[: kept + 1])
    path.write_bytes(content[:-1])
    study = Study.open(path, IDENTITY)
    study.append(written[-1])
    assert path.read_bytes() == content


@pytest.mark.usefixtures("no_sync")
def test_a_flipped_bit_cuts_at_its_line(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    written = a_log(path)
    content = path.read_bytes()
    for position in range(content.index(b"\n") + 1, len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        kept = content[:position].count(b"\n") - 1
        assert list(Study.open(path, IDENTITY).trials) == written[:kept], position


@pytest.mark.usefixtures("no_sync")
def test_a_damaged_header_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    a_log(path)
    content = path.read_bytes()
    header = content.index(b"\n") + 1
    for position in range(header):
        damaged = bytearray(content)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert Study.open(path, IDENTITY).trials == ()
        assert path.read_bytes() == content[:header]


def test_lines_may_come_in_any_order_but_once(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    written = a_log(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[3], lines[1]]))
    study = Study.open(path, IDENTITY)
    assert list(study.trials) == [written[0], written[2]]
    assert (1 in study, 2 in study) == (False, True)
    assert study[2] == written[2]
    path.write_bytes(b"".join([lines[0], lines[1], lines[2], lines[2]]))
    assert list(Study.open(path, IDENTITY).trials) == written[:2]


def test_another_identity_is_refused_and_the_log_kept(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    a_log(path)
    content = path.read_bytes()
    with pytest.raises(BMMError, match="belongs to another search"):
        Study.open(path, {**IDENTITY, "seed": 1})
    assert path.read_bytes() == content


def test_a_trial_is_logged_once_and_by_a_single_writer(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    first = Study.open(path, IDENTITY)
    second = Study.open(path, IDENTITY)
    second.append(a_trial(0))
    content = path.read_bytes()
    with pytest.raises(BMMError, match="another process"):
        first.append(a_trial(0))
    with pytest.raises(BMMError, match="is in the study"):
        second.append(a_trial(0))
    assert path.read_bytes() == content


def test_a_full_disk_loses_no_earlier_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "study.jsonl"
    a_log(path)
    content = path.read_bytes()
    study = Study.open(path, IDENTITY)
    with monkeypatch.context() as patch:

        def full(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left"):
            study.append(a_trial(3))
    assert path.read_bytes() == content
    study.append(a_trial(3))
    assert len(Study.open(path, IDENTITY).trials) == 4


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"study\.jsonl"):
        Study.open(tmp_path / "file" / "study.jsonl", IDENTITY)


def test_every_append_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study.open(tmp_path / "study.jsonl", IDENTITY)
    sizes: list[int] = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (sizes.append(os.fstat(number).st_size), sync(number)))
    study.append(a_trial(0))
    assert sizes == [study.path.stat().st_size]


def test_best_is_the_earliest_of_the_highest(tmp_path: Path) -> None:
    study = Study.open(tmp_path / "study.jsonl", IDENTITY)
    assert study.best is None
    for index, objective in enumerate([0.1, None, 0.9, 0.9, 0.2]):
        study.append(a_trial(index, objective))
    assert study.best == study.trials[2]
    assert best_of(study.trials[:2]) == study.trials[0]


def test_settings_with_task_weights_are_read_back_as_the_space_makes_them(tmp_path: Path) -> None:
    space = Space(("model",), (-4.0, 2.0), (0.9, 1.1), task_weights=(0.5, 2.0), tasks=("news", "älter", "mail"))
    point = (0.5, 0.5, 0.1, 0.6, 0.9)
    study = Study.open(tmp_path / "log", IDENTITY)
    study.append(dataclasses.replace(a_trial(0), settings=space.decode(point), point=point))
    read = Study.open(tmp_path / "log", IDENTITY).trials
    assert read == study.trials
    assert inside(space, read) == list(read)
