"""A masked model is the model with those units gone, on every kind of model; and the model itself afterwards."""

import json

import pytest
import torch
import zoo
from torch import nn
from transformers.pytorch_utils import Conv1D

from probing import CircuitConfig, CircuitModel, ConfigError, MaskError, Masks, SiteError, find_sites, overlap
from probing._intervene import Intervention, intervened
from probing._rules import RULES
from probing._structure import example_inputs, find_layout

# What a user would type for each architecture.
SITES = {
    "bert": "*.layer.1.*dense", "roberta": "*.layer.1.*dense", "convbert": "*.layer.1.output.dense",
    "ernie": "*.layer.1.*dense", "electra": "*.layer.1.*dense", "mpnet": "*.layer.1.*dense",
    "gpt2": "transformer.h.1.*.c_*", "gpt_neo": "transformer.h.1.mlp.*", "gpt_neox": "*.layers.1.*dense*",
    "gpt_neox_sequential": "*.layers.1.*dense*", "vit": "layers.1.*", "opt": "*.layers.1.fc*",
    "opt_postnorm": "*.layers.1.fc*", "bloom": "transformer.h.1.*dense*", "t5": "decoder.block.1.*",
    "mixtral": "*.layers.1.self_attn.*", "qwen3_moe": "*.layers.1.self_attn.*", "phi": "*.layers.1.*",
}  # fmt: skip


def circuit_of(kind, dtype=torch.float32, rule="continuous_sparsification", unit="neuron", model=None, **hparams):
    model = model if model is not None else zoo.make(kind, dtype)
    patterns = SITES.get(kind, "*.layers.1.*proj")
    return CircuitModel(CircuitConfig(rule, {"mask_unit": unit, **hparams}, patterns), model)


