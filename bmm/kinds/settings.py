"""What a recipe says of a task, one class for each kind, and what of it decides how a model reads a row.

Words only: reading rows and running models is each kind's own module, which kind a model is for `model_classes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from bmm.part import Part

DEFAULT_KIND = "text-classification"
SPLITS = {"calibration", "validation", "test", "unlabelled"}
# The file that says how images become pixel values, and sounds features.
PROCESSOR = "preprocessor_config.json"
# The settings that name a column of files.
FILES = ("image", "audio")


class SplitSource(Part):
    """Rows of one split, as `datasets.load_dataset` is asked for them, and how many of them to take.

    `path` is a builder (`json`, `csv`, `parquet`, `text`, `imagefolder`, `audiofolder`), a folder saved on disk, or a
    hub id; `rows` takes a seeded sample of that size, in file order; without it every row is used. `skip` leaves out
    the first rows of the order that the seed draws from, so that two samples of one split share no row.
    """

    path: str
    name: str | None = None
    data_files: str | list[str] | None = None
    split: str = "train"
    revision: str | None = None
    rows: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    skip: int = Field(default=0, ge=0, description="rows of the seed's order to leave out before the sample")

    @property
    def labelled(self) -> bool:
        """Whether rows have a label."""
        return True


class UnlabelledSource(SplitSource):
    """Rows without a label, or whose label is not read."""

    @property
    def labelled(self) -> bool:
        """Whether rows have a label."""
        return False


ClassMetric = Annotated[
    Literal["accuracy", "f1", "f1-macro", "matthews"],
    Field(description="f1 is that of class 1; matthews is the correlation coefficient of two or more classes"),
]


class _Task(Part):
    calibration: SplitSource | None = Field(default=None, description="rows that show what the expert reads")
    validation: SplitSource | None = Field(default=None, description="rows that the search is steered by")
    test: SplitSource | None = Field(default=None, description="rows that are looked at once, at the end")

    def splits(self) -> dict[str, SplitSource]:
        """Return the splits that there are, by name, in a fixed order."""
        named = {"calibration": self.calibration, "validation": self.validation, "test": self.test}
        return {name: source for name, source in named.items() if source is not None}


class _Classes(_Task):
    unlabelled: UnlabelledSource | None = Field(
        default=None, description="rows without labels that the search is steered by where its objective is agreement"
    )
    metric: ClassMetric = "accuracy"

    def splits(self) -> dict[str, SplitSource]:
        """Return the splits that there are, by name, in a fixed order."""
        return super().splits() | ({} if self.unlabelled is None else {"unlabelled": self.unlabelled})


class TextClassification(_Classes):
    """One text (or pair of texts) a row, one label out of a fixed set."""

    kind: Literal["text-classification"] = "text-classification"
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    max_length: int = Field(default=128, ge=4, description="tokens a row, longer rows are cut")


# Every kind but the default must be named, so that in the published schema exactly one fits.
class ImageClassification(_Classes):
    """One image a row, one label out of a fixed set."""

    kind: Literal["image-classification"]
    image: str = Field(
        default="image", description="the column of images, or of their paths relative to the recipe's folder"
    )
    label: str = "label"


class AudioClassification(_Classes):
    """One sound a row, one label out of a fixed set."""

    kind: Literal["audio-classification"]
    audio: str = Field(
        default="audio", description="the column of sound files, or of their paths relative to the recipe's folder"
    )
    label: str = "label"
    max_seconds: float = Field(default=30, gt=0, description="of a row, longer sounds are cut")


class TokenClassification(_Task):
    """A list of words a row, and a class for each of them."""

    kind: Literal["token-classification"]
    words: str = Field(default="tokens", description="the column of lists of words")
    label: str = Field(default="tags", description="the column of lists of classes, by name or number")
    max_length: int = Field(default=128, ge=4, description="tokens a row; words behind them are not read")
    metric: Literal["span-f1", "accuracy"] = Field(
        default="span-f1", description="of whole spans, tagged as in IOB2, BIOES or BILOU; or the share of right words"
    )


class TextRegression(_Task):
    """One text (or pair of texts) a row and one number."""

    kind: Literal["text-regression"]
    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    max_length: int = Field(default=128, ge=4, description="tokens a row, longer rows are cut")
    metric: Literal["pearson", "spearman"] = "pearson"


class ZeroShotImageClassification(_Classes):
    """One image a row and one of the classes that are named here, compared with what the base makes of their names."""

    kind: Literal["zero-shot-image-classification"]
    image: str = Field(
        default="image", description="the column of images, or of their paths relative to the recipe's folder"
    )
    label: str = "label"
    classes: tuple[str, ...] = Field(min_length=2, description="what the classes are called, in the order of their ids")
    templates: tuple[str, ...] = Field(
        default=("a photo of a {}.",), min_length=1, description="sentences around a class's name, which replaces {}"
    )

    @field_validator("classes")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a class is named twice; give each its own name")
        return value

    @field_validator("templates")
    @classmethod
    def _with_place(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if odd := [template for template in value if "{}" not in template]:
            raise ValueError(f"the template '{odd[0]}' has no {{}} where the class's name goes")
        return value


class CausalLM(_Task):
    """Running text, or a prompt and its answer a row; the whole language model is merged."""

    kind: Literal["causal-lm"]
    text: str = Field(default="text", description="the column of running text, where there are no prompts")
    prompt: str | None = Field(default=None, description="the column of prompts, each up to the answer's first letter")
    answer: str | None = Field(default=None, description="the column of answers to the prompts; only they are measured")
    max_length: int = Field(default=512, ge=4, description="tokens a row, longer ones are cut")
    metric: Literal["likelihood", "exact-match"] = Field(
        default="likelihood", description="exp(-NLL) of a token; or the share of prompts answered word for word"
    )
    max_new_tokens: int = Field(default=32, ge=1, description="of an answer, for exact-match")
    stop: str | None = Field(default=None, min_length=1, description="a text at which an answer ends, for exact-match")

    @model_validator(mode="after")
    def _answered(self) -> Self:
        if (self.prompt is None) != (self.answer is None):
            raise ValueError("prompt and answer name two columns that belong together; name both or neither")
        if self.metric == "exact-match" and self.prompt is None:
            raise ValueError("exact-match needs the columns prompt and answer; name them, or measure likelihood")
        return self


class Seq2SeqLM(_Task):
    """A text and the answer to it a row, for an encoder-decoder; the whole model is merged."""

    kind: Literal["seq2seq-lm"]
    prompt: str = Field(default="prompt", description="the column of texts that the encoder reads")
    answer: str = Field(default="answer", description="the column of texts that the decoder is to write")
    max_length: int = Field(default=512, ge=4, description="tokens of a prompt, longer ones are cut")
    max_answer_length: int = Field(default=128, ge=2, description="tokens of an answer, longer ones are cut")
    metric: Literal["likelihood", "exact-match"] = Field(
        default="likelihood", description="exp(-NLL) of an answer's token; or the share answered word for word"
    )
    max_new_tokens: int = Field(default=32, ge=1, description="of an answer, for exact-match")


class LmEvalSplit(Part):
    """Rows of one of the splits that the task's file names, and how many of them to take."""

    split: str | None = Field(
        default=None, min_length=1, description="a split of the file's data_files; by default train, validation, test"
    )
    rows: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    skip: int = Field(default=0, ge=0, description="rows of the seed's order to leave out before the sample")


