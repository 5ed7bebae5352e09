"""Probes: losses against their definition, the seed's semantics, and the cached path against the whole model."""

import pytest
import torch
import zoo
from torch import nn

from probing import (
    CircuitConfig,
    CircuitProbe,
    CircuitProbeConfig,
    ConfigError,
    DataError,
    MaskError,
    ProbeData,
    ResidualUpdateModelConfig,
    SiteError,
    SubnetworkProbe,
    SubnetworkProbeConfig,
    TrainPlan,
    fit,
)
from probing._losses import soft_nearest_neighbour
from probing._prefix import FullModel, Prefix
from probing._schedules import Constant, Geometric, PerStep, Ramp
from probing._structure import example_inputs, find_layout


def slow_snn(vectors, labels, keys=None):
    """Eq. 2 of Lepori et al. 2024, one pair at a time."""
    keys = vectors if keys is None else keys

    def cosine(a, b):
        return (a @ b) / (a.norm() * b.norm()) if a.norm() > 0 and b.norm() > 0 else (a * 0).sum()

    total = 0.0
    for i in range(len(vectors)):
        weights = [(j, torch.exp(cosine(vectors[i], keys[j]) - 1)) for j in range(len(vectors)) if j != i]
        own = sum((w for j, w in weights if labels[j] == labels[i]), torch.tensor(0.0))
        total = total - torch.log((own + 1e-5) / (sum(w for _, w in weights) + 1e-5))
    return total / len(vectors)


class TestSoftNearestNeighbour:
    @pytest.mark.parametrize("chunk", [2**24, 37])
    @pytest.mark.parametrize("linear", [False, True])
    def test_value_and_gradient_agree_with_the_definition(self, linear, chunk, monkeypatch):
        monkeypatch.setattr("probing._losses._CHUNK", chunk)
        v, labels = torch.randn(11, 4, requires_grad=True), torch.tensor([0, 0, 1, 1, 2, 2, 2, 1, 0, 3, 1])
        keys = torch.randn(11, 4) if linear else None
        expected = slow_snn(v, labels, keys)
        (gradient,) = torch.autograd.grad(expected, v)
        found = soft_nearest_neighbour(v, labels, keys)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(found * 3, v)[0], gradient * 3, rtol=1e-4, atol=1e-6)

    def test_several_probes_at_once(self):
        v, labels = torch.randn(3, 9, 5, requires_grad=True), torch.randint(0, 3, (3, 9))
        losses = soft_nearest_neighbour(v, labels)
        assert losses.shape == (3,)
        (together,) = torch.autograd.grad(losses.sum(), v)
        for p in range(3):
            single = soft_nearest_neighbour(v[p], labels[p])
            torch.testing.assert_close(losses[p], single)
            torch.testing.assert_close(together[p], torch.autograd.grad(single, v)[0][p])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_regression_zero_updates_have_a_loss_and_a_gradient(self, dtype):
        """In bias-free models an empty circuit writes zero, where NeuroSurgeon's cosine is NaN."""
        v = torch.zeros(6, 4, dtype=dtype, requires_grad=True)
        loss = soft_nearest_neighbour(v, torch.tensor([0, 1, 2, 0, 1, 2]))
        loss.backward()
        assert loss.item() == pytest.approx(torch.log(torch.tensor(5.0)).item(), rel=1e-4)
        assert torch.equal(v.grad, torch.zeros_like(v))

    def test_aligned_vectors_lose_less_than_shuffled_ones(self):
        labels = torch.arange(5).repeat(4)
        vectors = torch.eye(5)[labels] + 0.1 * torch.randn(20, 5)
        assert soft_nearest_neighbour(vectors, labels) < soft_nearest_neighbour(vectors, labels[torch.randperm(20)])

    def test_a_label_without_a_partner_is_a_constant_term(self):
        v = torch.randn(4, 3, requires_grad=True)
        assert torch.isfinite(soft_nearest_neighbour(v, torch.tensor([0, 1, 2, 3])))