def scatter(circuit, seed=3):
    """Random logits, so that about half of each mask is on."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for logits in circuit.site_masks.parameters():
            logits.copy_(torch.randn(logits.shape, generator=generator))
    return circuit


def circuit_at_one(net):
    hparams = {"mask_unit": "neuron", "mask_init_value": 1.0}
    return CircuitModel(CircuitConfig("continuous_sparsification", hparams, ["0"]), net)


def run(model, batch):
    with torch.no_grad():
        return next(iter(model(**batch).values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", list(zoo.ZOO))
def test_every_kind_trains_binarises_and_is_left_untouched(kind, dtype):
    model = zoo.make(kind, dtype)
    batch = example_inputs(model)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    before = run(model, batch)
    with circuit_of(kind, model=model) as circuit:
        circuit.train()
        optimiser = torch.optim.Adam([p for p in circuit.parameters() if p.requires_grad], lr=0.5)
        output = next(iter(circuit(**batch).values()))
        assert output.dtype == dtype
        (output.float().square().mean() + circuit.l0_loss() * 1e-3).backward()
        optimiser.step()
        assert all((mask.logits != 0).all() and mask.logits.grad is not None for mask in circuit.site_masks)
        scatter(circuit).eval()
        masks = circuit.masks()
        for item in circuit.interventions():
            assert set(item.keep.unique().tolist()) <= {0.0, 1.0}
        circuit.set_ablate_mode("zero_ablate")
        for item, path in zip(circuit.interventions(), masks.keep):
            assert torch.equal(item.keep.bool(), ~masks.keep[path])
        run(circuit, batch)
    assert torch.equal(run(model, batch), before)
    assert all(torch.equal(p, weights[name]) for name, p in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters() if p.is_floating_point())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def slow_forward(module, x, unit, mask, bias_mask=None):
    """The definition: multiply the weight by the mask, broadcast by hand, and run the plain layer."""
    weight, bias = module.weight.detach(), module.bias.detach()
    if isinstance(module, Conv1D):
        big = {"weight": mask, "neuron": mask[None, :], "input": mask[:, None]}[unit]
        return x @ (weight * big) + bias * (1 if bias_mask is None else bias_mask)
    if isinstance(module, nn.Linear):
        big = {"weight": mask, "neuron": mask[:, None], "input": mask[None, :]}[unit]
        return x @ (weight * big).T + bias * (1 if bias_mask is None else bias_mask)
    tail = [1] * (weight.ndim - 2)
    if unit == "input" and module.groups > 1:
        big = torch.stack([m.repeat(weight.shape[0] // module.groups, 1) for m in mask.view(module.groups, 1, -1)])
        big = big.flatten(0, 1).view(*weight.shape[:2], *tail)
    else:
        shape = {"weight": weight.shape, "neuron": (-1, 1, *tail), "input": (1, -1, *tail)}[unit]
        big = mask.view(shape)
    bias = bias * (1 if bias_mask is None else bias_mask)
    return module._conv_forward(x, weight * big, bias)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (5, 3, 6)),
    "conv1d_hf": (lambda: Conv1D(8, 6), (5, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding=1, stride=2, dilation=2), (5, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="circular"), (2, 6, 7, 7)),
    "conv2d_groups": (lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 7, 7)),
}


@pytest.mark.parametrize("soft", [False, True], ids=["binary", "soft"])
@pytest.mark.parametrize("unit", ["weight", "neuron", "input"])
@pytest.mark.parametrize("layer", LAYERS)
def test_units_agree_with_the_definition_on_weights(layer, unit, soft):
    build, shape = LAYERS[layer]
    net, x = nn.Sequential(build()), torch.randn(shape)
    with torch.no_grad():
        net[0].bias.normal_()
    site = find_sites(net, "0", unit)[0]
    mask = torch.rand(site.shape) if soft else (torch.rand(site.shape) > 0.5).float()
    bias_mask = torch.rand(8) if unit != "input" else None
    with intervened(net, [Intervention(site, mask, bias_mask)]):
        found = net(x)
    torch.testing.assert_close(found, slow_forward(net[0], x, unit, mask, bias_mask), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unit", ["weight", "neuron", "input"])
def test_removing_all_weights_leaves_the_bias_and_removing_all_leaves_nothing(unit):
    net = nn.Sequential(nn.Linear(4, 3))
    site = find_sites(net, "0", unit)[0]
    bias = net[0].bias
    with intervened(net, [Intervention(site, torch.zeros(site.shape))]):
        assert torch.equal(net(torch.randn(5, 4)), bias.expand(5, 3))
    if unit != "input":
        with intervened(net, [Intervention(site, torch.zeros(site.shape), torch.zeros(3))]):
            assert torch.equal(net(torch.randn(5, 4)), torch.zeros(5, 3))


def test_conv_neurons_are_filters_not_filter_taps():
    """NeuroSurgeon's neuron mask on convolutions has one entry per output channel and kernel tap."""
    assert find_sites(nn.Sequential(nn.Conv2d(3, 5, 3)), "0", "neuron")[0].shape == (5,)


def test_regression_a_single_conv2d_can_be_masked_by_weight():
    """NeuroSurgeon's Conv2d made from a layer has mask unit "none" and no mask tensor at all."""
    net = nn.Sequential(nn.Conv2d(3, 5, 3))
    circuit = CircuitModel(CircuitConfig("continuous_sparsification", {}, ["0"]), net)
    assert circuit.site_masks[0].logits.shape == net[0].weight.shape


def test_a_head_is_what_the_projection_reads_from_it():
    model = zoo.make("qwen3")
    site = find_sites(model, "model.layers.0.self_attn.o_proj", "head")[0]
    assert (site.shape, site.heads) == ((4,), 4)
    batch, seen = example_inputs(model), {}
    hook = model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda m, a, o: seen.update(x=a[0], y=o))
    with intervened(model, [Intervention(site, torch.tensor([1.0, 0, 1, 1]))]):
        run(model, batch)
    hook.remove()
    assert (seen["x"].unflatten(-1, (4, 6))[..., 1, :] == 0).all()
    assert (seen["x"].unflatten(-1, (4, 6))[..., 0, :] != 0).any()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_an_expert_without_its_down_projection_adds_nothing(kind):
    model = zoo.make(kind)
    site = find_sites(model, "model.layers.0.mlp.experts", "expert")[0]
    assert site.shape == (4,)
    batch, keep = example_inputs(model), torch.tensor([1.0, 0, 1, 0])
    with intervened(model, [Intervention(site, keep)]):
        found = run(model, batch)
    with torch.no_grad():  # the definition: a model whose experts 1 and 3 have zero weights
        experts = model.get_submodule(site.path)
        for parameter in experts.parameters():
            parameter[1] = parameter[3] = 0
    torch.testing.assert_close(found, run(model, batch), rtol=1e-5, atol=1e-6)


