from __future__ import annotations

from bmm.notes import (
    other_bases,
    shards_again,
    singular_grams,
    starved_experts,
    unmatched,
    unmeasured,
    unused,
    zero_task_vectors,
)


def norms(**values: float) -> dict[str, dict[str, float]]:
    return {name: {"norm": value} for name, value in values.items()}


def test_a_zero_task_vector_is_named_once_for_all_who_share_it() -> None:
    both = norms(embeddings=0.0, query=1.0)
    assert zero_task_vectors({"news": both, "mail": both}) == [
        "Every expert equals the base in embeddings: no task vector there."
    ]
    assert zero_task_vectors({"news": both, "mail": both, "chat": norms(embeddings=1.0, query=1.0)}) == [
        "news, mail equal the base in embeddings: no task vector there."
    ]
    alone = norms(embeddings=0.0, query=0.0, key=1.0)
    assert zero_task_vectors({"news": alone, "mail": norms(embeddings=1.0, query=1.0, key=2.0)}) == [
        "news equals the base in embeddings and 1 more: no task vector there."
    ]


def test_an_expert_that_is_the_base_is_named() -> None:
    found = zero_task_vectors({"news": norms(query=0.0), "mail": norms(query=1.0)})
    assert found == ["The expert news equals the base in every tensor: its task vector is zero."]


def test_an_adapter_of_another_base_is_named() -> None:
    trained = {"news": None, "mail": "org/Roberta-base", "chat": "/models/bert-base/"}
    assert other_bases(trained, "hub/bert-base@main") == [
        "The adapter mail says that it was trained on 'org/Roberta-base', and was added to 'hub/bert-base@main'."
    ]
    assert other_bases({"mail": "org/roberta-base"}, "./roberta-base") == []


def test_a_singular_gram_names_the_first_parameter_and_only_regressed_ones() -> None:
    regular = {"parameter": "a.weight", "lambda": 0.1, "condition": 3.0}
    anchored = {"parameter": "b.weight", "lambda": None, "condition": None}
    singular = {"parameter": "c.weight", "lambda": 1e-4, "condition": None}
    assert singular_grams([regular, anchored]) == []
    (said,) = singular_grams([regular, anchored, singular, {**singular, "parameter": "c.bias"}])
    assert said.startswith("The Gram matrix behind c.weight and 1 more is singular")


def test_rows_that_are_missing_are_told() -> None:
    assert unmeasured(("validation", "test")) == []
    (said,) = unmeasured(("test",))
    assert "no validation rows" in said
    assert "no test rows" in unmeasured(())[0]


def test_parameters_that_the_base_alone_has_are_named() -> None:
    assert unmatched([]) == []
    assert unmatched(["pooler.weight", "pooler.bias"]) == [
        "Not every expert's model has pooler.weight and 1 more: there the merged model is the base."
    ]


def test_tensors_that_no_model_loads_are_named() -> None:
    assert unused([]) == []
    assert unused(["h.0.attn.bias", "h.1.attn.bias"]) == [
        "Some expert stores h.0.attn.bias and 1 more, which its model does not load: left out."
    ]


def test_experts_of_a_mixture_that_kept_the_anchor_are_counted() -> None:
    reached = {"parameter": "up", "anchored_maps": []}
    starved = {"parameter": "down", "anchored_maps": ["down.0", "down.2"]}
    assert starved_experts([{"parameter": "query"}, reached]) == []
    (note,) = starved_experts([{"parameter": "query"}, reached, starved])
    assert note.startswith("Too few calibration tokens reached 2 matrices of experts of a mixture, the first in down:")


def test_shards_that_were_begun_again_are_counted_over_all_experts() -> None:
    quiet = {"computed": 3, "again": 0, "found": 1}
    assert shards_again({}) == []
    assert shards_again({"news": quiet}) == []
    (note,) = shards_again({"news": quiet, "mail": {"computed": 2, "again": 4, "found": 0}})
    assert note.startswith("Of the 5 shards of Gram matrices that were computed, one had to be begun again 4 times")