SITES = {
    "bert": ("*.layer.1.attention.*", "*.layer.1.*.dense"),
    "gpt2": ("transformer.h.1.attn.c_*", "transformer.h.1.mlp.c_*"),
    "gpt_neox": ("*.layers.1.attention.*", "*.layers.1.mlp.dense*"),
    "llama": ("*.layers.1.self_attn.*_proj", "*.1.mlp.*_proj"),
    "gemma3": ("*.layers.1.self_attn.*_proj", "*.1.mlp.*_proj"),
    "opt": ("*.layers.1.self_attn.*_proj", "*.layers.1.fc*"),
    "bloom": ("transformer.h.1.self_attention.*", "transformer.h.1.mlp.dense*"),
    "vit": ("layers.1.attention.*", "layers.1.mlp.*"),
    "t5": ("decoder.block.1.layer.0.*", "decoder.block.1.layer.2.*"),
    "qwen3_moe": ("*.layers.1.self_attn.*_proj", None),
    "mpnet": ("*.layer.1.attention.*", "*.layer.1.output.dense"),
    "olmo2": ("*.layers.1.self_attn.*_proj", "*.1.mlp.*_proj"),
    "mistral": ("*.layers.1.self_attn.*_proj", "*.1.mlp.*_proj"),
    "convbert": ("*.layer.1.attention.output.*", None),
}


PLAN = TrainPlan(epochs=6, batch_size=5, lr=0.05)


def task(kind, rows=12, tokens=False, model=None):
    """Random rows and labels; one probed position a row, or several."""
    model = model if model is not None else zoo.make(kind)
    inputs = example_inputs(model, rows=rows, positions=5)
    generator = torch.Generator().manual_seed(4)
    probe_shape = (rows, 5)  # for vision models one class token and 2 × 2 patches
    mask = torch.zeros(probe_shape, dtype=torch.bool)
    if tokens:
        mask = torch.rand(probe_shape, generator=generator) < 0.5
        mask[:, 0] = True
    else:
        mask[torch.arange(rows), torch.randint(0, 5, (rows,), generator=generator)] = True
    labels = torch.randint(0, 3, (int(mask.sum()),), generator=generator)
    return model, ProbeData(inputs, labels, mask)


def circuit_probe(model, kind="gpt2", part="attn", readout="update", rule="continuous_sparsification", **more):
    sites = more.pop("sites", None) or SITES[kind][0 if part == "attn" else 1]
    resid = ResidualUpdateModelConfig(
        "auto",
        [1],
        updates=readout == "update",
        stream=readout == "stream",
        blocks=zoo.BLOCKS.get(kind),
        **{part: True},
    )
    circuit = CircuitConfig(rule, {"mask_unit": "neuron", **more.pop("hparams", {})}, [sites], **more)
    return CircuitProbe(CircuitProbeConfig(f"{part}_{readout}_1", circuit, resid), model)


@pytest.mark.parametrize("tokens", [False, True], ids=["sequence", "token"])
@pytest.mark.parametrize("part", ["attn", "mlp"])
@pytest.mark.parametrize("kind", SITES)
def test_the_cached_path_equals_the_whole_model_on_every_kind(kind, part, tokens):
    if SITES[kind][0 if part == "attn" else 1] is None:
        pytest.skip("no linear sites in this sub-block")
    model, data = task(kind, tokens=tokens)
    probe = circuit_probe(model, kind, part).train()
    with torch.no_grad():
        for mask in probe.circuit.site_masks:
            mask.logits.normal_()
    rows = torch.tensor([7, 2, 11, 3])
    probe.eval()
    fast, slow = Prefix(probe, data, batch_size=5), FullModel(probe, data)
    probe.train()
    parameters = list(probe.circuit.site_masks.parameters())
    found, expected = fast.vectors(rows), slow.vectors(rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad((v * weights).sum(), parameters) for v in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("unit", ["weight", "input", "head"])
def test_the_cached_path_knows_every_unit(unit):
    model, data = task("llama")
    sites = "*.layers.1.self_attn.o_proj" if unit == "head" else "*.layers.1.self_attn.*_proj"
    probe = circuit_probe(model, "llama", hparams={"mask_unit": unit}, sites=sites)
    with torch.no_grad():
        for mask in probe.circuit.site_masks:
            mask.logits.normal_()
    fast, slow = Prefix(probe, data), FullModel(probe, data)
    rows = torch.arange(6)
    torch.testing.assert_close(fast.vectors(rows), slow.vectors(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "unit", "sites"),
    [
        ("qwen3_moe", "expert", "model.layers.1.mlp.experts"),
        ("mixtral", "expert", "model.layers.*.mlp.experts"),
        ("llama", "module", ["model.layers.0.self_attn", "model.layers.*.mlp"]),
        ("gpt2", "module", ["transformer.h.0.attn", "transformer.h.0.mlp", "transformer.h.1.attn"]),
        ("gpt2", "neuron", "transformer.h.*.attn.c_*"),
    ],
)
def test_regression_every_step_from_the_cache_sees_the_same_prefix(kind, unit, sites):
    """Blocks are handed key-value caches, some as positional arguments: replayed ones must not fill up step by step."""
    model, data = task(kind)
    resid = ResidualUpdateModelConfig("auto", [1], mlp=True)
    config = CircuitConfig(mask_hparams={"mask_unit": unit}, target_layers=sites)
    probe = CircuitProbe(CircuitProbeConfig("mlp_update_1", config, resid), model)
    fast, slow, parameters = (
        Prefix(probe.eval(), data),
        FullModel(probe, data),
        list(probe.circuit.site_masks.parameters()),
    )
    probe.train()
    for step in range(3):
        rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(step))[:6]
        gradients = []
        for source in (fast, slow):
            weights = torch.randn(6, 16, generator=torch.Generator().manual_seed(step))
            gradients.append(torch.autograd.grad((source.vectors(rows) * weights).sum(), parameters))
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)
        assert any((g != 0).any() for g in gradients[0])