def test_a_module_unit_switches_a_whole_sub_block_even_if_it_returns_a_tuple():
    model = zoo.make("gpt2")
    layout = find_layout(model, [0])[0]
    site = find_sites(model, layout.attn, "module")[0]
    batch = example_inputs(model)
    with intervened(model, [Intervention(site, torch.zeros(1))]):
        found = run(model, batch)
    with torch.no_grad():
        for parameter in model.transformer.h[0].attn.c_proj.parameters():
            parameter.zero_()
    torch.testing.assert_close(found, run(model, batch))


def test_masking_the_head_does_not_mask_the_embedding_it_is_tied_to():
    model = zoo.make("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    circuit = CircuitModel(CircuitConfig("continuous_sparsification", {"mask_init_value": -1.0}, ["lm_head"]), model)
    batch = example_inputs(model)
    seen = []
    handle = model.transformer.wte.register_forward_hook(lambda m, a, o: seen.append(o))
    logits = run(circuit.eval(), batch)
    handle.remove()
    assert (logits == 0).all()
    assert (seen[0] != 0).any()


def test_generate_works_under_masks():
    model = zoo.make("gpt2")
    circuit = scatter(circuit_of("gpt2", model=model)).eval()
    ids = example_inputs(model)["input_ids"]
    with circuit.applied() as masked:
        inside = masked.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert inside.shape[1] == ids.shape[1] + 4


class TestRules:
    def test_regression_magnitude_pruning_ranks_magnitudes(self):
        """NeuroSurgeon ranks signed values: at 0.5 it prunes every large negative weight first."""
        net = nn.Sequential(nn.Linear(40, 50))
        config = CircuitConfig("magnitude_pruning", {"prune_percentage": 0.5}, ["0"])
        keep = CircuitModel(config, net).masks().keep["0"]
        size = net[0].weight.abs()
        assert keep.sum() == 1000
        assert size[keep].min() >= size[~keep].max()
        assert (net[0].weight[keep] < 0).float().mean() > 0.4

    @pytest.mark.parametrize(("share", "kept"), [(0.0, 12), (1.0, 0), (0.25, 9)])
    def test_magnitude_prunes_the_share_exactly_even_with_ties(self, share, kept):
        net = nn.Sequential(nn.Linear(4, 3))
        nn.init.constant_(net[0].weight, 0.5)
        config = CircuitConfig("magnitude_pruning", {"prune_percentage": share}, ["0"])
        assert CircuitModel(config, net).masks().size == kept

    def test_magnitude_of_neurons_is_their_norm(self):
        net = nn.Sequential(Conv1D(5, 4))
        config = CircuitConfig("magnitude_pruning", {"prune_percentage": 0.6, "mask_unit": "neuron"}, ["0"])
        keep = CircuitModel(config, net).masks().keep["0"]
        expected = net[0].weight.norm(dim=0).topk(2).indices
        assert set(keep.nonzero().flatten().tolist()) == set(expected.tolist())

    def test_magnitude_and_random_have_nothing_to_train(self):
        for rule in ("magnitude_pruning", "random"):
            circuit = circuit_of("gpt2", rule=rule)
            assert not [p for p in circuit.parameters() if p.requires_grad]

    def test_continuous_sparsification_is_the_sigmoid_in_training_and_the_sign_after(self):
        circuit = scatter(circuit_of("gpt2"))
        circuit.temperature = 7.0
        logits = circuit.site_masks[0].logits
        torch.testing.assert_close(circuit.train().interventions()[0].keep, torch.sigmoid(7 * logits))
        assert torch.equal(circuit.eval().interventions()[0].keep, (logits > 0).float())

    def test_temperature_moves_the_training_mask_towards_the_binary_one(self):
        circuit = scatter(circuit_of("gpt2")).train()
        soft = circuit.l0(soft=True)
        circuit.temperature = 1e6
        torch.testing.assert_close(circuit.l0(soft=True), circuit.l0())
        assert not torch.isclose(soft, circuit.l0())

    def test_hard_concrete_counts_what_it_samples(self):
        """Monte Carlo against the closed form σ(log α − β log(−γ/ζ)), Louizos et al. eq. 12."""
        rule = RULES["hard_concrete"]()
        logits = torch.linspace(-3, 3, 7)
        generator = torch.Generator().manual_seed(0)
        samples = torch.stack([rule.soft(logits, 1.0, generator) for _ in range(20_000)])
        assert samples.min() == 0
        assert samples.max() == 1
        torch.testing.assert_close((samples > 0).float().mean(0), rule.kept(logits, 1.0), atol=0.012, rtol=0)

    def test_hard_concrete_init_sets_the_share_and_clips(self):
        assert RULES["hard_concrete"](0.5).initial(torch.ones(1), torch.Generator()) == 0
        low, high = (RULES["hard_concrete"](p).initial(torch.ones(1), torch.Generator()) for p in (0.0, 1.0))
        torch.testing.assert_close(torch.sigmoid(torch.cat([low, high])), torch.tensor([1e-4, 1 - 1e-4]))
        with pytest.raises(ConfigError, match="must lie in"):
            RULES["hard_concrete"](1.5)

    @pytest.mark.parametrize("name", ["straight_through", "gumbel_sigmoid", "top_k"])
    def test_straight_through_masks_are_exactly_binary_with_the_sigmoids_gradient(self, name):
        rule = RULES[name]()
        logits = torch.randn(50, requires_grad=True)
        mask = rule.soft(logits, 1.0, torch.Generator().manual_seed(0))
        assert set(mask.tolist()) <= {0.0, 1.0}
        mask.sum().backward()
        assert (logits.grad > 0).all()
        if name != "gumbel_sigmoid":
            p = torch.sigmoid(logits.detach())
            torch.testing.assert_close(logits.grad, p * (1 - p))

    def test_top_k_keeps_exactly_k_of_every_site(self):
        circuit = scatter(circuit_of("gpt2", rule="top_k", keep=0.25))
        for keep in circuit.masks().keep.values():
            assert keep.sum() == -(-keep.numel() // 4)

    @pytest.mark.parametrize("name", sorted(RULES))
    def test_the_same_seed_gives_the_same_masks(self, name):
        def one(seed):
            config = CircuitConfig(name, {"mask_unit": "neuron"}, ["transformer.h.0.mlp.*"], seed=seed)
            circuit = CircuitModel(config, zoo.make("gpt2")).train()
            return torch.cat([item.keep.detach() for item in circuit.interventions()])

        assert torch.equal(one(1), one(1))
        if name in ("hard_concrete", "gumbel_sigmoid", "top_k", "random"):
            assert not torch.equal(one(1), one(2))


class TestSparsity:
    def test_a_neuron_counts_its_fan_in(self):
        net = nn.Sequential(nn.Linear(10, 20))
        circuit = circuit_at_one(net)
        by_layer = {"layer2l0": {"0": 200}, "layer2maxl0": {"0": 200}}
        assert circuit.compute_l0_statistics() == {"total_l0": 200, "max_l0": 200, **by_layer}
        with torch.no_grad():
            circuit.site_masks[0].logits[3] = -1
        assert circuit.compute_l0_statistics()["total_l0"] == 190

    def test_norms_of_the_penalty(self):
        net = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))
        expected = {"paper": 0.5 * 300, "units": 0.5 * 25, "mean": 0.5}
        for norm, value in expected.items():
            config = CircuitConfig("continuous_sparsification", {"mask_unit": "neuron"}, ["*"], l0_norm=norm)
            assert CircuitModel(config, net).train().l0_loss().item() == pytest.approx(value)

    def test_training_adds_the_penalty_to_the_models_loss_and_eval_does_not(self):
        model = zoo.make("gpt2")
        batch = example_inputs(model)
        batch["labels"] = batch["input_ids"]

        def losses(l0_lambda):
            config = CircuitConfig("continuous_sparsification", {}, ["transformer.h.0.*"], l0_lambda=l0_lambda)
            circuit = CircuitModel(config, model)
            return circuit.train()(**batch).loss.item(), circuit.l0_loss().item(), circuit.eval()(**batch).loss.item()

        without, l0, eval_without = losses(0.0)
        with_l0, _, eval_with = losses(0.01)
        assert with_l0 == pytest.approx(without + 0.01 * l0, rel=1e-5)
        assert eval_with == eval_without

    def test_regression_l0_counts_do_not_depend_on_the_ablation_mode(self):
        circuit = scatter(circuit_of("gpt2")).eval()
        counts = circuit.compute_l0_statistics()
        for mode in ("zero_ablate", "random_ablate", "randomly_sampled"):
            circuit.set_ablate_mode(mode)
            assert circuit.compute_l0_statistics() == counts

    def test_a_larger_lambda_keeps_less(self):
        model, kept = zoo.make("gpt2"), []
        batch = example_inputs(model)
        batch["labels"] = batch["input_ids"]
        for l0_lambda in (0.0, 0.1):
            config = CircuitConfig("continuous_sparsification", {}, ["transformer.h.*.mlp.*"], l0_lambda=l0_lambda)
            circuit = CircuitModel(config, model).train()
            optimiser = torch.optim.Adam([p for p in circuit.parameters() if p.requires_grad], lr=0.1)
            for _ in range(5):
                optimiser.zero_grad()
                circuit(**batch).loss.backward()
                optimiser.step()
            kept.append(circuit.masks().size)
        assert kept[1] < kept[0]


