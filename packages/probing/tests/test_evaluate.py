"""Evaluation: ablations against their definition, controls that are really matched, quotients with known values."""

import pytest
import torch
import zoo
from scipy import stats
from torch import nn

from probing import CircuitConfig, CircuitModel, ConfigError, DataError, MaskError, Masks, evaluate
from probing._estimate import _t975
from probing._structure import example_inputs

PATHS = ("transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc")


def circuit_of(model, share=0.3, unit="neuron", seed=0, paths=PATHS):
    generator = torch.Generator().manual_seed(seed)
    sites = CircuitModel(CircuitConfig(mask_hparams={"mask_unit": unit}, target_layers=list(paths)), model)
    keep = {p: torch.rand(m.shape, generator=generator) < share for p, m in sites.masks().keep.items()}
    sites.close()
    return Masks.of(model, keep, unit)


@pytest.fixture
def model():
    return zoo.make("gpt2")


@pytest.fixture
def batch(model):
    return example_inputs(model, rows=4, positions=5)


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def patched(model, batch, change):
    """The definition in activation space: what c_fc gives, without its bias, changed by hand."""
    handles = []
    for path in PATHS:
        module = model.get_submodule(path)
        handles.append(module.register_forward_hook(lambda m, a, y, p=path: change(p, y - m.bias) + m.bias))
    try:
        return logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def activations(model, batch):
    seen = {}
    handles = [
        model.get_submodule(p).register_forward_hook(lambda m, a, y, p=p: seen.update({p: y - m.bias})) for p in PATHS
    ]
    logits(model, batch)
    for handle in handles:
        handle.remove()
    return seen