@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama", "t5", "opt"])
def test_the_cached_path_runs_several_blocks_and_streams(kind):
    model, data = task(kind)
    both = {"gpt2": "transformer.h.*.mlp.c_*", "bert": "encoder.layer.*.output.dense", "llama": "*.layers.*.mlp.*_proj",
            "t5": "decoder.block.*.layer.2.DenseReluDense.w*", "opt": "model.decoder.layers.*.fc*"}[kind]  # fmt: skip
    probe = circuit_probe(model, kind, "mlp", "stream", sites=both)
    fast, slow = Prefix(probe, data), FullModel(probe, data)
    assert len(fast._chain) == 2
    torch.testing.assert_close(fast.vectors(torch.arange(6)), slow.vectors(torch.arange(6)), rtol=1e-4, atol=1e-5)


def test_what_is_cached_is_what_should_be():
    """GPT-2: xW of the first layer replays; the MLP runs on probed rows, the attention on probed queries."""
    model, data = task("gpt2")
    attn, mlp = Prefix(circuit_probe(model), data), Prefix(circuit_probe(model, part="mlp"), data)
    assert (attn._fixed, attn._selects) == (["transformer.h.1.attn.c_attn"], "queries")
    assert (mlp._fixed, mlp._selects) == (["transformer.h.1.mlp.c_fc"], "root")
    neox = zoo.make("gpt_neox")
    assert Prefix(circuit_probe(neox, "gpt_neox", "mlp"), task("gpt_neox", model=neox)[1])._selects == "root"


@pytest.mark.parametrize("rule", ["continuous_sparsification", "hard_concrete", "gumbel_sigmoid"])
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_training_from_the_cache_gives_identical_masks(part, rule):
    logits = []
    for cache in (True, False):
        model, data = task("gpt2")
        probe = circuit_probe(model, part=part, rule=rule, l0_lambda=1e-4)
        fit(probe, data, PLAN, cache=cache)
        logits.append(torch.cat([mask.logits.detach().flatten() for mask in probe.circuit.site_masks]))
    assert (
        logits[0] - circuit_probe(task("gpt2")[0], rule=rule).circuit.site_masks[0].logits.flatten()[0]
    ).abs().max() > 0.05
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-5)


def test_padding_and_attention_masks_reach_the_cache():
    model = zoo.make("gpt2")
    ids = example_inputs(model, rows=8, positions=5)["input_ids"]
    attention = torch.ones_like(ids)
    attention[::2, 3:] = 0
    data = ProbeData.at_last({"input_ids": ids, "attention_mask": attention}, torch.arange(8) % 2)
    assert data.token_mask.int().argmax(1).tolist() == [2, 4] * 4
    probe = circuit_probe(model)
    rows = torch.tensor([0, 1, 5])
    torch.testing.assert_close(Prefix(probe, data).vectors(rows), FullModel(probe, data).vectors(rows))