class TestAblation:
    def test_random_ablation_keeps_the_complement_and_changes_the_circuits_weights(self):
        circuit = scatter(circuit_of("gpt2")).eval()
        batch = example_inputs(circuit.wrapped_model)
        circuit.set_ablate_mode("zero_ablate")
        zeroed = run(circuit, batch)
        circuit.set_ablate_mode("random_ablate")
        drawn = run(circuit, batch)
        assert not torch.allclose(zeroed, drawn)
        assert torch.equal(run(circuit, batch), drawn)  # drawn once
        item, path = circuit.interventions()[0], next(iter(circuit.masks().keep))
        assert torch.equal(item.keep.bool(), ~circuit.masks().keep[path])

    def test_controls_remove_as_many_units_as_the_circuit_has(self):
        circuit = scatter(circuit_of("gpt2")).eval()
        with torch.no_grad():
            for mask in circuit.site_masks:  # a minority everywhere, so that the complement control exists
                mask.logits.copy_(mask.logits - mask.logits.quantile(0.7))
        inside = circuit.masks().keep
        for mode in ("randomly_sampled", "complement_sampled"):
            circuit.set_ablate_mode(mode)
            for item, keep in zip(circuit.interventions(), inside.values()):
                assert (item.keep == 0).sum() == keep.sum()
                if mode == "complement_sampled":
                    assert item.keep[keep].all()

    def test_a_circuit_of_more_than_half_has_no_complement_control(self):
        circuit = circuit_of("gpt2", mask_init_value=1.0).eval()
        circuit.set_ablate_mode("complement_sampled")
        with pytest.raises(MaskError, match="undefined"):
            circuit.interventions()
        circuit.set_ablate_mode("randomly_sampled")
        circuit.interventions()

    def test_regression_resampling_reaches_the_biases_too(self):
        """NeuroSurgeon consumes its one-shot flag on the weight mask."""
        circuit = scatter(circuit_of("gpt2", mask_bias=True)).eval()
        circuit.set_ablate_mode("randomly_sampled")
        first = [item.bias_keep for item in circuit.interventions()]
        again = [item.bias_keep for item in circuit.interventions()]
        circuit.set_ablate_mode("randomly_sampled", force_resample=True)
        fresh = [item.bias_keep for item in circuit.interventions()]
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert not all(torch.equal(a, b) for a, b in zip(first, fresh))

    def test_ablating_while_training_is_refused(self):
        circuit = scatter(circuit_of("gpt2"))
        circuit.set_ablate_mode("zero_ablate")
        with pytest.raises(MaskError, match="eval"):
            circuit.train()(**example_inputs(circuit.wrapped_model))

    def test_masks_can_be_turned_off_by_name(self):
        circuit = scatter(circuit_of("gpt2")).eval()
        batch = example_inputs(circuit.wrapped_model)
        plain, masked = run(circuit.wrapped_model, batch), run(circuit, batch)
        circuit.use_masks(False)
        assert torch.equal(run(circuit, batch), plain)
        circuit.use_masks(True, ["*.mlp.*"])
        assert not torch.equal(run(circuit, batch), plain)
        circuit.use_masks(True)
        assert torch.equal(run(circuit, batch), masked)
        with pytest.raises(SiteError, match="the sites are"):
            circuit.use_masks(True, "h.9")