class TestAblation:
    def test_zero_in_both_spaces_is_a_zeroed_weight(self, model, batch):
        circuit = circuit_of(model)
        found = logits(evaluate.Ablated(model, circuit), batch)
        in_weights = logits(evaluate.Ablated(model, circuit, space="weight"), batch)
        with torch.no_grad():
            for path, mask in circuit.keep.items():
                model.get_submodule(path).weight[:, mask] = 0
        torch.testing.assert_close(found, logits(model, batch))
        torch.testing.assert_close(in_weights, found)

    def test_mean_is_over_reference_rows_without_their_padding(self, model, batch):
        circuit = circuit_of(model)
        attention = torch.ones_like(batch["input_ids"])
        attention[0, 3:] = 0
        reference = {**batch, "attention_mask": attention}
        means = {p: y[attention.bool()].mean(0) for p, y in activations(model, reference).items()}
        expected = patched(model, batch, lambda p, y: torch.where(circuit.keep[p], means[p], y))
        found = logits(evaluate.Ablated(model, circuit, "mean", reference=reference), batch)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_resampling_takes_the_clean_value_of_the_previous_row(self, model, batch):
        circuit = circuit_of(model)
        other = activations(model, {"input_ids": batch["input_ids"].roll(1, 0)})
        expected = patched(model, batch, lambda p, y: torch.where(circuit.keep[p], other[p], y))
        found = logits(evaluate.Ablated(model, circuit, "resample"), batch)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(MaskError, match="only one"):
            logits(evaluate.Ablated(model, circuit, "resample"), {"input_ids": batch["input_ids"][:1]})

    @pytest.mark.parametrize("how", ["mean", "resample", "random"])
    def test_weight_space_changes_the_removed_columns_only(self, model, batch, how):
        circuit = circuit_of(model)
        path = PATHS[0]
        with_removed = evaluate.Ablated(model, circuit, how, "weight")
        seen = {}
        module = model.get_submodule(path)
        before = module.weight.detach().clone()
        handle = module.register_forward_pre_hook(lambda m, a: seen.update(w=m.weight.detach().clone()))
        logits(with_removed, batch)
        handle.remove()
        removed = circuit.keep[path]
        assert torch.equal(seen["w"][:, ~removed], before[:, ~removed])
        assert not torch.isclose(seen["w"][:, removed], before[:, removed]).all()
        if how == "mean":
            torch.testing.assert_close(seen["w"][:, removed], before.mean().expand_as(before[:, removed]))
        if how == "resample":
            assert torch.isin(seen["w"][:, removed], before).all()
        assert torch.equal(module.weight, before)

    def test_random_activations_are_seeded(self, model, batch):
        circuit = circuit_of(model)
        one, same, other = (
            logits(evaluate.Ablated(model, circuit, "random", reference=batch, seed=s), batch) for s in (1, 1, 2)
        )
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    @pytest.mark.parametrize("unit", ["input", "head", "module"])
    def test_other_units_can_be_mean_ablated(self, model, batch, unit):
        path = {
            "input": "transformer.h.0.mlp.c_proj",
            "head": "transformer.h.0.attn.c_proj",
            "module": "transformer.h.0.mlp",
        }
        circuit = circuit_of(model, 0.5, unit, seed=2, paths=[path[unit]])
        found = logits(evaluate.Ablated(model, circuit | ~circuit, "mean", reference=batch), batch)
        assert torch.isfinite(found).all()
        assert not torch.allclose(found, logits(model, batch))

    @pytest.mark.parametrize(
        ("path", "stack"),
        [
            ("decoder.block.1.layer.2.DenseReluDense.wi", "decoder"),
            ("decoder.block.1.layer.1.EncDecAttention.k", "encoder"),
            ("encoder.block.1.layer.1.DenseReluDense.wi", "encoder"),
        ],
    )
    @pytest.mark.parametrize("masked", [True, False])
    def test_regression_means_of_two_stacks_know_whose_padding_is_meant(self, path, stack, masked):
        t5 = zoo.make("t5")
        ids = example_inputs(t5, rows=4, positions=6)["input_ids"]
        ones = torch.ones_like(ids)
        masks = {"encoder": ones.clone(), "decoder": ones.clone()}
        masks["encoder"][::2, 4:], masks["decoder"][1::2, 3:] = 0, 0
        reference = {"input_ids": ids, "attention_mask": masks["encoder"], "decoder_input_ids": ids.flip(1)}
        reference |= {"decoder_attention_mask": masks["decoder"]} if masked else {}
        seen = {}
        module = t5.get_submodule(path)
        handle = module.register_forward_hook(lambda m, a, y: seen.update(y=y.detach()))
        with torch.no_grad():
            t5(**reference)
        handle.remove()
        shown = masks[stack] if masked or stack == "encoder" else ones
        mean = seen["y"][shown.bool()].mean(0)
        everything = Masks.of(t5, {path: torch.ones(module.out_features, dtype=torch.bool)})
        (item,) = evaluate.Ablated(t5, everything, "mean", reference=reference)._items
        torch.testing.assert_close(item.fill, mean, rtol=1e-5, atol=1e-6)

    def test_bad_input(self, model, batch):
        circuit = circuit_of(model)
        with pytest.raises(MaskError, match="reference"):
            evaluate.Ablated(model, circuit, "mean")
        with pytest.raises(ConfigError, match="'resample'"):
            evaluate.Ablated(model, circuit, "resampled")
        with pytest.raises(MaskError, match="another model"):
            evaluate.Ablated(zoo.make("llama"), circuit)
        with pytest.raises(MaskError, match="no activation"):
            logits(evaluate.Ablated(model, circuit_of(model, unit="weight"), "resample"), batch)


class Additive(nn.Module):
    """y = Σ units: what each unit is worth is known exactly."""

    def __init__(self, worth):
        super().__init__()
        self.units = nn.Linear(1, len(worth), bias=False)
        with torch.no_grad():
            self.units.weight[:, 0] = torch.tensor(worth)

    def forward(self, x):
        return self.units(x).sum(-1)


def measure(model):
    with torch.no_grad():
        return model(torch.ones(8, 1))


def additive(worth, kept):
    model = Additive(worth)
    keep = torch.zeros(len(worth), dtype=torch.bool)
    keep[list(kept)] = True
    return model, Masks.of(model, {"units": keep})