def test_an_interrupted_run_continues_to_the_same_masks(tmp_path):
    def train(plan, **how):
        model, data = task("gpt2")
        probe = circuit_probe(model, rule="hard_concrete", l0_lambda=1e-4)
        fit(probe, data, plan, **how)
        return probe.circuit.masks().logits

    class Killed(Exception):
        pass

    def kill(step, steps, loss):
        if step == 7:
            raise Killed

    expected = train(PLAN)
    how = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 3}
    with pytest.raises(Killed):
        train(PLAN, progress=kill, **how)
    resumed = train(PLAN, **how)
    assert all(torch.equal(resumed[path], expected[path]) for path in expected)
    with pytest.raises(MaskError, match="another plan"):
        train(TrainPlan(epochs=6, batch_size=5, lr=0.01), **how)


class TestCheckpoints:
    """What continues a run is of that run: same plan, config, data and model."""

    def trained(self, path, change=lambda model, data: data, plan=PLAN, **more):
        model, data = task("gpt2")
        data = change(model, data)
        fit(circuit_probe(model, **more), data, plan, checkpoint=path, checkpoint_every=3)

    def other_labels(self, model, data):
        return ProbeData(data.inputs, (data.labels + 1) % 3, data.token_mask)

    def fewer_rows(self, model, data):
        return data.subset(torch.arange(10))

    def other_weights(self, model, data):
        with torch.no_grad():
            model.transformer.wte.weight.view(-1)[:2] = model.transformer.wte.weight.view(-1)[:2] * 2
        return data

    @pytest.mark.parametrize(
        ("change", "named"), [("other_labels", "data"), ("fewer_rows", "data"), ("other_weights", "model")]
    )
    def test_of_other_data_or_weights_is_refused(self, tmp_path, change, named):
        self.trained(tmp_path / "run.pt")
        with pytest.raises(MaskError, match=f"another {named}"):
            self.trained(tmp_path / "run.pt", getattr(self, change))

    def test_of_another_config_is_refused(self, tmp_path):
        self.trained(tmp_path / "run.pt")
        with pytest.raises(MaskError, match="another config"):
            self.trained(tmp_path / "run.pt", l0_lambda=0.5)

    def test_a_damaged_one_is_named_and_folders_are_made(self, tmp_path):
        self.trained(tmp_path / "new" / "folder" / "run.pt")
        (tmp_path / "bad.pt").write_bytes(b"no checkpoint")
        with pytest.raises(MaskError, match=r"bad.pt: not readable"):
            self.trained(tmp_path / "bad.pt")
        with pytest.raises(ConfigError, match="checkpoint_every"):
            fit(circuit_probe(task("gpt2")[0]), task("gpt2")[1], PLAN, checkpoint=tmp_path / "x", checkpoint_every=0)

    def test_schedules_may_be_plain_functions(self, tmp_path):
        plan = TrainPlan(epochs=6, batch_size=5, temperature=lambda step, steps: 1.0 + step)
        for _ in range(2):
            self.trained(tmp_path / "run.pt", plan=plan)


class TestHandingBack:
    def flags(self, model):
        return [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]

    def test_the_last_of_several_probes_gives_the_model_back(self):
        model, _ = task("gpt2")
        model.train()
        next(model.parameters()).requires_grad_(False)
        before = self.flags(model)
        probes = [circuit_probe(model) for _ in range(3)]
        for probe in probes[:2]:
            probe.close()
            assert not any(p.requires_grad for p in model.parameters())
        probes[2].close()
        probes[2].close()
        assert self.flags(model) == before

    def test_one_that_nobody_holds_any_more_does_not_keep_it(self):
        model, _ = task("gpt2")
        before = self.flags(model)
        probe = circuit_probe(model)
        probe = circuit_probe(model)
        probe.close()
        assert self.flags(model) == before

    @pytest.mark.parametrize("sites", ["transformer.h.1.mlp.*", "transformer.h.0.ln_9"])
    def test_a_probe_that_cannot_be_made_leaves_it_as_it_was(self, sites):
        model, _ = task("gpt2")
        model.train()
        before = self.flags(model)
        with pytest.raises(SiteError):
            circuit_probe(model, part="attn", sites=sites)
        assert self.flags(model) == before