class TestTrainSemantics:
    def test_train_returns_the_model_and_needs_no_argument(self):
        """NeuroSurgeon's returns None, and its mask layers' train() demands an argument."""
        circuit = circuit_of("gpt2")
        assert circuit.train() is circuit
        assert circuit.eval() is circuit
        circuit.site_masks[0].train()

    def test_freezing_reaches_every_parameter_and_keeps_the_base_in_eval(self):
        """NeuroSurgeon freezes by attribute name, so fused experts and position tables keep training."""
        circuit = circuit_of("mixtral").train()
        assert {name.split(".")[0] for name, p in circuit.named_parameters() if p.requires_grad} == {"site_masks"}
        assert not any(module.training for module in circuit.wrapped_model.modules())
        free = CircuitModel(
            CircuitConfig(target_layers=["transformer.h.0.*"], freeze_base=False), zoo.make("gpt2")
        ).train()
        assert all(p.requires_grad for p in free.parameters())
        assert free.wrapped_model.training

    def test_positional_calls_work(self):
        circuit = circuit_of("gpt2").eval()
        ids = example_inputs(circuit.wrapped_model)["input_ids"]
        assert torch.equal(circuit(ids).logits, circuit(input_ids=ids).logits)
        assert isinstance(circuit(ids, return_dict=False), tuple)


