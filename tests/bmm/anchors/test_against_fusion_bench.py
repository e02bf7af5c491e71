"""Our methods against fusion-bench's, tensor by tensor, on pico BERT checkpoints on disk."""

from __future__ import annotations

import pytest
import torch
from peers.drawn import Drawn
from peers.fusion_bench_runs import fisher, regmean, regmean_plus_plus
from pydantic import TypeAdapter
from safetensors.torch import load_file

from bmm.anchors.interface import Sources
from bmm.anchors.registry import build
from bmm.anchors.settings import AnchorSettings
from bmm.grams.collect import collect
from bmm.modules.linear import discover

EXPERTS = ("expert0", "expert1", "expert2")


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    """A base and three experts, every weight of which has moved."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("berts")
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    model = BertModel(config)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder / "base")
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for index, name in enumerate(EXPERTS):
        torch.manual_seed(index + 1)
        model.load_state_dict({key: tensor + 0.02 * torch.randn_like(tensor) for key, tensor in start.items()})
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def weights(berts, weights_of):
    base, *experts = (load_file(berts / name / "model.safetensors") for name in ("base", *EXPERTS))
    # fusion-bench has one rule for every matrix, embeddings too.
    return weights_of(base, experts, [name for name, tensor in base.items() if tensor.ndim == 2])


@pytest.fixture(scope="module")
def vectors(weights):
    """Task vectors as fusion-bench takes them, in float64."""
    return [{n: expert[n].double() - base.double() for n, base in weights.bases.items()} for expert in weights.experts]


@pytest.fixture(scope="module")
def models(berts):
    """Base and experts in memory."""
    from transformers import BertModel

    return {name: BertModel.from_pretrained(berts / name).eval() for name in ("base", *EXPERTS)}


@pytest.fixture(scope="module")
def batches():
    """Each expert's own batches, of one length, because fusion-bench counts padding as input."""
    generator = torch.Generator().manual_seed(3)
    return [[{"input_ids": torch.randint(0, 40, (16, 12), generator=generator)} for _ in range(4)] for _ in EXPERTS]


def ours(weights, sources=None, **settings):
    anchor = build(TypeAdapter(AnchorSettings).validate_python(settings), sources)
    anchor.prepare(weights)
    return {name: anchor.merge(name, weights).tensor for name in weights.names()}


def assert_update(weights, found, update, scale=1.0, rtol=1e-5, atol=2e-7):
    """Assert that merged tensors are the base plus `scale` times fusion-bench's update."""
    for name, tensor in found.items():
        expected = weights.bases[name].double() + scale * update[name].detach()
        said = f"{name} differs from fusion-bench's"
        torch.testing.assert_close(tensor.double(), expected, rtol=rtol, atol=atol, msg=said)


def test_average_and_task_arithmetic(weights):
    from fusion_bench.method.simple_average import simple_average
    from fusion_bench.method.task_arithmetic.task_arithmetic import task_arithmetic_merge
    from torch import nn

    def module(state):
        held = nn.Module()
        for name, tensor in state.items():
            # Its task arithmetic refuses parameters ("expected Parameter, got Tensor"), but not buffers.
            held.register_buffer(name.replace(".", "/"), tensor.double())
        return held

    base, experts = module(weights.bases), [module(expert) for expert in weights.experts]
    mean = simple_average([{name: t.double() for name, t in expert.items()} for expert in weights.experts])
    for name, tensor in ours(weights, method="average").items():
        torch.testing.assert_close(tensor.double(), mean[name], rtol=1e-6, atol=1e-7)
    merged = task_arithmetic_merge(base, experts, 0.3, inplace=False).state_dict()
    for name, tensor in ours(weights, method="ta", scale=0.3).items():
        torch.testing.assert_close(tensor.double(), merged[name.replace(".", "/")], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_global_ties_where_fusion_bench_keeps_one_entry_more(combine, weights, vectors):
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    names = sorted(weights.bases)
    flat = torch.stack([torch.cat([vector[name].flatten() for name in names]) for vector in vectors])
    size = flat.shape[1]
    merged = ties_merging(flat, reset_thresh=0.2, merge_func=combine).split([weights.bases[n].numel() for n in names])
    update = {name: part.view_as(weights.bases[name]) for name, part in zip(names, merged, strict=True)}
    density = (int(0.2 * size) + 1) / size
    assert_update(weights, ours(weights, method="ties", density=density, combine=combine, scale=1.0), update)


def test_dare_on_the_mask_that_fusion_bench_drew(weights, vectors):
    from fusion_bench.method.dare.utils import param_random_drop_

    for name, vector in vectors[0].items():
        update = torch.nn.Parameter(vector.clone(), requires_grad=False)
        torch.manual_seed(0)
        param_random_drop_(update, 0.7, rescale=True)
        mask = update != 0

        found = Drawn(weights, 0.7, 0, mask).expert(0, name) - weights.bases[name].double()
        torch.testing.assert_close(found, update.data, rtol=1e-7, atol=1e-9)


def test_tsv(weights, vectors):
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    update = TSVM_utils.compute_and_sum_svd_mem_reduction(vectors, accelerator="cpu")
    found = ours(weights, method="tsv", scale=0.8)
    # More experts than directions: nothing is left of each by fusion-bench's ⌊r/T⌋, one triplet by ours.
    few = "embeddings.token_type_embeddings.weight"
    assert weights.bases[few].shape == (2, 16)
    assert not update[few].any()
    assert not torch.equal(found.pop(few), weights.bases[few])
    assert_update(weights, found, update, scale=0.8)


def test_isotropic(weights, vectors):
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts

    assert_update(weights, ours(weights, method="iso-c", scale=1.5), iso_c(vectors, accelerator="cpu"), scale=1.5)
    for common in (0.5, 0.8):
        update = iso_cts(vectors, common_space_fraction=common, accelerator="cpu")
        assert_update(weights, ours(weights, method="iso-cts", common=common), update)


def test_wudis_published_schedule(weights, vectors):
    from fusion_bench.method.wudi.wudi import wudi_merging

    update = wudi_merging(vectors, accelerator="cpu", iter_num=25)
    found = ours(weights, method="wudi", solver="adam", steps=25)
    # Adam divides gradients by their own size, and with it their rounding.
    assert_update(weights, found, update, atol=1e-6)


def test_fisher_on_the_same_information(weights):
    from fusion_bench.method.fisher_merging.fisher_merging import merging_with_fisher_weights

    generator = torch.Generator().manual_seed(5)
    information = [
        {n: torch.rand(t.shape, generator=generator, dtype=torch.float64) ** 4 for n, t in weights.bases.items()}
        for _ in weights.experts
    ]
    parameters = {name: [expert[name].double() for expert in weights.experts] for name in weights.bases}
    sources = Sources(fisher=lambda index, name: information[index][name])
    for normalize in (True, False):
        merged = merging_with_fisher_weights(
            parameters, information, torch.ones(3) / 3, normalize_fisher_weight=normalize, minimal_fisher_weight=1e-6
        )
        found = ours(weights, sources, method="fisher", normalize=normalize, floor=1e-6)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.double(), merged[name], rtol=1e-6, atol=1e-7)