class TestTargetSparsity:
    @pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.7, 1.0])
    def test_ties_do_not_fall_together(self, share):
        probe = circuit_probe(task("gpt2")[0])
        probe.circuit.threshold_to(share)
        masks = probe.circuit.masks()
        assert masks.size == round(share * masks.total)

    def test_neighbours_whose_middle_is_one_of_them(self):
        probe = circuit_probe(task("gpt2")[0])
        with torch.no_grad():
            for mask in probe.circuit.each():
                mask.logits.fill_(1.0)
                mask.logits[:3] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
        probe.circuit.threshold_to(3 / probe.circuit.masks().total)
        assert probe.circuit.masks().size == 3

    @pytest.mark.parametrize("rule", ["top_k"])
    def test_rules_that_fix_their_own_share_refuse_one(self, rule):
        model, data = task("gpt2")
        with pytest.raises(ConfigError, match="keeps a share of its own"):
            fit(circuit_probe(model, rule=rule), data, TrainPlan(epochs=1, target_sparsity=0.5))


@pytest.mark.parametrize(("kind", "sites"), [("gpt2", None), ("gpt_neo", "transformer.h.1.mlp.c_*"), ("llama", None)])
def test_half_precision_is_cached_as_it_is_computed(kind, sites):
    """The gelu in one operation rounds once, where bf16 models round eight times."""
    model, data = task(kind)
    model.bfloat16()
    probe = circuit_probe(model, kind, "mlp", sites=sites)
    rows = torch.arange(len(data))
    torch.testing.assert_close(Prefix(probe, data).vectors(rows), FullModel(probe, data).vectors(rows), rtol=0, atol=0)


class TestEncoderDecoders:
    def inputs(self):
        ids = torch.randint(48, 96, (8, 6), generator=torch.Generator().manual_seed(0))
        attention = torch.ones_like(ids)
        attention[::2, 4:] = 0
        return {"input_ids": ids, "attention_mask": attention, "decoder_input_ids": ids[:, :4].clone()}

    def test_the_probed_stack_says_which_positions_there_are(self):
        model, _ = task("t5")
        data = ProbeData.at_last(self.inputs(), torch.arange(8) % 2)
        with pytest.raises(DataError, match="decoder_input_ids"):
            fit(circuit_probe(model, "t5"), data, PLAN)
        data = ProbeData.at_last(self.inputs(), torch.arange(8) % 2, of="decoder_input_ids")
        assert data.token_mask.shape == (8, 4)
        fit(circuit_probe(model, "t5"), data, PLAN)

    def test_padding_of_the_encoder_is_not_probed(self):
        model, _ = task("t5")
        mask = torch.zeros(8, 6, dtype=torch.bool)
        mask[:, -1] = True
        resid = ResidualUpdateModelConfig("t5", [1], attn=True, blocks="encoder.block")
        circuit = CircuitConfig(target_layers=["encoder.block.1.layer.0.*"])
        probe = CircuitProbe(CircuitProbeConfig("attn_update_1", circuit, resid), model)
        with pytest.raises(DataError, match="says is padding"):
            fit(probe, ProbeData(self.inputs(), torch.arange(8) % 2, mask), PLAN)


