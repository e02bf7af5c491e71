"""The merged model's Hugging Face card, README.md: how to load it, metrics, experts, recipe, limits.

The text is Markdown, laid out in card.md.j2; it is returned, not written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from bmm.kinds.settings import DEFAULT_KIND
from bmm.report import findings, notation
from bmm.report.findings import Document
from bmm.report.page import SOURCE_KEYS, environment, known, recipe_yaml, task_rows

FOLDER_PLACEHOLDER = "path/to/this/folder"
TAGS = ("merge", "bayesian-model-merging")

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?$")


def model_card(document: Document) -> str:
    """Return the model card as Markdown; its one Python block runs once `FOLDER_PLACEHOLDER` is replaced."""
    experts = [known(expert, SOURCE_KEYS) for expert in document.get("experts") or []]
    view = {
        "front_matter": front_matter(document),
        "opening": findings.opening(document),
        "method": findings.method(document),
        "regressed": findings.strength_rule(document) != "none",
        "searched": findings.strength_rule(document) == "search",
        "warnings": findings.warnings(document),
        "folder": FOLDER_PLACEHOLDER,
        "task": ascii(experts[0]["name"]) if experts else "''",
        "own_tokens": any(expert.get("own_tokens") for expert in document.get("experts") or []),
        "own_tokenizer": any(expert.get("own_tokenizer") for expert in document.get("experts") or []),
        # How to load a model of one kind, shown for the first expert.
        "kind": _loaded_as(str(experts[0]["task"] or DEFAULT_KIND)) if experts else DEFAULT_KIND,
        "rows": task_rows(document, "test"),
        "shares": {role: findings.share(document, role) for role in ("base", "anchor", "merged")},
        "confidence": findings.confidence(document),
        "anchor": notation.method_label(document.get("anchor", {}).get("method", "anchor")),
        "methods": findings.methods(document),
        "treatments": findings.treatments(document),
        "base": known(document.get("base") or {}, SOURCE_KEYS),
        "experts": experts,
        "data": document.get("data") or {},
        "recipe": recipe_yaml(document),
        "recipe_digest": document.get("recipe_digest"),
    }
    made = environment(autoescape=False)
    made.filters["cell"] = cell
    return made.get_template("card.md.j2").render(view)


def _loaded_as(kind: str) -> str:
    """Return the kind whose models are loaded as those of this kind are."""
    return "causal-lm" if kind == "lm-eval" else kind


def front_matter(document: Document) -> str:
    """Return the card's YAML front matter, without its dashes.

    `license` is the one that all experts (and the base, where its licence is known) share, else `other`.
    `base_model` is given only for a base that has a hub id: a folder on one machine names nothing on another.
    """
    values: dict[str, Any] = {"license": common_licence(document)}
    if values["license"] == "other":
        values["license_name"] = "see-experts"
    source = hub_id(document.get("base") or {})
    if source is not None:
        values["base_model"] = source
        values["base_model_relation"] = "merge"
    kinds = sorted({str(expert["task"]) for expert in document.get("experts") or [] if expert.get("task")})
    if len(kinds) == 1:
        # As the hub calls it.
        values["pipeline_tag"] = "text-generation" if _loaded_as(kinds[0]) == "causal-lm" else kinds[0]
    values["library_name"] = "transformers"
    values["tags"] = list(TAGS)
    values["metrics"] = sorted({str(entry.get("metric", "accuracy")) for entry in findings.tasks(document).values()})
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return text


def common_licence(document: Document) -> str:
    """Return the licence that every expert is known to have, or "other" where one is unknown or differs."""
    known = [expert.get("license") for expert in document.get("experts") or []]
    base = document.get("base") or {}
    if base.get("license") is not None:
        known.append(base["license"])
    if known and all(known) and len(set(known)) == 1:
        return str(known[0])
    return "other"


def hub_id(entry: Mapping[str, Any]) -> str | None:
    """Return `org/name` when a base or expert came from a hub, else None.

    An entry that records its revision says so itself (null for a folder); else the source's form decides.
    """
    source = str(entry.get("source") or "")
    if not _HUB_ID.match(source) or ("revision" in entry and entry["revision"] is None):
        return None
    return source.partition("@")[0]


def cell(value: Any) -> str:
    """Return text that cannot leave its Markdown table cell or begin markup."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)
