"""What a task file of lm-evaluation-harness may say: every key that is known to run, fetch and draw nothing.

Lives here: the words, and refusing others. Does not live here: reading the file (`bmm.kinds.lm_eval_file`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bmm.errors import DataError

# By what a task asks of a model: the metrics that have a figure for each document, in the harness's words, and how
# the harness makes one figure of them. Others (f1, bleu, …) are computed of all documents at once.
METRICS: Mapping[str, Mapping[str, str]] = {
    "multiple_choice": dict.fromkeys(("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"), "mean"),
    "loglikelihood": {"acc": "mean", "perplexity": "perplexity"},
    "loglikelihood_rolling": {"word_perplexity": "weighted_perplexity", "byte_perplexity": "weighted_perplexity"},
    "generate_until": {"exact_match": "mean"},
}
_BUILDERS = ("json", "csv", "parquet")
_FILTERS = frozenset(
    {
        "lowercase", "uppercase", "map", "format_span", "take_first", "take_first_k", "majority_vote", "regex",
        "regex_pos", "remove_whitespace", "multi_choice_regex",
    }
)  # fmt: skip
# Of what transformers calls generation: everything about how much is said, nothing that draws or loads something.
_GENERATION = frozenset(
    {
        "until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks", "max_new_tokens", "max_tokens",
        "max_completion_tokens", "num_beams", "length_penalty", "repetition_penalty", "no_repeat_ngram_size",
    }
)  # fmt: skip
METRIC_KEYS = frozenset(
    {
        "metric", "aggregation", "higher_is_better", "hf_evaluate", "regexes_to_ignore", "ignore_case",
        "ignore_punctuation", "ignore_numbers",
    }
)  # fmt: skip
# What a file may say, and what of it decides how documents are put to a model and what the answers are worth.
ASKS = frozenset(
    {
        "output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "description", "target_delimiter",
        "fewshot_delimiter", "fewshot_split", "fewshot_config", "num_fewshot", "gen_prefix", "generation_kwargs",
        "training_split", "validation_split",
    }
)  # fmt: skip
_DATA = frozenset({"dataset_path", "dataset_name", "dataset_kwargs", "test_split"})
_WORDS = frozenset({"task", "task_alias", "tag", "metadata", "should_decontaminate", "doc_to_decontamination_query"})
_MEASURES = frozenset({"metric_list", "filter_list", "repeats"})
_FEWSHOT = frozenset(
    {
        "sampler", "split", "samples", "fewshot_indices", "doc_to_text", "doc_to_choice", "doc_to_target",
        "gen_prefix", "fewshot_delimiter", "target_delimiter",
    }
)  # fmt: skip


def check(where: str, config: Mapping[str, Any]) -> None:
    """Refuse a task that would run something, fetch something, or draw something, and what is of another shape.

    Raises:
        DataError: one sentence; begins with `where`.
    """
    if "group" in config or isinstance(config.get("task"), list):
        raise DataError(f"{where} is a group of tasks; name the file of one task")
    known = ASKS | _DATA | _WORDS | _MEASURES
    if config.get("unsafe_code"):
        raise DataError(f"{where}: a task with 'unsafe_code' runs what a model writes, which is not done here")
    for key, value in config.items():
        if key not in known and key != "unsafe_code" and value not in (None, False):
            raise DataError(
                f"{where}: the key '{key}' is not taken, since it may run code, load something or mean nothing here; "
                "remove it, or prepare the data beforehand"
            )
    _check_data(where, config)
    if config.get("output_type", "generate_until") not in METRICS:
        raise DataError(f"{where}: 'output_type' has to be one of {', '.join(METRICS)}")
    for key, kinds in (("doc_to_text", (str, int)), ("doc_to_target", (str, int, list))):
        if not isinstance(config.get(key), kinds):
            raise DataError(f"{where}: '{key}' has to be a column or a Jinja template; add it")
    if not isinstance(config.get("doc_to_choice"), str | list | dict | None):
        raise DataError(f"{where}: 'doc_to_choice' has to be a column, a Jinja template or a list of texts")
    if config.get("output_type") == "multiple_choice" and not config.get("doc_to_choice"):
        raise DataError(f"{where}: a task of multiple_choice needs 'doc_to_choice'; add it")
    _check_fewshot(where, config)
    _check_generation(where, config)
    _check_measures(where, config)


def _check_data(where: str, config: Mapping[str, Any]) -> None:
    path, options = config.get("dataset_path"), config.get("dataset_kwargs")
    if path not in _BUILDERS:
        raise DataError(
            f"{where}: 'dataset_path' is '{path}', which would be fetched or run; only local files are read: set it to "
            f"one of {', '.join(_BUILDERS)} and name them in dataset_kwargs.data_files"
        )
    files = options.get("data_files") if isinstance(options, dict) else None
    if not files or not all(
        isinstance(one, str) or (isinstance(one, list) and one and all(isinstance(name, str) for name in one))
        for one in (files.values() if isinstance(files, dict) else [files])
    ):
        raise DataError(f"{where}: dataset_kwargs.data_files has to name the files of each split; add it")
    assert isinstance(options, dict)  # noqa: S101 - it has files
    if more := sorted(key for key, value in options.items() if key != "data_files" and value not in (None, False)):
        raise DataError(f"{where}: dataset_kwargs takes data_files alone; remove '{more[0]}'")


def _check_fewshot(where: str, config: Mapping[str, Any]) -> None:
    settings = config.get("fewshot_config") or {}
    if not isinstance(settings, dict) or (odd := sorted(set(settings) - _FEWSHOT)):
        raise DataError(
            f"{where}: 'fewshot_config' takes {', '.join(sorted(_FEWSHOT))}; remove {odd[0] if odd else 'it'}"
        )
    if settings.get("sampler", "default") not in ("default", "first_n"):
        raise DataError(f"{where}: fewshot_config.sampler has to be default or first_n")
    samples = settings.get("samples", [])
    if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
        raise DataError(f"{where}: fewshot_config.samples has to be a list of examples")
    number = config.get("num_fewshot")
    if number is not None and (not isinstance(number, int) or number < 0):
        raise DataError(f"{where}: 'num_fewshot' has to be a whole number, 0 or more")


def _check_generation(where: str, config: Mapping[str, Any]) -> None:
    settings = config.get("generation_kwargs") or {}
    if not isinstance(settings, dict) or (odd := sorted(set(settings) - _GENERATION)):
        raise DataError(
            f"{where}: 'generation_kwargs' takes {', '.join(sorted(_GENERATION))}; remove {odd[0] if odd else 'it'}"
        )
    if settings.get("do_sample") or (settings.get("do_sample") is None and float(settings.get("temperature") or 0)):
        raise DataError(f"{where}: answers would be drawn at random; set generation_kwargs.do_sample to false")
    if config.get("repeats") not in (None, 1):
        raise DataError(f"{where}: 'repeats' asks for several answers, which would all be the same; remove it")


def _check_measures(where: str, config: Mapping[str, Any]) -> None:
    metrics, filters = config.get("metric_list") or [], config.get("filter_list") or []
    if not isinstance(metrics, list) or not all(
        isinstance(m, dict) and isinstance(m.get("metric"), str) for m in metrics
    ):
        raise DataError(f"{where}: 'metric_list' has to be a list of mappings with the key 'metric'")
    steps = [
        step
        for entry in (filters if isinstance(filters, list) else [None])
        for step in (entry.get("filter") or [None] if isinstance(entry, dict) and "name" in entry else [None])
    ]
    if not all(isinstance(step, dict) and step.get("function") in _FILTERS for step in steps):
        raise DataError(
            f"{where}: 'filter_list' has to be a list of named lists of filters, of {', '.join(sorted(_FILTERS))}"
        )