class TestSeedSemantics:
    def setup_method(self):
        self.model, self.data = task("gpt2")
        self.ids, self.mask = self.data.inputs["input_ids"], self.data.token_mask

    def subnetwork(self, **more):
        resid = ResidualUpdateModelConfig("gpt", [1], mlp=True)
        circuit = CircuitConfig(
            "continuous_sparsification", {}, ["transformer.h.1.mlp.*"], l0_lambda=more.pop("l0_lambda", 0.0)
        )
        return SubnetworkProbe(SubnetworkProbeConfig("mlp_update_1", 3, circuit, resid, **more), self.model)

    def test_wrappers_nest_as_the_seed_has_them(self):
        probe = self.subnetwork()
        assert probe.wrapped_model.wrapped_model is probe.circuit
        assert probe.circuit.wrapped_model is self.model
        assert probe.base is self.model

    def test_regression_input_ids_reach_the_model_named_or_not(self):
        """NeuroSurgeon's last CircuitProbe drops input_ids on the way to the model."""
        for probe in (self.subnetwork().eval(), circuit_probe(self.model).eval()):
            by_name = probe(input_ids=self.ids, labels=self.data.labels, token_mask=self.mask)
            by_place = probe(self.ids, self.data.labels, self.mask)
            assert torch.equal(by_name.hidden_states, by_place.hidden_states)
            assert torch.equal(by_name.loss, by_place.loss)

    def test_outputs_are_dictionaries_or_tuples(self):
        probe = self.subnetwork().eval()
        output = probe(self.ids, self.data.labels, self.mask)
        assert set(output.keys()) == {"loss", "logits", "hidden_states", "labels"}
        assert output["loss"] is output.loss
        loss, logits, vectors = probe(self.ids, self.data.labels, self.mask, return_dict=False)
        assert torch.equal(loss, output.loss)
        assert logits.shape == (12, 3)
        assert vectors.shape == (12, 16)
        loss, vectors = circuit_probe(self.model)(self.ids, self.data.labels, self.mask, return_dict=False)
        assert vectors.shape == (12, 16)

    def test_regression_labels_may_be_absent(self):
        output = self.subnetwork()(self.ids, token_mask=self.mask)
        assert output.loss is None
        assert output.logits.shape == (12, 3)
        assert circuit_probe(self.model)(self.ids, token_mask=self.mask).loss is None

    def test_regression_l0_is_in_the_subnetwork_probes_loss(self):
        """NeuroSurgeon's loss is the same for λ = 0 and λ = 1 (1.08484 both)."""
        base, heavy = self.subnetwork().train(), self.subnetwork(l0_lambda=0.01).train()
        plain = base(self.ids, self.data.labels, self.mask).loss
        penalised = heavy(self.ids, self.data.labels, self.mask).loss
        assert penalised.item() == pytest.approx(plain.item() + 0.01 * heavy.circuit.l0_loss().item(), rel=1e-5)
        penalised.backward()
        assert (heavy.circuit.site_masks[0].logits.grad > 0).float().mean() > 0.5
        assert (
            base.eval()(self.ids, self.data.labels, self.mask).loss
            == heavy.eval()(self.ids, self.data.labels, self.mask).loss
        )

    def test_circuit_probe_adds_the_penalty_too(self):
        probe = circuit_probe(self.model, l0_lambda=0.01).train()
        output = probe(self.ids, self.data.labels, self.mask)
        expected = soft_nearest_neighbour(output.hidden_states, self.data.labels) + 0.01 * probe.circuit.l0_loss()
        torch.testing.assert_close(output.loss, expected)

    def test_the_linear_loss_compares_with_the_full_models_vectors(self):
        probe = circuit_probe(self.model)
        probe.config.loss = "linear"
        output = probe.train()(self.ids, self.data.labels, self.mask)
        full = find_layout(self.model, [1])[0].attn
        seen = []
        handle = self.model.get_submodule(full).register_forward_hook(lambda m, a, o: seen.append(o[0]))
        with torch.no_grad():
            self.model(self.ids)
        handle.remove()
        expected = slow_snn(output.hidden_states, self.data.labels, seen[0][self.mask])
        loss = output.loss - probe.penalty()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        assert all(mask.active for mask in probe.circuit.site_masks)
        fit(probe, self.data, TrainPlan(epochs=1, batch_size=6))

    def test_token_labels_may_be_padded_in_place(self):
        mask = torch.zeros(12, 5, dtype=torch.bool)
        mask[:, 1:3] = True
        labels = torch.full((12, 5), -100)
        labels[mask] = torch.arange(24) % 3
        probe = self.subnetwork(labeling="token").eval()
        output = probe(self.ids, labels, mask)
        assert torch.equal(output.labels, labels[mask])
        expected = nn.functional.cross_entropy(output.logits, labels[mask])
        torch.testing.assert_close(output.loss, expected)

    def test_an_mlp_probe_is_linear_relu_linear(self):
        probe = self.subnetwork(intermediate_size=7)
        assert [type(layer).__name__ for layer in probe.probe] == ["Linear", "ReLU", "Linear"]
        assert probe(self.ids, token_mask=self.mask).logits.shape == (12, 3)

    def test_without_sites_it_is_an_ordinary_probe_that_trains(self):
        resid = ResidualUpdateModelConfig("gpt", [1], mlp=True)
        config = SubnetworkProbeConfig("mlp_update_1", 3, CircuitConfig(target_layers=[]), resid)
        probe = SubnetworkProbe(config, self.model)
        trace = fit(probe, self.data, TrainPlan(epochs=80, batch_size=12, probe_lr=0.05))
        assert trace.loss[-1] < 0.5 * trace.loss[0]

    def test_only_masks_and_head_train_and_train_returns_self(self):
        probe = self.subnetwork()
        assert probe.train() is probe
        assert not any(module.training for module in self.model.modules())
        trainable = {name.split(".")[0] for name, p in probe.named_parameters() if p.requires_grad}
        assert trainable == {"wrapped_model", "probe"}
        assert not any(p.requires_grad for p in self.model.parameters())
        probe.close()
        assert all(p.requires_grad for p in self.model.parameters())

    def test_images_can_be_probed(self):
        """NeuroSurgeon advertises ViT but cannot take pixels."""
        model, data = task("vit")
        probe = circuit_probe(model, "vit")
        output = probe(pixel_values=data.inputs["pixel_values"], labels=data.labels, token_mask=data.token_mask)
        assert output.hidden_states.shape == (12, 16)

    def test_configs_survive_a_round_trip(self, tmp_path):
        config = self.subnetwork(intermediate_size=7).config
        config.save_pretrained(tmp_path)
        again = SubnetworkProbeConfig.from_pretrained(tmp_path)
        assert again.to_dict() == config.to_dict()
        assert isinstance(again.circuit_config, CircuitConfig)
        probe = circuit_probe(self.model)
        probe.config.save_pretrained(tmp_path)
        assert CircuitProbeConfig.from_pretrained(tmp_path).to_dict() == probe.config.to_dict()


