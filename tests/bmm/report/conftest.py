"""A realistic merge.json, made by a function: four tasks or more, 24 trials, a six-layer encoder."""

from __future__ import annotations

import random
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import pytest

TASKS = ("newsgroups", "reuters", "tweets", "movies")
ANCHORS = ("average", "ta", "ties", "tsv", "wudi", "regmean")
ORIGINS = ("anchor", *["global"] * 7, *["sobol"] * 8, *["bayesian"] * 8)
GROUPS = ("attention-in", "attention-out", "mlp-in", "mlp-out")
LINEAR = {
    "attention.self.query": ("attention-in", [384, 384]),
    "attention.self.key": ("attention-in", [384, 384]),
    "attention.self.value": ("attention-in", [384, 384]),
    "attention.output.dense": ("attention-out", [384, 384]),
    "intermediate.dense": ("mlp-in", [1536, 384]),
    "output.dense": ("mlp-out", [384, 1536]),
}
SHARES = {"average": 0.912, "ta": 0.933, "ties": 0.939, "tsv": 0.964, "wudi": 0.969, "regmean": 0.958}


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def around(value: float, half: float = 0.02) -> list[float]:
    return [round(max(value - half, 0.0), 4), round(min(value + half, 1.0), 4)]


def make_document(names: tuple[str, ...] = TASKS, *, layers: int = 6, trials: int = 24) -> dict[str, Any]:
    """Return a merge.json of these tasks as a finished run would write it."""
    draw = random.Random(7)
    metrics = {split: _metrics(names, draw) for split in ("validation", "test")}
    expert_mean = metrics["test"]["mean"]["expert"]
    base_share = metrics["test"]["mean"]["share_of_experts"]["base"]
    merged_share = metrics["test"]["mean"]["share_of_experts"]["merged"]
    shares = {"base": base_share, **SHARES, "experts": 1.0, "merged": merged_share}
    found = [_trial(index, names, draw) for index in range(trials)]
    best = max(found, key=lambda trial: trial["objective"], default=None)
    return {
        "schema": 1,
        "recipe_digest": digest("recipe"),
        "recipe": {
            "base_model": "./base",
            "experts": [{"name": name, "model": f"./experts/{name}"} for name in names],
            "anchor": {"method": "tsv", "scale": 1.0},
            "search": {"per": "type", "trials": trials, "log10_lambda": [-4.0, 2.0], "gamma": [0.5, 1.5]},
            "evaluation": {"confidence": 0.95, "bootstrap_samples": 2000},
            "output": "./merged",
        },
        "base": {"source": "./base", "digest": digest("base")},
        "experts": [
            {
                "name": name,
                "source": f"./experts/{name}",
                "digest": digest(name),
                "revision": None,
                "task": "text-classification",
                "labels": ["negative", "positive"],
                "license": "apache-2.0",
            }
            for name in names
        ],
        "anchor": {"method": "tsv", "scale": 1.0},
        "metrics": metrics,
        "methods": [
            {
                "method": method,
                "settings": {"scale": 0.3} if method == "ta" else {},
                "tasks": {name: round(0.8 * share, 4) for name in names},
                "mean": round(expert_mean * share, 6),
                "share_of_experts": {"mean": share, "low": share - half, "high": share + half},
            }
            for method, share in shares.items()
            for half in (0.0 if method == "experts" else 0.011,)
        ],
        "coverage": _coverage(layers, draw),
        "search": {
            "per": "type",
            "trials": found,
            "best": best and {key: best[key] for key in ("index", "objective", "settings")},
        },
        "stages": {
            stage: {
                "state": "cached" if stage == "grams" else "ran",
                "seconds": 1.5 + place,
                "key": digest(stage),
            }
            for place, stage in enumerate(("load", "vectors", "grams", "anchor", "search", "evaluate", "publish"))
        },
        "data": {
            name: {
                split: {"rows": rows, "digest": digest(name + split)}
                for split, rows in (("calibration", 256), ("validation", 400), ("test", 600))
            }
            for name in names
        },
        "environment": {"python": "3.11.9", "packages": {"torch": "2.13.0", "numpy": "2.4.6"}, "cpus": 2},
        "peak_rss_bytes": 1_890_000_000,
    }


def _metrics(names: tuple[str, ...], draw: random.Random) -> dict[str, Any]:
    tasks: dict[str, Any] = {}
    for name in names:
        expert = round(draw.uniform(0.68, 0.94), 4)
        values = {
            "base": round(expert - draw.uniform(0.08, 0.2), 4),
            "expert": expert,
            "anchor": round(expert - draw.uniform(0.01, 0.05), 4),
            "merged": round(expert - draw.uniform(-0.006, 0.025), 4),
        }
        intervals = {role: around(value) for role, value in values.items()}
        tasks[name] = {"metric": "accuracy", "rows": 600, **values, "intervals": intervals}
    mean = {role: sum(task[role] for task in tasks.values()) / len(tasks) for role in values}
    share = {role: mean[role] / mean["expert"] for role in ("base", "anchor", "merged")}
    intervals = {"share_of_experts": {role: [value - 0.011, value + 0.011] for role, value in share.items()}}
    return {**tasks, "mean": {**mean, "share_of_experts": share, "intervals": intervals}}


def _trial(index: int, names: tuple[str, ...], draw: random.Random) -> dict[str, Any]:
    origin = ORIGINS[index % len(ORIGINS)]
    low, high = {
        "anchor": (0.968, 0.968),
        "global": (0.955, 0.983),
        "sobol": (0.90, 0.98),
        "bayesian": (0.97, 0.993),
    }[origin]
    return {
        "index": index,
        "origin": origin,
        "state": "complete",
        "settings": {
            group: {
                "lambda": None if origin == "anchor" else 10 ** draw.uniform(-3, 1),
                "gamma": 1.0 if origin in ("anchor", "global") else draw.uniform(0.8, 1.2),
            }
            for group in GROUPS
        },
        "objective": draw.uniform(low, high),
        "tasks": {name: draw.uniform(0.7, 0.9) for name in names},
    }


def _coverage(layers: int, draw: random.Random) -> list[dict[str, Any]]:
    nothing = {"module": None, "lambda": None, "gamma": None, "condition": None}
    strength = {group: 10 ** draw.uniform(-3, 1) for group in GROUPS}
    rows: list[dict[str, Any]] = [
        {
            "parameter": "embeddings.word_embeddings.weight",
            "shape": [30522, 384],
            "treatment": "averaged",
            **nothing,
        }
    ]
    for layer in range(layers):
        for kind, (group, shape) in LINEAR.items():
            name = f"encoder.layer.{layer}.{kind}"
            regressed = {
                "module": group,
                "lambda": strength[group],
                "gamma": 1.05,
                "condition": 10 ** draw.uniform(3, 8),
            }
            if (layer, kind) == (0, "attention.self.key"):
                rows.append({"parameter": f"{name}.weight", "shape": shape, "treatment": "anchored", **nothing})
            else:
                rows.append({"parameter": f"{name}.weight", "shape": shape, "treatment": "regressed", **regressed})
            rows.append({"parameter": f"{name}.bias", "shape": shape[:1], "treatment": "anchored", **nothing})
    rows.append({"parameter": "embeddings.position_ids", "shape": [1, 512], "treatment": "copied", **nothing})
    return rows


@pytest.fixture
def document() -> dict[str, Any]:
    """The example with four tasks."""
    return make_document()


@pytest.fixture
def make() -> Callable[..., dict[str, Any]]:
    """The function that makes an example of other tasks."""
    return make_document