class LmEval(Part):
    """A task of lm-evaluation-harness in a local file, and splits of its data; the whole language model is merged."""

    kind: Literal["lm-eval"]
    file: str = Field(min_length=1, description="the task's YAML file; its data files' paths are relative to it")
    metric: (
        Literal[
            "acc",
            "acc_norm",
            "acc_bytes",
            "acc_mutual_info",
            "exact_match",
            "perplexity",
            "word_perplexity",
            "byte_perplexity",
        ]
        | None
    ) = Field(default=None, description="one of the file's metric_list, without it the first of these in the list")
    filter: str | None = Field(default=None, description="one of the file's filter_list, without it the first")
    num_fewshot: int | None = Field(default=None, ge=0, description="examples before a prompt, instead of the file's")
    fewshot_seed: int = Field(default=1234, ge=0, description="of the draw of examples; 1234 is the harness's own")
    max_length: int = Field(
        default=2048, ge=4, description="tokens a row, or as many as the model reads; longer ones lose their beginning"
    )

    calibration: LmEvalSplit | None = Field(default=None, description="rows that show what the expert reads")
    validation: LmEvalSplit | None = Field(default=None, description="rows that the search is steered by")
    test: LmEvalSplit | None = Field(default=None, description="rows that are looked at once, at the end")

    def splits(self) -> dict[str, SplitSource]:
        """Return the splits that there are, by name, in a fixed order; their `path` is the task's file."""
        named = {"calibration": self.calibration, "validation": self.validation, "test": self.test}
        own = {"calibration": "train", "validation": "validation", "test": "test"}
        return {
            name: SplitSource(
                path=self.file, split=part.split or own[name], rows=part.rows, seed=part.seed, skip=part.skip
            )
            for name, part in named.items()
            if part is not None
        }


def _with_kind(value: Any) -> Any:
    return {"kind": DEFAULT_KIND, **value} if isinstance(value, dict) else value


Task = Annotated[
    Annotated[
        TextClassification
        | TextRegression
        | TokenClassification
        | ImageClassification
        | ZeroShotImageClassification
        | AudioClassification
        | CausalLM
        | Seq2SeqLM
        | LmEval,
        Field(discriminator="kind"),
    ],
    BeforeValidator(_with_kind),
]


def counts_right_rows(task: Task | None) -> bool:
    """Say whether a task is worth the share of rows whose one class is right, of which each row has a likelihood."""
    return isinstance(task, _Classes) and task.metric == "accuracy"


# Where a row's parts stand in its file (the rows themselves are known by what they hold), and what answers are worth.
_NOT_READ = frozenset(
    {"text", "text_pair", "label", *FILES, "prompt", "answer", "words", "metric", "num_fewshot", "fewshot_seed"}
)
# What is asked of a model beyond reading rows.
_ASKED = frozenset({"classes", "templates", "max_new_tokens", "stop", "definition", "filter"})


def reading(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a task (as JSON) that decide how a model reads a row: a part of keys.

    Columns, splits and the metric are left out; a setting that is not known to be one of these is kept.
    """
    left_out = _NOT_READ | _ASKED | SPLITS
    return {name: value for name, value in task.items() if name not in left_out}


def asking(task: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a task (as JSON) that decide what its model answers, once it has read a row."""
    asked = _ASKED | {"metric"} if task["kind"] in ("causal-lm", "seq2seq-lm", "lm-eval") else _ASKED
    return {name: value for name, value in task.items() if name in asked}
