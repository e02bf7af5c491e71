from __future__ import annotations

import platform

import psutil
import pytest
import torch

from bmm.memory import MANY, _trim, give_back

# Below the size from which the C library asks the system for each piece on its own.
PIECE = 2**14
PIECES = 4096


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to give memory back")
def test_what_lies_between_pieces_in_use_goes_back_to_the_system() -> None:
    give_back(MANY)
    before = _resident()
    pieces = [torch.ones(PIECE // 4) for _ in range(PIECES)]
    kept = pieces[::64]
    del pieces
    held = _resident() - before
    assert held > PIECE * PIECES // 2
    # Little is not worth the way, much is.
    give_back(MANY // 2)
    assert _resident() - before > held // 2
    give_back(MANY // 2)
    assert _resident() - before < held // 4
    assert all(bool(piece.all()) for piece in kept)


@pytest.mark.parametrize("system", ["darwin", "linux"])
def test_elsewhere_nothing_happens(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", system)
    # A C library without the function, as musl is.
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    _trim.cache_clear()
    try:
        give_back(MANY)
    finally:
        _trim.cache_clear()