class TestQuotients:
    def test_the_effect_of_a_circuit_beside_its_controls(self):
        model, circuit = additive([5.0, 3.0] + [0.5] * 8, [0, 1])
        effect = evaluate.ablation(model, circuit, measure, controls=19)
        assert effect.drop == pytest.approx(8)
        assert effect.control_drop == pytest.approx(1)
        assert effect.necessity == pytest.approx(7)
        assert effect.p_value == pytest.approx(1 / 20)
        assert effect.undefined is None
        assert effect.kept == {"units": pytest.approx(0.2)}

    def test_regression_an_undefined_control_says_so(self):
        """The published runs record −1 here, and averages quietly include it."""
        model, circuit = additive([1.0] * 4, [0, 1, 2])
        effect = evaluate.ablation(model, circuit, measure)
        assert effect.controls == []
        assert effect.control_drop is effect.necessity is effect.p_value is None
        assert "75%" in effect.undefined
        assert evaluate.ablation(model, circuit, measure, pool="all", controls=3).undefined is None
        empty = circuit & ~circuit
        assert "empty" in evaluate.ablation(model, empty, measure).undefined

    def test_global_matching_keeps_the_total(self):
        keep = {"a": torch.tensor([True] * 3 + [False]), "b": torch.zeros(12, dtype=torch.bool)}
        drawn = evaluate.sample_like(keep, torch.Generator().manual_seed(0), scope="global")
        assert sum(int(mask.sum()) for mask in drawn.values()) == 3
        assert not (drawn["a"] & keep["a"]).any()

    def test_faithfulness_of_all_nothing_and_part(self):
        model, circuit = additive([4.0, 3.0, 2.0, 1.0], [0, 3])
        assert evaluate.faithfulness(model, circuit, measure) == pytest.approx(0.5)
        assert evaluate.faithfulness(model, circuit | ~circuit, measure) == pytest.approx(1)
        assert evaluate.faithfulness(model, circuit & ~circuit, measure) == pytest.approx(0)
        idle, circuit = additive([0.0, 0.0], [0])
        with pytest.raises(DataError, match="undefined"):
            evaluate.faithfulness(idle, circuit, measure)

    def test_the_size_curve_integrates_what_the_ranking_says(self):
        worth = [4.0, 3.0, 2.0, 1.0]
        model, circuit = additive(worth, [0])
        ranked = Masks(circuit.sites, circuit.keep, logits={"units": torch.tensor(worth)}, weights=circuit.weights)
        curve = evaluate.size_curve(model, ranked, measure, (0.0, 0.25, 0.5, 0.75, 1.0))
        assert curve.faithfulness == pytest.approx([0, 0.4, 0.7, 0.9, 1])
        assert curve.cpr == pytest.approx(0.25 * (0 / 2 + 0.4 + 0.7 + 0.9 + 1 / 2))
        assert curve.cmd == pytest.approx(1 - curve.cpr)
        with pytest.raises(MaskError, match="no logits"):
            evaluate.size_curve(model, circuit, measure)

    def test_completeness_is_zero_for_all_that_matters(self):
        model, circuit = additive([4.0, 3.0, 0.0, 0.0], [0, 1])
        found = evaluate.completeness(model, circuit, measure)
        assert found.worst == pytest.approx(0, abs=1e-6)
        model, part = additive([4.0, 3.0, 2.0, 0.0], [0, 1])
        assert evaluate.completeness(model, part, measure).mean.mean == pytest.approx(2)

    def test_minimality_tells_needed_units_from_idle_ones(self):
        model, circuit = additive([4.0, 3.0, 0.0, 0.0, 0.1, 0.1], [0, 1, 2])
        found = evaluate.minimality(model, circuit, measure)
        assert found.inside == {
            "units[0]": pytest.approx(4),
            "units[1]": pytest.approx(3),
            "units[2]": pytest.approx(0),
        }
        assert found.needed == pytest.approx(2 / 3)
        with pytest.raises(MaskError, match="keeps 6 of 6"):
            evaluate.minimality(model, circuit | ~circuit, measure)

    def test_stability_over_seeds(self, model):
        circuits = [circuit_of(model, seed=seed) for seed in range(3)]
        found = evaluate.stability(circuits)
        assert found.jaccard.mean == pytest.approx(found.if_independent, abs=0.12)
        assert found.core.equals(circuits[0] & circuits[1] & circuits[2])
        assert evaluate.stability([circuits[0]] * 3).jaccard.mean == 1
        with pytest.raises(DataError, match="at least two"):
            evaluate.stability(circuits[:1])


