"""LoRA and quantised layers: masked as a whole, or refused in words; never masked by half."""

import pytest
import torch
import zoo
from test_probes import SITES, circuit_probe, task
from torch import nn

from probing import (
    CircuitConfig,
    CircuitModel,
    CircuitProbe,
    CircuitProbeConfig,
    MaskError,
    ProbeData,
    ResidualUpdateModelConfig,
    SiteError,
    evaluate,
    export_pruned,
    find_sites,
)
from probing._intervene import Intervention, intervened
from probing._prefix import FullModel, Prefix
from probing._structure import example_inputs

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def adapted(kind="llama", fresh=False, **more):
    peft = pytest.importorskip("peft")
    targets = {"llama": ["q_proj", "v_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}[kind]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, init_lora_weights=fresh, **more)
    return peft.get_peft_model(zoo.make(kind), config).eval()


class Quantised(nn.Linear):
    """As bitsandbytes has them: an ``nn.Linear`` by class, its weight in 8 bits with a scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.register_buffer("scale", linear.weight.detach().abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach())

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() * self.scale, self.bias)


class Packed(nn.Module):
    """As GPTQ and torch's own have them: no Linear, no weight, the bias behind a method."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("packed", linear.weight.detach().half())
        self._b = linear.bias.detach()

    def bias(self):
        return self._b

    def forward(self, x):
        return nn.functional.linear(x, self.packed.float(), self._b)


@pytest.mark.parametrize("unit", ["neuron", "input"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_lora_layer_is_masked_base_and_adapter_together(kind, unit):
    model = adapted(kind)
    path = {
        "llama": "base_model.model.model.layers.1.mlp.down_proj",
        "gpt2": "base_model.model.transformer.h.1.mlp.c_proj",
    }
    site = find_sites(model, path[kind], unit)[0]
    module, x = (
        model.get_submodule(site.path),
        torch.randn(5, site.shape[0] if unit == "input" else 24 if kind == "llama" else 64),
    )
    keep = (torch.rand(site.shape) > 0.5).float()
    base = module.base_layer
    bias = torch.zeros(16) if base.bias is None else base.bias.detach()
    with torch.no_grad():
        whole = module(x) - bias
        expected = whole * keep + bias if unit == "neuron" else module(x * keep)
        with intervened(model, [Intervention(site, keep)]):
            found = module(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, whole + bias)


def test_no_pattern_reaches_into_an_adapter():
    model = adapted()
    paths = [site.path for site in find_sites(model, "*.layers.1.*", "neuron")]
    assert len(paths) == 7
    assert not any("lora_" in path or "base_layer" in path for path in paths)
    with pytest.raises(SiteError, match="LoRA layers as a whole"):
        find_sites(model, "*.layers.1.mlp.down_proj.base_layer", "neuron")


def test_heads_of_a_lora_projection_are_heads():
    site = find_sites(adapted(), "*.layers.1.*", "head")
    assert [(s.path.rpartition(".")[2], s.heads) for s in site] == [("o_proj", 4)]


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_a_probe_of_a_lora_model_trains_from_the_cache_as_without(part, fresh):
    model = adapted(fresh=fresh)
    inputs = example_inputs(model, rows=8, positions=5)
    data = ProbeData.at_last(inputs, torch.arange(8) % 3)
    sites = {"attn": "*.layers.1.self_attn.*_proj", "mlp": "*.layers.1.mlp.*_proj"}[part]
    resid = ResidualUpdateModelConfig("auto", [1], **{part: True})
    circuit = CircuitConfig(mask_hparams={"mask_unit": "neuron"}, target_layers=[sites])
    probe = CircuitProbe(CircuitProbeConfig(f"{part}_update_1", circuit, resid), model)
    with torch.no_grad():
        for mask in probe.circuit.site_masks:
            mask.logits.normal_()
    parameters, rows = list(probe.circuit.site_masks.parameters()), torch.tensor([5, 1, 2])
    fast, slow = Prefix(probe, data), FullModel(probe, data)
    probe.train()
    found, expected = fast.vectors(rows), slow.vectors(rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    one, other = (torch.autograd.grad(v.square().sum(), parameters) for v in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Quantised, Packed])
@pytest.mark.parametrize("unit", ["neuron", "input"])
def test_a_quantised_layer_is_masked_and_its_bias_stays(kind, unit):
    torch.manual_seed(0)
    net = nn.Sequential(kind(nn.Linear(6, 8)))
    site, x = find_sites(net, "0", unit)[0], torch.randn(5, 6)
    bias = net[0].bias() if kind is Packed else net[0].bias.detach()
    keep = (torch.rand(site.shape) > 0.5).float()
    with torch.no_grad():
        expected = (net(x) - bias) * keep + bias if unit == "neuron" else net(x * keep)
        with intervened(net, [Intervention(site, keep)]):
            torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)
    circuit = CircuitModel(CircuitConfig(mask_hparams={"mask_unit": unit}, target_layers=["0"]), net)
    circuit.train()(x).square().sum().backward()
    assert (circuit.site_masks[0].logits.grad != 0).all()
    circuit.masks().check(net)


def test_what_needs_the_weights_themselves_is_refused_for_layers_that_have_none(tmp_path):
    for net in (nn.Sequential(Quantised(nn.Linear(6, 8))), nn.Sequential(Packed(nn.Linear(6, 8)))):
        with pytest.raises(SiteError, match="floating-point weights"):
            find_sites(net, "0", "weight")
        with pytest.raises(MaskError, match="no plain weights to rank"):
            CircuitModel(CircuitConfig("magnitude_pruning", {"mask_unit": "neuron"}, ["0"]), net)
        circuit = CircuitModel(CircuitConfig("random", {"mask_unit": "neuron"}, ["0"]), net).eval()
        with pytest.raises(MaskError, match="no plain weights to exchange"):
            evaluate.Ablated(net, circuit.masks(), "mean", "weight")
        circuit.set_ablate_mode("random_ablate")
        with pytest.raises(MaskError, match="draw anew"):
            circuit(torch.randn(2, 6))
    model = adapted()
    masks = CircuitModel(CircuitConfig("random", {"mask_unit": "neuron"}, ["*.mlp.down_proj"]), model).masks()
    with pytest.raises(MaskError, match="merge"):
        export_pruned(model, masks, tmp_path)


def test_masks_notice_other_numbers_in_a_quantised_layer():
    net = nn.Sequential(Packed(nn.Linear(6, 8)))
    masks = CircuitModel(CircuitConfig("random", {"mask_unit": "neuron"}, ["0"]), net).masks()
    net[0].packed += 1
    with pytest.raises(MaskError, match="weights do not"):
        masks.check(net)


@pytest.mark.parametrize(
    ("kind", "pattern", "expected"),
    [
        ("gpt2", "transformer.h.1.*", "transformer.h.1.attn.c_proj"),
        ("bert", "encoder.layer.1.*", "encoder.layer.1.attention.output.dense"),
        ("gpt_neox", "*.layers.1.*", "gpt_neox.layers.1.attention.dense"),
        ("t5", "decoder.block.1.layer.0.*", "decoder.block.1.layer.0.SelfAttention.o"),
        ("opt", "*.layers.1.*", "model.decoder.layers.1.self_attn.out_proj"),
        ("bloom", "transformer.h.1.*", "transformer.h.1.self_attention.dense"),
        ("vit", "layers.1.*", "layers.1.attention.o_proj"),
        ("mpnet", "encoder.layer.1.*", "encoder.layer.1.attention.attn.o"),
    ],
)
def test_regression_heads_sit_on_the_attentions_projection_alone(kind, pattern, expected):
    """GPT-2's MLP has a c_proj, BERT's an output.dense: their inputs are no heads, whatever divides them."""
    assert [site.path for site in find_sites(zoo.make(kind), pattern, "head")] == [expected]
    with pytest.raises(SiteError, match="inside a module called attention"):
        find_sites(zoo.make("gpt2"), "transformer.h.1.mlp.c_proj", "head")


class Tuples(nn.Module):
    """A model that always answers with a tuple."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.config, self.main_input_name = inner, inner.config, inner.main_input_name

    def forward(self, **inputs):
        return self.inner(**inputs, return_dict=False)


class TestOutputsWithoutNames:
    """Models called with return_dict=False give tuples, and their first scalar is the loss."""

    def test_regression_the_penalty_is_in_a_tuples_loss(self):
        model = zoo.make("gpt2")
        batch = example_inputs(model) | {"return_dict": False}
        batch["labels"] = batch["input_ids"]
        config = CircuitConfig(
            mask_hparams={"mask_unit": "neuron"}, target_layers=["transformer.h.0.*"], l0_lambda=0.01
        )
        circuit = CircuitModel(config, model)
        found, plain = circuit.train()(**batch), circuit.eval()(**batch)
        circuit.train().config.add_l0 = False
        bare = circuit(**batch)
        assert isinstance(found, tuple)
        assert isinstance(plain, tuple)
        assert found[0].item() == pytest.approx(bare[0].item() + 0.01 * circuit.l0_loss().item(), rel=1e-5)
        circuit.config.add_l0 = True
        del batch["labels"]
        assert circuit(**batch)[0].shape == (2, 6, 96)

    def test_objects_and_bare_tensors_are_outputs_too(self):
        class Result:
            def __init__(self, loss):
                self.loss = loss

        class Net(nn.Linear):
            def forward(self, x):
                return Result(super().forward(x).square().mean())

        config = CircuitConfig(target_layers=["re:.*"], l0_lambda=0.5)
        net = nn.Sequential(nn.Linear(4, 4), Net(4, 4))
        circuit = CircuitModel(config, net).train()
        plain = net(torch.ones(2, 4)).loss
        with circuit.applied():
            masked = net(torch.ones(2, 4)).loss
        assert circuit(torch.ones(2, 4)).loss.item() == pytest.approx(masked.item() + 0.5 * circuit.l0_loss().item())
        assert plain.item() != pytest.approx(masked.item())
        bare = CircuitModel(config, nn.Sequential(nn.Linear(4, 4)))
        assert bare.train()(torch.ones(2, 4)).shape == (2, 4)

    @pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "vit"])
    def test_probes_read_models_that_return_tuples(self, kind):
        model, data = task(kind)
        expected = circuit_probe(model, kind).eval()(labels=data.labels, token_mask=data.token_mask, **data.inputs)
        probe = circuit_probe(Tuples(model), kind, sites=f"inner.{SITES[kind][0]}").eval()
        found = probe(labels=data.labels, token_mask=data.token_mask, **data.inputs)
        assert torch.equal(found.loss, expected.loss)
        torch.testing.assert_close(
            Prefix(probe, data).vectors(torch.arange(4)), expected.hidden_states[:4], rtol=1e-4, atol=1e-5
        )


def test_the_models_main_input_may_be_given_by_place():
    model, data = task("vit")
    probe = circuit_probe(model, "vit").eval()
    pixels = data.inputs["pixel_values"]
    by_place = probe(pixels, data.labels, data.token_mask)
    by_name = probe(pixel_values=pixels, labels=data.labels, token_mask=data.token_mask)
    assert torch.equal(by_place.hidden_states, by_name.hidden_states)
    assert torch.equal(by_place.loss, by_name.loss)


@pytest.mark.parametrize(
    ("sites", "readout"),
    [
        ("transformer.h.1.mlp.c_fc", "attn_update_1"),  # behind it in the same block
        ("transformer.h.1.attn.c_attn", "attn_update_0"),  # a block later
        ("lm_head", "mlp_update_1"),
        ("transformer.h.0.mlp.c_proj", "attn_update_0"),
        (["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"], "mlp_update_0"),
    ],
)
def test_regression_masks_no_gradient_can_reach_are_refused_at_construction(sites, readout):
    """Such a mask would follow the penalty alone and look like a finding."""
    layer = int(readout[-1])
    resid = ResidualUpdateModelConfig("gpt", [layer], attn=True, mlp=True)
    config = CircuitConfig(mask_hparams={"mask_unit": "neuron"}, target_layers=sites)
    with pytest.raises(SiteError, match="never see a gradient"):
        CircuitProbe(CircuitProbeConfig(readout, config, resid), zoo.make("gpt2"))


def test_looking_for_the_gradient_leaves_random_masks_modes_and_flags_alone():
    resid = ResidualUpdateModelConfig("gpt", [0], attn=True)
    hparams = {"mask_unit": "neuron", "ablation": "zero_ablate"}
    circuit = CircuitConfig("hard_concrete", hparams, ["transformer.h.0.attn.c_*"])
    model = zoo.make("gpt2")
    probe = CircuitProbe(CircuitProbeConfig("attn_update_0", circuit, resid), model)
    alone = CircuitModel(circuit, zoo.make("gpt2"))
    assert probe.circuit.ablation == "zero_ablate"
    assert probe.training == alone.training
    for each in (probe.circuit, alone):
        each.train().set_ablate_mode("none")
    for a, b in zip(probe.circuit.interventions(), alone.interventions()):
        assert torch.equal(a.keep, b.keep)


def latent_attention():
    import transformers as tf

    torch.manual_seed(0)
    small = zoo._SMALL | {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 4}
    small |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "first_k_dense_replace": 2}
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**small)).eval()


def test_regression_queries_wider_than_values_are_cached_without_folding():
    model, data = task("deepseek_v3", model=latent_attention())
    probe = circuit_probe(model, "deepseek_v3", sites="model.layers.1.self_attn.*")
    rows = torch.arange(5)
    torch.testing.assert_close(
        Prefix(probe, data).vectors(rows), FullModel(probe, data).vectors(rows), rtol=1e-4, atol=1e-6
    )


def test_a_linear_layer_with_two_outputs_is_named():
    class Router(nn.Linear):
        def forward(self, x):
            logits = super().forward(x)
            return logits.softmax(-1), logits

    model = nn.Sequential(nn.Linear(4, 4), Router(4, 3))
    with (
        pytest.raises(MaskError, match="'1' returns a tuple"),
        intervened(model, [Intervention(find_sites(model, ["1"], "neuron")[0], torch.ones(3))]),
    ):
        model(torch.randn(2, 4))
