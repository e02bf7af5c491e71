"""Hearing what a person would have been told."""

from __future__ import annotations

from bmm.progress import SilentReporter


class Listening(SilentReporter):
    """Keeps what a person would have been told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def tell(self, text: str) -> None:
        """Keep a sentence."""
        self.told.append(text)