class TestSparsityControl:
    @pytest.mark.parametrize("target", [0.3, 0.8])
    def test_the_lagrangian_reaches_its_target(self, target):
        model, data = task("gpt2", rows=20)
        probe = circuit_probe(model, part="mlp", rule="hard_concrete", hparams={"mask_init_percentage": 0.9})
        plan = TrainPlan(epochs=200, batch_size=20, lr=0.05, weight_decay=0.0, target_sparsity=target)
        trace = fit(probe, data, plan)
        assert 1 - trace.kept[-1] == pytest.approx(target, abs=0.03)
        masks = probe.circuit.masks()
        assert masks.size == round((1 - target) * masks.total)

    def test_schedules(self):
        assert [Constant(2.0)(s, 9) for s in (0, 9)] == [2.0, 2.0]
        assert Geometric(1, 200)(0, 90) == 1
        assert Geometric(1, 200)(90, 90) == pytest.approx(200)
        jumps = Geometric(1, 200, jumps=3)
        assert [jumps(s, 9) for s in (0, 1, 2)] == [1.0] * 3
        assert jumps(3, 9) == pytest.approx(200 ** (1 / 3))
        assert PerStep(1.001)(1000, 5) == pytest.approx(1.001**1000)
        assert [Ramp()(s, 100) for s in (0, 25, 50, 75, 100)] == [0, 0, 0.5, 1, 1]

    def test_training_ends_when_all_units_have_decided(self):
        model, data = task("gpt2")
        probe = circuit_probe(model)
        plan = TrainPlan(epochs=400, batch_size=12, lr=0.05, temperature=Geometric(1, 1e4), stop_undecided=0.05)
        trace = fit(probe, data, plan)
        assert len(trace.loss) < 400
        probe.circuit.temperature = trace.temperature[-1]
        assert probe.circuit.undecided() < 0.05


