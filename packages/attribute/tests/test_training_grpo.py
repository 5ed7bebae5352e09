"""Gradients of sampled completions: the rows of a step sum to the gradient that the optimiser is given."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from attribute_grpo import (
    PROMPTS,
    Gradients,
    close,
    epoch_of,
    mean_token,
    require_sums,
    trainer_of,
    whole,
)
from attribute_training import without_dropout

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings(  # the libraries' own, of each other
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"steps_per_generation": 3, "num_iterations": 2},
        {"steps_per_generation": 1, "gradient_accumulation_steps": 3},
    ],
    ids=["plain", "reused", "sampled-often"],
)
def test_rows_of_a_step_sum_to_the_gradient_of_the_optimiser(loss_type, schedule, make_model, tokenizer, tmp_path):
    model = make_model("gpt2")
    trainer = trainer_of(
        model,
        tokenizer,
        tmp_path,
        whole(tmp_path),
        loss_type=loss_type,
        epsilon=0.05,
        **schedule,
    )
    gradients = Gradients(trainer)
    trainer.train()
    store = epoch_of(tmp_path)
    require_sums(store, gradients, model.base_model)
    iterations = schedule.get("num_iterations", 1)
    assert store.rows == len(PROMPTS) * 2 * iterations
    seen = list(zip(store.side("row").tolist(), store.side("generation").tolist()))
    assert sorted(seen) == sorted([(row, each) for row in range(len(PROMPTS)) for each in range(2)] * iterations)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "cispo"},
        {"loss_type": "sapo"},
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"loss_type": "vespo"},
        {"entropy_coef": 0.1},
        {"scale_rewards": "none", "delta": 1.1, "temperature": 0.7},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_other_losses_of_the_trainer(options, make_model, tokenizer, tmp_path):
    """Nothing here knows a loss: what the trainer differentiates is what is kept."""
    model = make_model("llama")
    trainer = trainer_of(model, tokenizer, tmp_path, whole(tmp_path), num_iterations=2, **options)
    gradients = Gradients(trainer)
    trainer.train()
    require_sums(epoch_of(tmp_path), gradients, model.base_model)


def test_a_row_is_the_gradient_of_its_own_completion(make_model, tokenizer, tmp_path):
    """By autograd, one completion at a time: on policy Dr. GRPO's is −A Σ_t ∇log π_t / (batch · length · batches)."""
    # Rotary positions: a prompt that is padded on its left is the prompt.
    model = without_dropout(make_model("llama"))
    before = copy.deepcopy(model).eval()
    trainer_of(model, tokenizer, tmp_path, whole(tmp_path), loss_type="dr_grpo", learning_rate=0.0).train()
    store = epoch_of(tmp_path)
    sides = {name: store.side(name) for name in store.manifest.side}
    groups = {}
    for number in range(store.rows):
        record = store.data(number)
        assert set(record) == {"prompt", "name", "completion", "completion_ids"}
        assert record["name"] == f"row {sides['row'][number]}"
        assert record["completion"] == tokenizer.decode(record["completion_ids"], skip_special_tokens=True)
        (reward,) = mean_token([record["completion_ids"]], name=[""])
        assert sides["reward"][number] == pytest.approx(reward)
        groups.setdefault(int(sides["row"][number]), []).append(number)
        prompt, ids = tokenizer(record["prompt"])["input_ids"], record["completion_ids"]
        assert sides["tokens"][number] == len(ids)
        tokens = torch.tensor([prompt + ids])
        scores = before(input_ids=tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        loss = -sides["advantage"][number] * scores.gather(1, torch.tensor(ids)[:, None]).sum() / (2 * 6 * 2)
        before.zero_grad()
        loss.backward()
        expected = [before.base_model.get_submodule(name).weight.grad.numpy().ravel() for name in store.columns]
        close(store.row(number), np.concatenate(expected))
    for numbers in groups.values():
        assert sorted(sides["generation"][numbers]) == [0, 1]
        rewards = sides["reward"][numbers]
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        assert sides["advantage"][numbers] == pytest.approx(expected, abs=1e-5)
    assert sides["scored"].all()
    assert len(set(sides["advantage"].tolist())) > 4


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_penalty_on_the_distance_from_the_reference(architecture, folders, tokenizer, tmp_path):
    """β > 0 and an entropy mask: parts of the trainer's own loss, and so of the rows; the reference is not captured."""
    options = {"beta": 0.1, "num_iterations": 2, "top_entropy_quantile": 0.5}
    trainer = trainer_of(str(folders[architecture]), tokenizer, tmp_path, whole(tmp_path), **options)
    gradients = Gradients(trainer)
    trainer.train()
    require_sums(epoch_of(tmp_path), gradients, trainer.model.base_model)


def test_adapters_with_their_base_as_the_reference(make_model, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    trainer = trainer_of(make_model("llama"), tokenizer, tmp_path, whole(tmp_path), beta=0.1, peft_config=adapters)
    gradients = Gradients(trainer)
    trainer.train()
    store = epoch_of(tmp_path)
    assert len(store.columns) == 8
    assert all("lora_" in name for name in store.columns)
    require_sums(store, gradients, trainer.model.base_model.model.model)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["autocast", "weights"])
def test_bfloat16(weights, make_model, tokenizer, tmp_path):
    model = make_model("llama").to(weights)
    trainer = trainer_of(model, tokenizer, tmp_path, whole(tmp_path), bf16=True)
    gradients = Gradients(trainer)
    trainer.train()
    require_sums(epoch_of(tmp_path), gradients, model.base_model, 0.05)  # of 8 bits, summed in another order


@pytest.mark.parametrize("normalizer", [None, "adam"])
def test_the_scale_of_float16_is_taken_out(normalizer, make_model, tokenizer, tmp_path):
    """Its loss is multiplied by 8 before the backward pass, its gradients are divided by 8 by the optimiser."""
    model = make_model("gpt2")
    callback = whole(tmp_path, normalizer=normalizer)
    trainer = trainer_of(model, tokenizer, tmp_path, callback, max_grad_norm=1e9, num_train_epochs=1)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    gradients = Gradients(trainer)
    trainer.train()
    for step in gradients.steps:
        for each in step.values():
            each /= 8
    store = epoch_of(tmp_path)
    if normalizer is None:
        require_sums(store, gradients, model.base_model)
        return
    for name in store.columns:
        gradient = gradients.of(0, name, model.base_model)
        summed = store.block(0, store.rows, [name])[store.side("step") == 0].sum(0).reshape(gradient.shape)
        close(summed, gradient / (np.abs(gradient) + 1e-8), 1e-3)


def test_the_first_step_of_adam_is_the_sign_of_the_gradient(make_model, tokenizer, tmp_path):
    """Rows that are scaled by the moments of their own step: v̂₁ = g², and later steps by what the optimiser holds."""
    model = make_model("gpt2")
    trainer = trainer_of(model, tokenizer, tmp_path, whole(tmp_path, normalizer="adam"), max_grad_norm=1e9)
    gradients, moments = Gradients(trainer), []

    class Watch(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **_):
            corrected = 1 - 0.999 ** (state.global_step + 1)
            moments.append({id(each): optimizer.state[each]["exp_avg_sq"] / corrected for each in model.parameters()})

    trainer.add_callback(Watch())
    trainer.train()
    store = epoch_of(tmp_path)
    assert store.meta["training"]["normalizer"] == "adam"
    for name in store.columns:
        weight = model.base_model.get_submodule(name).weight
        rows = store.block(0, store.rows, [name])
        for step in range(len(moments)):
            gradient = gradients.of(step, name, model.base_model)
            expected = gradient / (moments[step][id(weight)].T.numpy() ** 0.5 + 1e-8)
            summed = rows[store.side("step") == step].sum(0).reshape(expected.shape)
            close(summed, expected)
            if step == 0:
                clear = np.abs(gradient) > 1e-5
                assert clear.any()
                np.testing.assert_allclose(summed[clear], np.sign(gradient[clear]), atol=1e-2)