class TestArtefacts:
    def circuit(self):
        return scatter(circuit_of("gpt2", mask_bias=True)).eval()

    def test_a_saved_circuit_computes_the_same_on_a_fresh_model(self, tmp_path):
        circuit = self.circuit()
        batch = example_inputs(circuit.wrapped_model)
        expected = run(circuit, batch)
        circuit.masks(knn=0.97).save(tmp_path / "c.safetensors")
        loaded, fresh = Masks.load(tmp_path / "c"), zoo.make("gpt2")
        assert loaded.info["knn"] == 0.97
        with loaded.applied(fresh) as masked:
            assert torch.equal(run(masked, batch), expected)
        again = circuit_of("gpt2", mask_bias=True)
        again.load_masks(loaded)
        assert torch.equal(run(again.eval(), batch), expected)
        assert torch.equal(again.site_masks[0].logits, circuit.site_masks[0].logits)

    def test_the_algebra_is_that_of_sets(self):
        a, b = scatter(circuit_of("gpt2"), 1).masks(), scatter(circuit_of("gpt2"), 2).masks()
        assert (a & b).size + (a ^ b).size == (a | b).size
        assert (a - b).size == a.size - (a & b).size
        assert (~a).size == a.total - a.size
        assert (a & ~a).size == 0
        assert (~~a).equals(a)
        assert (~(a | b)).equals(~a & ~b)
        assert (a ^ b).equals((a - b) | (b - a))

    def test_overlap_of_independent_circuits_is_what_independence_predicts(self):
        a, b = (scatter(circuit_of("gpt2", unit="weight"), seed).masks() for seed in (1, 2))
        found = overlap(a, b)
        assert found["jaccard"] == pytest.approx(found["jaccard_if_independent"], abs=0.03)
        assert overlap(a, a)["jaccard"] == 1

    def test_masks_of_another_model_are_refused(self, tmp_path):
        masks = self.circuit().masks()
        with pytest.raises(MaskError, match="another model"):
            masks.check(zoo.make("llama"))
        other = zoo.make("gpt2")
        with torch.no_grad():
            other.transformer.h[1].mlp.c_fc.weight[0, 0] += 1
        with pytest.raises(MaskError, match="weights do not"):
            masks.check(other)
        masks.check(other, same_weights=False)
        with pytest.raises(MaskError, match="shape"):
            Masks.of(other, {"transformer.h.1.mlp.c_fc": torch.ones(3, dtype=torch.bool)})

    def test_torn_swapped_or_foreign_files_are_refused(self, tmp_path):
        masks, path = self.circuit().masks(), tmp_path / "c.safetensors"
        with pytest.raises(MaskError, match="no such file"):
            Masks.load(path)
        masks.save(path)
        (~masks).save(tmp_path / "d")
        path.with_suffix(".json").write_text((tmp_path / "d.json").read_text())
        with pytest.raises(MaskError, match="replaced"):
            Masks.load(path)
        masks.save(path)
        described = json.loads(path.with_suffix(".json").read_text())
        path.with_suffix(".json").write_text(json.dumps({**described, "format": 99}))
        with pytest.raises(MaskError, match="format 99"):
            Masks.load(path)
        masks.save(path)
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(MaskError, match="damaged"):
            Masks.load(path)

    def test_sites_differ_so_algebra_is_refused(self):
        a, b = circuit_of("gpt2").masks(), circuit_of("gpt2", unit="weight").masks()
        with pytest.raises(MaskError, match="different sites"):
            _ = a & b