def test_regmean_from_the_same_batches(weights, models, batches):
    merged = regmean([models[name] for name in EXPERTS], batches, off_diagonal=0.9)
    maps = discover(models["base"], batches[0][0])
    linear = [map_.weight for map_ in maps]
    held = type(weights)(weights.bases, weights.experts, linear)
    first = list({map_.input_group: map_ for map_ in reversed(maps)}.values())
    sums = [collect(models[name], own, first) for name, own in zip(EXPERTS, batches, strict=True)]
    group_of = {map_.weight: map_.input_group for map_ in maps}

    def gram(index, name):
        own = sums[index][group_of[name]]
        return own.total / own.rows

    found = ours(held, Sources(gram=gram), method="regmean", off_diagonal=0.9)
    assert len(linear) == 13
    for name, tensor in found.items():
        # fusion-bench inverts in float32.
        torch.testing.assert_close(tensor, merged[name], rtol=1e-3, atol=2e-4)


def test_regmean_plus_plus_is_regmean_until_the_layers_inputs_differ(models, batches):
    given = dict(zip(EXPERTS, batches, strict=True))
    experts = {name: models[name] for name in EXPERTS}
    merged = regmean_plus_plus(models["base"], experts, given, lambda model: model.encoder.layer, off_diagonal=0.9)
    plain = regmean(list(experts.values()), batches, off_diagonal=0.9)
    assert merged.keys() == plain.keys()
    assert all(tensor.isfinite().all() for tensor in merged.values())
    query = "encoder.layer.{}.attention.self.query.weight"
    for layer in (0, 1):
        assert not torch.allclose(merged[query.format(layer)], plain[query.format(layer)], rtol=1e-3, atol=1e-5)
    bias = "encoder.layer.1.output.dense.bias"
    torch.testing.assert_close(merged[bias], plain[bias])
    # With one expert, merged and expert read the same, and either method gives that expert back.
    alone = regmean_plus_plus(
        models["base"], {"expert0": models["expert0"]}, given, lambda model: model.encoder.layer, off_diagonal=0.9
    )
    for name, tensor in models["expert0"].state_dict().items():
        torch.testing.assert_close(alone[name], tensor, rtol=1e-3, atol=1e-3)


def test_its_fisher_merge_runs_on_classifiers_of_any_kind(models, berts, batches):
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    classifiers = [BertForSequenceClassification.from_pretrained(berts / name, num_labels=3).eval() for name in EXPERTS]
    merged = fisher(classifiers, batches)
    name = "bert.encoder.layer.0.output.dense.weight"
    stacked = torch.stack([dict(model.named_parameters())[name] for model in classifiers])
    low, high = stacked.amin(0), stacked.amax(0)
    assert bool(((merged[name] >= low - 1e-6) & (merged[name] <= high + 1e-6)).all())
