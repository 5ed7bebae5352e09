"""The table of `docs/probing.md` names a test for each invariant; those without another home are here."""

import re
from pathlib import Path

import pytest
import torch
import transformers as tf
import zoo
from torch import nn

from probing import CircuitConfig, CircuitModel, SiteError, evaluate, find_sites

HERE = Path(__file__).parent
PAGE = HERE.parent.parent.parent / "docs/probing.md"


def test_every_test_the_page_names_exists():
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text(encoding="utf-8")))
    written = {name for file in HERE.glob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    modules = {file.stem for file in HERE.glob("test_*.py")}
    assert len(named) > 40
    assert named <= written | modules


def net_of(count=1, init=0.0, unit="weight"):
    net = nn.Sequential(*[nn.Linear(5, 5) for _ in range(count)])
    return CircuitModel(
        CircuitConfig(mask_hparams={"mask_unit": unit, "mask_init_value": init}, target_layers=["*"]), net
    )


def test_l0_of_soft_masks_is_their_sum_and_equal_layers_add_up():
    expected = torch.sigmoid(torch.tensor(0.75)).item()
    one, two = net_of(1, 0.75).train(), net_of(2, 0.75).train()
    assert one.l0_loss().item() == pytest.approx(25 * expected, rel=1e-6)
    assert two.l0_loss().item() == pytest.approx(50 * expected, rel=1e-6)
    assert two.eval().compute_l0_statistics()["total_l0"] == 50
    values = [net_of(1, init).train().l0_loss().item() for init in (-1.0, 0.0, 1.0)]
    assert values == sorted(values)
    assert values[0] < values[2]


def test_one_optimiser_step_moves_logits_and_nothing_else():
    circuit = CircuitModel(CircuitConfig(target_layers=["transformer.h.*"]), zoo.make("gpt2")).train()
    before = {name: tensor.clone() for name, tensor in circuit.state_dict().items()}
    ids = torch.randint(1, 90, (3, 6))
    optimiser = torch.optim.AdamW(circuit.parameters(), lr=0.1)
    circuit(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    moved = {name for name, tensor in circuit.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if name.startswith("site_masks")}


def resnet():
    torch.manual_seed(0)
    shape = {"num_channels": 3, "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic"}
    return tf.ResNetForImageClassification(tf.ResNetConfig(**shape, num_labels=3)).eval()


def test_convolutional_networks_can_be_masked_and_ablated():
    model, pixels = resnet(), torch.randn(4, 3, 16, 16)
    sites = find_sites(model, "resnet.encoder.stages.1.*.convolution", "neuron")
    assert {site.shape for site in sites} == {(12,)}
    config = CircuitConfig(
        mask_hparams={"mask_unit": "neuron"}, target_layers=["resnet.encoder.stages.1.*.convolution"]
    )
    plain = model(pixel_values=pixels).logits
    with CircuitModel(config, model) as circuit:
        circuit.train()(pixel_values=pixels, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        assert all((mask.logits.grad != 0).any() for mask in circuit.site_masks)
        with torch.no_grad():
            for mask in circuit.site_masks:
                mask.logits.normal_()
        masks = circuit.eval().masks()
        kept = circuit(pixel_values=pixels).logits
    assert torch.equal(model(pixel_values=pixels).logits, plain)
    assert not torch.allclose(kept, plain)
    torch.testing.assert_close(evaluate.Ablated(model, ~masks)(pixel_values=pixels).logits, kept)
    assert not any(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore")
def test_a_circuit_trains_under_the_trainer_and_its_temperature_rises(tmp_path):
    pytest.importorskip("accelerate")

    class Rising(tf.TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            model.temperature = 1.5**state.global_step

    model = zoo.make("gpt2")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    circuit = CircuitModel(CircuitConfig(target_layers=["transformer.h.*.mlp.c_*"], l0_lambda=1e-3), model)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(1, 90, (8, 6))]
    plan = tf.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=0.1, report_to=[], use_cpu=True,
        save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    tf.Trainer(model=circuit, args=plan, train_dataset=rows, callbacks=[Rising()]).train()
    assert circuit.temperature == 1.5**2
    assert all((mask.logits != 0).any() for mask in circuit.site_masks)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("unit", ["weight", "neuron", "input", "head", "module", "expert"])
def test_a_pattern_that_matches_nothing_says_so_for_every_unit(unit):
    with pytest.raises(SiteError, match="mlpp"):
        find_sites(zoo.make("qwen3_moe"), "model.layers.0.mlpp.*", unit)
