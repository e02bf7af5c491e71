"""A trial's weights from cached factors, against a factorisation and a solve: at ViT-B's sizes.

Per input of `d` features and the maps that read it: ours is `W_a + (P / (s + λ̄)) Uᵀ` in float32 from float64 factors
(`Posterior.near_mean`); the other is what a search without cached factors would do in every trial, a Cholesky
factorisation of `ΣG + λ̄ I` and its triangular solves, float64. The exact product, which makes what is published, and an
interpolation in `log λ` between exact solutions stand beside them, with their errors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.measuring import by_turns, ratio, seconds

LAYERS = 12
ROWS = 4 * 256
"""Validation rows in a trial: four tasks of 256."""
GROUPS = {"q, k and v": (768, (768, 768, 768)), "attention out": (768, (768,)), "fc1": (768, (3072,))}
GROUPS |= {"fc2": (3072, (768,))}
NODES = 25
"""Exact solutions between which is interpolated: a quarter of a decade apart over log10 λ from −4 to 2."""


def measure(*, quick: bool) -> dict[str, Any]:
    """Return the ratios at d = 768 and 3072, and the share of a trial that assembly takes."""
    import torch

    from bmm.threads import one_thread

    torch.manual_seed(0)
    with one_thread():
        groups = {}
        for name, (size, outputs) in GROUPS.items():
            if not quick or size < 1000:
                groups[name] = _group(size, outputs, 2 if quick else 5)
        found: dict[str, Any] = {"groups": groups}
        worst = max(groups.values(), key=lambda one: one["ratio"]["median"])
        found |= {"trial_vs_refactorise": worst["ratio"]["median"], "spread": worst["ratio"]}
        if not quick:
            found["share_of_trial"] = _share(groups)
    return found


def _group(size: int, outputs: tuple[int, ...], repetitions: int) -> dict[str, Any]:
    import torch

    from bmm.regression.posterior import decompose, factor

    # A spectrum that falls by six decades, as real inputs' do.
    turned, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    gram = (turned * torch.logspace(0, -6, size, dtype=torch.float64)) @ turned.T
    spectrum = decompose((gram + gram.T) / 2, where="a made-up input")
    anchors = [0.02 * torch.randn(out, size, dtype=torch.float64) for out in outputs]
    pulls = [0.01 * torch.randn(out, size, dtype=torch.float64) @ gram for out in outputs]
    posteriors = [factor(spectrum, anchor, pull) for anchor, pull in zip(anchors, pulls, strict=True)]
    settings = iter(10.0 ** (-4 + 6 * (index * 0.618 % 1)) for index in range(1000))

    def again(lam: float) -> list[Any]:
        ridge = lam * spectrum.trace / size
        lower = torch.linalg.cholesky(gram + ridge * torch.eye(size, dtype=torch.float64))
        return [
            (anchor + torch.cholesky_solve(pull.T, lower).T).to(torch.float32)
            for anchor, pull in zip(anchors, pulls, strict=True)
        ]

    def timed(work: Callable[[float], object]) -> Callable[[], float]:
        def once() -> float:
            lam = next(settings)
            return seconds(lambda: work(lam))

        return once

    taken = by_turns(
        {
            "ours": timed(lambda lam: [one.near_mean(lam) for one in posteriors]),
            "exact": timed(lambda lam: [one.mean(lam) for one in posteriors]),
            "again": timed(again),
        },
        repetitions,
    )
    lam = 0.03
    exact, anchor = posteriors[0].mean(lam), anchors[0]
    return {
        "size": size,
        "outputs": outputs,
        "ratio": ratio(taken["ours"], taken["again"]),
        "exact_ratio": ratio(taken["exact"], taken["again"]),
        "seconds": taken,
        "error": _relative(posteriors[0].near_mean(lam).double() - exact, exact - anchor),
        "refactorised_error": _relative(again(lam)[0].double() - exact, exact - anchor),
        "interpolation": _interpolated(posteriors[0]),
    }


def _interpolated(posterior: Any) -> dict[str, float]:
    """Return the seconds and the error of cubic interpolation in log λ, and what holding its nodes takes."""
    import torch

    # What depends on λ is one factor for each direction, so the error is known without solving at the nodes.
    values, size = posterior.spectrum.eigenvalues, posterior.spectrum.eigenvalues.numel()
    step = 6 / (NODES - 1)

    def factors(log10: float) -> Any:
        return 1.0 / (values + 10.0**log10 * posterior.spectrum.trace / size)

    worst = 0.0
    for place in torch.linspace(-3.5, 1.5, 41).tolist():
        first = -4 + step * (int((place + 4) / step) - 1)
        nodes = [first + step * index for index in range(4)]
        weights = [_product((place - other) / (node - other) for other in nodes if other != node) for node in nodes]
        near = sum(weight * factors(node) for weight, node in zip(weights, nodes, strict=True))
        error = posterior.projection * (near - factors(place))
        worst = max(worst, float(error.norm() / (posterior.projection * factors(place)).norm()))
    held = [posterior.anchor.to(torch.float32) for _ in range(4)]
    taken = min(seconds(lambda: held[0] * 0.1 + held[1] * 0.4 + held[2] * 0.4 + held[3] * 0.1) for _ in range(3))
    return {"seconds_a_map": taken, "largest_error": worst, "float32_models_in_memory": float(NODES)}


def _share(groups: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of a whole ViT-B's assembly over those of a trial's evaluation, one thread."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=LAYERS, num_attention_heads=12, patch_size=32
    )
    model = CLIPVisionModel(config).eval()
    images = torch.randn(32, 3, 224, 224)
    with torch.inference_mode():
        forward = min(seconds(lambda: model(pixel_values=images)) for _ in range(3)) / 32 * ROWS
    assembly = LAYERS * sum(min(one["seconds"]["ours"]) for one in groups.values())
    return {"assembly_seconds": assembly, "evaluation_seconds": forward, "share": assembly / forward, "rows": ROWS}


def _relative(error: Any, wanted: Any) -> float:
    return float(error.norm() / wanted.norm())


def _product(values: Any) -> float:
    total = 1.0
    for value in values:
        total *= value
    return total
