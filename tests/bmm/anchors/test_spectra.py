from __future__ import annotations

import pytest
import torch

from bmm.anchors import spectra
from bmm.anchors.spectra import leading_triplets, polar_factor


def matrix(shape: tuple[int, int], decades: float, rank: int | None = None, seed: int = 0) -> torch.Tensor:
    """A matrix whose singular values fall evenly over so many decades, and are zero beyond its rank."""
    generator = torch.Generator().manual_seed(seed)
    least = min(shape)
    left, _ = torch.linalg.qr(torch.randn(shape[0], least, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], least, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -decades, least, dtype=torch.float64)
    values[rank or least :] = 0
    return (left * values) @ right.T


SHAPES = [(40, 40), (30, 55), (55, 30)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("decades", "rank", "most"), [(2, None, 10), (2, None, 99), (1, 7, 20), (9, None, 99), (0, 5, 5)]
)
def test_one_side_gives_what_the_whole_decomposition_gives(
    shape: tuple[int, int], decades: float, rank: int | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = matrix(shape, decades, rank)
    whole, isometry = leading_triplets(given, most), polar_factor(given)
    monkeypatch.setattr(spectra, "LARGE", 1)
    one_sided, nearest = leading_triplets(given, most), polar_factor(given)
    assert [part.shape for part in one_sided] == [part.shape for part in whole]
    for left, values, right in (whole, one_sided):
        rank_found = values.numel()
        torch.testing.assert_close(left.T @ left, torch.eye(rank_found, dtype=torch.float64), rtol=0, atol=1e-7)
        torch.testing.assert_close(right.T @ right, torch.eye(rank_found, dtype=torch.float64), rtol=0, atol=1e-7)
    torch.testing.assert_close(one_sided[1], whole[1], rtol=1e-7, atol=0)
    if decades:
        products = [(left * values) @ right.T for left, values, right in (whole, one_sided)]
        torch.testing.assert_close(*products, rtol=0, atol=1e-9)
    torch.testing.assert_close(nearest, isometry, rtol=0, atol=1e-7)


def test_directions_too_small_for_one_side_are_decomposed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "LARGE", 1)
    left, values, right = leading_triplets(matrix((40, 30), 5), 30)
    assert values.numel() == 30
    torch.testing.assert_close(left.T @ left, torch.eye(30, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(right.T @ right, torch.eye(30, dtype=torch.float64), rtol=0, atol=1e-12)
