from __future__ import annotations

import pytest

from bmm.progress import Bar, progress, reporting, tell


class Recording:
    """A reporter and its bars in one, which keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[object, ...]] = []

    def start(self, text: str, total: float, unit: str = "") -> Bar:
        self.said.append(("start", text, total, unit))
        return self

    def tell(self, text: str) -> None:
        self.said.append(("tell", text))

    def finish(self, bar: Bar) -> None:
        assert bar is self
        self.said.append(("finish",))

    def advance(self, steps: float = 1.0) -> None:
        self.said.append(("advance", steps))

    def describe(self, text: str) -> None:
        self.said.append(("describe", text))


def test_a_bar_goes_to_the_reporter_of_the_block() -> None:
    recording = Recording()
    with reporting(recording), progress("counting", 3, "rows") as bar:
        bar.advance()
        bar.advance(2)
        bar.describe("counted")
        tell("a worker was lost")
    assert recording.said == [
        ("start", "counting", 3, "rows"),
        ("advance", 1.0),
        ("advance", 2),
        ("describe", "counted"),
        ("tell", "a worker was lost"),
        ("finish",),
    ]


def test_a_bar_is_closed_when_its_work_fails() -> None:
    recording = Recording()
    with pytest.raises(ValueError, match="no"), reporting(recording), progress("trying", 1):
        raise ValueError("no")
    assert recording.said[-1] == ("finish",)


def test_the_inner_reporter_wins_and_nobody_is_told_after_the_block() -> None:
    outer, inner = Recording(), Recording()
    with reporting(outer):
        with reporting(inner), progress("inside", 1):
            pass
        with progress("outside", 1):
            pass
    with progress("after", 1) as bar:
        bar.advance()
        bar.describe("silence")
    tell("nobody")
    assert [entry[1] for entry in inner.said if entry[0] == "start"] == ["inside"]
    assert [entry[1] for entry in outer.said if entry[0] == "start"] == ["outside"]