class TestBadInput:
    def test_a_site_that_matches_nothing_names_its_neighbours(self):
        with pytest.raises(SiteError, match=r"transformer\.h\.0\.mlp\.c_fc"):
            find_sites(zoo.make("gpt2"), "transformer.h.0.mlp.c_fcc")

    def test_a_unit_the_module_cannot_carry(self):
        with pytest.raises(SiteError, match="fused"):
            find_sites(zoo.make("gpt2"), "transformer.h.0.mlp", "expert")

    def test_options_that_mean_nothing_to_the_rule_are_refused(self):
        with pytest.raises(ConfigError, match="prune_percentage"):
            CircuitConfig("magnitude_pruning", {"prune_percent": 0.2}, ["*"])
        with pytest.raises(ConfigError, match="means nothing"):
            CircuitConfig("top_k", {"mask_init_value": 0.2}, ["*"])
        with pytest.raises(ConfigError, match="'hard_concrete'"):
            CircuitConfig("hard_concret")
        with pytest.raises(ConfigError, match="'zero_ablate'"):
            CircuitConfig("top_k", {"ablation": "zero_ablated"})

    def test_masking_biases_that_do_not_exist(self):
        with pytest.raises(SiteError, match="none of the target layers has a bias"):
            circuit_of("llama", mask_bias=True)

    def test_a_temperature_of_zero(self):
        with pytest.raises(ConfigError, match="positive"):
            circuit_of("gpt2").temperature = 0


def test_config_survives_a_round_trip(tmp_path):
    config = CircuitConfig(
        "hard_concrete", {"mask_unit": "neuron", "gamma": -0.2}, ["a.*"], True, False, 1e-6, "mean", 7
    )
    config.save_pretrained(tmp_path)
    assert CircuitConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