class TestBadInput:
    def setup_method(self):
        self.model, self.data = task("gpt2")
        self.ids, self.mask, self.labels = self.data.inputs["input_ids"], self.data.token_mask, self.data.labels

    def test_labels_of_one_class(self):
        with pytest.raises(DataError, match="one class"):
            ProbeData(self.data.inputs, torch.zeros(12, dtype=torch.long), self.mask)

    def test_a_batch_of_one_class_or_one_row_has_the_loss_zero(self):
        """The last batch of an epoch may be such a one."""
        for rows in (12, 1):
            probe = circuit_probe(self.model, l0_lambda=0.0).train()
            loss = probe(self.ids[:rows], torch.ones(rows, dtype=torch.long), self.mask[:rows]).loss
            loss.backward()
            assert loss.item() == pytest.approx(0.0, abs=1e-6)
            assert all(mask.logits.grad.abs().max() < 1e-6 for mask in probe.circuit.each())

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.int32, list, "numpy"])
    def test_labels_of_any_integer_type(self, dtype):
        labels = (self.labels > 0).long()
        given = {list: labels.tolist, "numpy": labels.numpy}.get(dtype, lambda: labels.to(dtype))()
        data = ProbeData(self.data.inputs, given, self.mask)
        assert data.labels.dtype == torch.int64
        assert torch.equal(data.labels, labels)
        assert torch.isfinite(circuit_probe(self.model)(self.ids, given, self.mask).loss)

    @pytest.mark.parametrize("labels", [[0.5] * 12, ["a"] * 12, [10**12] * 12])
    def test_labels_that_are_no_class_numbers(self, labels):
        with pytest.raises(DataError, match="label"):
            ProbeData(self.data.inputs, labels, self.mask)

    def test_a_token_mask_that_selects_nothing(self):
        with pytest.raises(DataError, match="selects no position"):
            circuit_probe(self.model)(self.ids, self.labels, torch.zeros_like(self.mask))

    def test_a_missing_or_misshapen_token_mask(self):
        with pytest.raises(DataError, match="token_mask is missing"):
            circuit_probe(self.model)(self.ids, self.labels)
        with pytest.raises(DataError, match="boolean"):
            ProbeData(self.data.inputs, self.labels, self.mask.long())
        with pytest.raises(DataError, match="rows and positions"):
            circuit_probe(self.model)(self.ids, token_mask=self.mask[:, :3])

    def test_counts_and_places_that_disagree(self):
        with pytest.raises(DataError, match="12 positions, but there are 11 labels"):
            circuit_probe(self.model)(self.ids, self.labels[:-1], self.mask)
        labels = torch.full((12, 5), -100)
        labels[:, 0] = 1
        mask = torch.zeros(12, 5, dtype=torch.bool)
        mask[:, 1] = True
        with pytest.raises(DataError, match="disagree about which positions"):
            ProbeData(self.data.inputs, labels, mask)
        with pytest.raises(DataError, match="first axes disagree"):
            ProbeData({"input_ids": self.ids[:3]}, self.labels, self.mask)

    def test_sequence_labelling_of_several_positions(self):
        resid = ResidualUpdateModelConfig("gpt", [1], mlp=True)
        probe = SubnetworkProbe(SubnetworkProbeConfig("mlp_update_1", 3, CircuitConfig(), resid), self.model)
        with pytest.raises(DataError, match="labeling='token'"):
            probe(self.ids, token_mask=torch.ones_like(self.mask))
        with pytest.raises(DataError, match="out of range"):
            probe(self.ids, self.labels + 1, self.mask)

    def test_a_readout_the_config_does_not_remember(self):
        with pytest.raises(ConfigError, match="make the two agree"):
            CircuitProbeConfig("attn_update_0", CircuitConfig(), ResidualUpdateModelConfig("gpt", [0], mlp=True))

    def test_a_base_that_trains(self):
        resid = ResidualUpdateModelConfig("gpt", [0], mlp=True)
        with pytest.raises(ConfigError, match="freeze_base"):
            CircuitProbeConfig("mlp_update_0", CircuitConfig(freeze_base=False), resid)

    def test_rules_without_parameters_cannot_be_trained(self):
        with pytest.raises(ConfigError, match="nothing to train"):
            fit(circuit_probe(self.model, rule="magnitude_pruning"), self.data, PLAN)

    def test_two_pressures_at_once(self):
        with pytest.raises(ConfigError, match="choose one"):
            TrainPlan(target_sparsity=0.5, l0_lambda=Constant(1.0))
