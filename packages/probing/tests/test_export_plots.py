"""Exported circuits compute what masked models compute; pictures show what the masks say."""

import pytest
import torch
import transformers as tf
import zoo
from test_evaluate import circuit_of

from probing import CircuitConfig, CircuitModel, MaskError, Masks, export_pruned, plots, pruned_state_dict
from probing._fit import Trace
from probing._structure import example_inputs
from probing.evaluate import Curve


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


CASES = {
    "neuron": ("gpt2", "transformer.h.*.mlp.c_*"),
    "input": ("llama", "model.layers.*.mlp.down_proj"),
    "weight": ("gpt2", "transformer.h.1.attn.c_attn"),
    "head": ("qwen3", "model.layers.*.self_attn.o_proj"),
    "expert": ("mixtral", "model.layers.*.mlp.experts"),
}


@pytest.mark.parametrize("unit", CASES)
def test_an_exported_circuit_is_the_masked_model(unit, tmp_path):
    kind, paths = CASES[unit]
    model = zoo.make(kind)
    circuit, batch = circuit_of(model, 0.5, unit, paths=[paths]), example_inputs(model)
    with circuit.applied(model) as masked:
        expected = logits(masked, batch)
    plain = logits(model, batch)
    export_pruned(model, circuit, tmp_path / "pruned")
    exported = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    torch.testing.assert_close(logits(exported.eval(), batch), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(model, batch), plain)
    assert Masks.load(tmp_path / "pruned/masks").equals(circuit)


def test_masked_biases_are_exported_too():
    model = zoo.make("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias.normal_()
    config = CircuitConfig(
        mask_hparams={"mask_unit": "neuron", "mask_bias": True}, target_layers=["transformer.h.0.mlp.c_fc"]
    )
    circuit, batch = CircuitModel(config, model).eval(), example_inputs(model)
    with torch.no_grad():
        for mask in circuit.site_masks.parameters():
            mask.normal_()
    expected = logits(circuit, batch)
    model.load_state_dict(pruned_state_dict(model, circuit.masks()))
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_exported_says_why():
    model = zoo.make("gpt2")
    with pytest.raises(MaskError, match="mask its neurons or heads"):
        pruned_state_dict(model, circuit_of(model, 0.5, "module", paths=["transformer.h.0.mlp"]))
    with pytest.raises(MaskError, match=r"tied to transformer\.wte\.weight"):
        pruned_state_dict(model, circuit_of(model, 0.5, paths=["lm_head"]))


class TestPlots:
    def test_bars_add_up_to_the_whole_and_name_every_site(self):
        model = zoo.make("gpt2")
        a, b = circuit_of(model, seed=1), circuit_of(model, seed=2)
        for circuits in ([a], [a, b]):
            axes = plots.kept_by_layer(circuits, ["a²", "b²"][: len(circuits)]).axes[0]
            widths = [bar.get_width() for bar in axes.patches]
            sites = len(a.sites)
            for site in range(sites):
                assert sum(widths[site::sites]) == pytest.approx(1)
            assert [text.get_text() for text in axes.get_yticklabels()] == list(a.sites)
        first = plots.kept_by_layer([a]).axes[0].patches[0].get_width()
        assert first == pytest.approx(a.keep[next(iter(a.sites))].float().mean().item())
        with pytest.raises(MaskError, match="one or two"):
            plots.kept_by_layer([a, a, a])

    def test_head_maps_have_a_row_a_layer(self):
        model = zoo.make("qwen3")
        circuit = circuit_of(model, 0.5, "head", paths=["model.layers.*.self_attn.o_proj"])
        image = plots.head_map(circuit).axes[0].images[0].get_array()
        assert image.tolist() == [mask.float().tolist() for mask in circuit.keep.values()]
        with pytest.raises(MaskError, match="unit 'head'"):
            plots.head_map(circuit_of(zoo.make("gpt2")))

    def test_overlap_curves_and_training(self, tmp_path):
        model = zoo.make("gpt2")
        circuits = [circuit_of(model, seed=seed) for seed in range(3)]
        figure = plots.overlap_map(circuits, ["1", "2", "3"])
        assert figure.axes[0].texts[0].get_text() == "1.00"
        curve = Curve([0, 0.5, 1], [0, 0.8, 1], 0.65, 0.35)
        line = plots.accuracy_by_size({"a": curve}).axes[0].lines[0]
        assert list(line.get_ydata()) == [0, 0.8, 1]
        figure = plots.training({"a": Trace([3.0, 2.0], [], [1.0, 2.0], 0.1)})
        figure.savefig(tmp_path / "loss.svg")
        assert (tmp_path / "loss.svg").stat().st_size > 1000
