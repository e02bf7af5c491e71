"""How a report writes numbers and the names of methods. What they are is for `bmm.report.findings` to say."""

from __future__ import annotations

from collections.abc import Sequence

_LABELS = {
    "base": "base model, experts' heads",
    "experts": "experts, one a task",
    "merged": "merged (this model)",
    "average": "average",
    "ta": "task arithmetic",
    "ties": "TIES",
    "dare": "DARE",
    "tsv": "TSV-M",
    "iso-c": "Iso-C",
    "iso-cts": "Iso-CTS",
    "wudi": "WUDI",
    "regmean": "RegMean",
    "fisher": "Fisher",
    "ace": "ACE",
    "checkpoint": "given checkpoint",
}


def number(value: float | None) -> str:
    """Return a fraction as per cent with one decimal and no sign: `0.982` is "98.2"; None is a dash."""
    return "–" if value is None else f"{100 * value:.1f}"


def percent(value: float | None) -> str:
    """Return a fraction in 0..1 as per cent with its sign: "98.2 %"."""
    return f"{number(value)} %"


def interval_text(interval: Sequence[float] | None) -> str:
    """Return an interval of fractions in per cent, "97.4–99.0", or nothing where there is none."""
    return "" if interval is None else f"{number(interval[0])}–{number(interval[1])}"


def percent_with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    """Return "98.2 % (97.4–99.0)", without the brackets where there is no interval."""
    return percent(value) + (f" ({interval_text(interval)})" if interval is not None else "")


def points(difference: float | None) -> str:
    """Return a difference of fractions in signed percentage points: `-0.012` is "−1.2"."""
    if difference is None:
        return "–"
    shown = f"{100 * difference:+.1f}".replace("-", "−")
    return "0.0" if shown in ("+0.0", "−0.0") else shown


def decimals(value: float, digits: int, *, signed: bool = False) -> str:
    """Return a number that is no fraction to some decimals, with a minus and no hyphen: `-0.597` is "−0.597"."""
    return f"{value:{'+' if signed else ''}.{digits}f}".replace("-", "−")


def lambda_text(value: float | None) -> str:
    """Return a prior strength to two digits; None, which stands for infinity, is "∞ (anchor)"."""
    return "∞ (anchor)" if value is None else f"{value:.2g}"


def method_label(method: str) -> str:
    """Return the name that the literature uses for a method of merge.json."""
    return _LABELS.get(method, method)