class TestEstimates:
    def test_bootstrap_intervals_agree_with_theory(self):
        values = torch.randn(400, generator=torch.Generator().manual_seed(0))
        found = evaluate.Estimate.over_examples(values)
        half = 1.96 * values.std() / 20
        assert found.mean == pytest.approx(values.mean().item())
        assert found.high - found.mean == pytest.approx(half.item(), rel=0.12)
        assert found.mean - found.low == pytest.approx(half.item(), rel=0.12)

    @pytest.mark.parametrize("n", [2, 3, 5, 6, 10, 30])
    def test_students_quantile(self, n):
        assert _t975(n - 1) == pytest.approx(stats.t.ppf(0.975, n - 1), rel=0.012)

    def test_one_draw_has_no_interval(self):
        found = evaluate.Estimate.over_draws([0.5])
        assert found.mean == 0.5
        assert found.low != found.low


def slow_knn(reference, reference_labels, test, test_labels):
    right = 0
    for v, label in zip(test, test_labels):
        cosines = [torch.nn.functional.cosine_similarity(v, r, dim=0).item() for r in reference]
        right += int(reference_labels[max(range(len(cosines)), key=cosines.__getitem__)] == label)
    return right / len(test)


def test_knn_is_one_nearest_neighbour_by_cosine():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4)
    reference, test = torch.randn(4, 5, generator=generator), torch.randn(30, 5, generator=generator)
    test_labels = torch.randint(0, 4, (30,), generator=generator)
    # One vector a class: every draw is the same reference set.
    found = evaluate.knn_accuracy(reference, labels, test, test_labels, draws=3)
    assert found == pytest.approx([slow_knn(reference, labels, test, test_labels)] * 3)


def test_knn_draws_differ_and_a_collapsed_readout_scores_chance():
    labels = torch.arange(5).repeat(20)
    noisy = torch.eye(5)[labels] + torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    draws = evaluate.knn_accuracy(noisy, labels, noisy, labels, draws=10)
    assert len(set(draws)) > 3
    collapsed = torch.zeros(100, 5)
    assert evaluate.knn_accuracy(collapsed, labels, collapsed, labels, draws=2) == pytest.approx([0.2, 0.2])
    with pytest.raises(DataError, match="one class"):
        evaluate.knn_accuracy(noisy, labels * 0, noisy, labels)


def test_regression_misspelt_choices_and_sizes_are_refused(model, batch):
    circuit = circuit_of(model)

    def measure(m):
        return logits(m, batch).flatten()

    with pytest.raises(ConfigError, match="did you mean 'complement'"):
        evaluate.ablation(model, circuit, measure, pool="complment")
    with pytest.raises(ConfigError, match="did you mean 'site'"):
        evaluate.sample_like(circuit.keep, torch.Generator(), scope="sitez")
    with pytest.raises(ConfigError, match="controls=-1"):
        evaluate.ablation(model, circuit, measure, controls=-1)
    assert "controls=0" in evaluate.ablation(model, circuit, measure, controls=0).undefined
    for sizes in ((1.0, 0.5), (0.0, 2.0)):
        with pytest.raises(ConfigError, match="ascending"):
            evaluate.size_curve(model, circuit, measure, sizes)


def test_a_circuit_of_other_weights_can_be_ablated_when_asked_for(model, batch):
    circuit = circuit_of(model)
    with torch.no_grad():
        model.get_submodule(PATHS[0]).weight.mul_(1.5)

    def measure(m):
        return logits(m, batch).flatten()

    with pytest.raises(MaskError, match="same_weights=False"):
        evaluate.ablation(model, circuit, measure, controls=1)
    effect = evaluate.ablation(model, circuit, measure, controls=1, same_weights=False)
    assert effect.ablated.mean == pytest.approx(
        measure(evaluate.Ablated(model, circuit, same_weights=False)).mean().item(), abs=1e-5
    )


def test_empty_circuits_agree(model):
    empty = circuit_of(model, share=0.0)
    found = evaluate.stability([empty, empty, empty])
    assert (found.jaccard.mean, found.if_independent) == (1.0, 1.0)
