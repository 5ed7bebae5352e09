"""Gradients of sampled completions: the rows of a step sum to the gradient that the optimiser is given."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from attribute import (
    Attributor,
    GradientCollectorCallback,
    ModelError,
    load_gradient_dataset,
    prepare_for_gradient_collection,
)
from gradstore import GradientStore

trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")

PROMPTS = ["the sea", "a hill in the rain", "old towns", "nine bakers keep lamps", "and", "where the hill is"]
pytestmark = pytest.mark.filterwarnings(  # the libraries' own, of each other
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)


def mean_token(completion_ids, **columns):
    """Hardly ever the same twice; it is handed the columns of the dataset and none of ours."""
    assert "trace_row" not in columns
    assert len(columns["name"]) == len(completion_ids)
    return [sum(ids) / len(ids) / 300 for ids in completion_ids]


class Gradients:
    """What the optimiser is given in each step, before it is clipped: module → [out, in]."""

    def __init__(self, trainer):
        self.steps = []
        clip = trainer._clip_grad_norm

        def before_clipping(model):
            self.steps.append(
                {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
            )
            return clip(model)

        trainer._clip_grad_norm = before_clipping

    def of(self, step, module, model):
        kind = type(model.get_submodule(module)).__name__
        ends = (f"{module}.weight",)
        (found,) = [each for name, each in self.steps[step].items() if name.endswith(ends)]
        return (found.T if kind == "Conv1D" else found).float().numpy()


def trainer_of(
    model,
    tokenizer,
    path,
    callback=None,
    *,
    reward=mean_token,
    peft_config=None,
    evaluated=None,
    prompts=PROMPTS,
    **options,
):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = "</s>", "left"
    defaults = {
        "output_dir": str(path / "out"),
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 6,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }
    data = datasets.Dataset.from_dict({"prompt": prompts, "name": [f"row {n}" for n in range(len(prompts))]})
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=trl.GRPOConfig(**{**defaults, **options}),
        train_dataset=data,
        eval_dataset=evaluated,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[callback] if callback else [],
    )
    return prepare_for_gradient_collection(trainer) if callback else trainer


def whole(path, **options):
    return GradientCollectorCallback(path / "run", projection_dim=0, track_order=True, **options)


def epoch_of(path, number=0):
    return GradientStore.open(path / "run" / "train" / f"epoch_{number}")


def close(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def require_sums(store, gradients, root, tolerance=1e-4, first=0):
    """Rows of every step add up to its gradient, in every module."""
    steps = store.side("step")
    assert sorted(set(steps.tolist())) == list(range(first, first + len(gradients.steps)))
    assert any(np.linalg.norm(gradients.of(step, name, root)) > 0 for name in store.columns for step in (0, 1))
    for step in range(len(gradients.steps)):
        for name in store.columns:
            rows = store.block(0, store.rows, [name])[steps == first + step]
            expected = gradients.of(step, name, root)
            close(rows.sum(0).reshape(expected.shape), expected, tolerance)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


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


def test_conversations(make_model, tokenizer, tmp_path):
    """Prompts of messages: completions are messages, and their tokens are theirs alone."""
    prompts = [[{"role": "user", "content": each}] for each in PROMPTS]
    trainer = trainer_of(make_model("llama"), tokenizer, tmp_path, whole(tmp_path), prompts=prompts)
    gradients = Gradients(trainer)
    trainer.train()
    store = epoch_of(tmp_path)
    require_sums(store, gradients, trainer.model.base_model)
    (message,) = store.data(0)["completion"]
    assert message["role"] == "assistant"
    assert store.data(0)["prompt"] == prompts[store.side("row")[0]]


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


def test_the_training_is_none_the_wiser(make_model, tokenizer, tmp_path):
    """With dropout, two passes over what was sampled and two epochs: the same bits with and without the callback."""
    weights = []
    for callback in (None, whole(tmp_path, normalizer="adam")):
        model = make_model("gpt2")
        trainer_of(model, tokenizer, tmp_path, callback, num_train_epochs=2, num_iterations=2).train()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    lines = [json.loads(line) for line in (tmp_path / "run" / "order.jsonl").read_text().splitlines()]
    for epoch in range(2):
        store = epoch_of(tmp_path, epoch)
        kept = zip(*(store.side(name).tolist() for name in ("row", "generation", "step")), strict=True)
        listed = [(each["row"], each["generation"], each["step"]) for each in lines if each["epoch"] == epoch]
        assert list(kept) == listed


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
    require_sums(store, gradients, trainer.model)


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


@pytest.mark.parametrize("generations", [2, 4])
def test_unscored_completions_and_evaluations(generations, make_model, tokenizer, tmp_path):
    """Where no reward function says anything; an evaluation between the steps samples too, and leaves no rows."""

    def sometimes(prompts, completion_ids, **_):
        return [
            None if prompt == PROMPTS[0] else value
            for prompt, value in zip(prompts, mean_token(completion_ids, name=prompts))
        ]

    model = make_model("gpt2")
    options = {"num_generations": generations, "steps_per_generation": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = trainer_of(
        model,
        tokenizer,
        tmp_path,
        whole(tmp_path),
        reward=sometimes,
        evaluated=datasets.Dataset.from_dict({"prompt": PROMPTS[:2], "name": ["", ""]}),
        num_generations_eval=2,
        per_device_eval_batch_size=2,
        **options,
    )
    gradients = Gradients(trainer)
    trainer.train()
    store = epoch_of(tmp_path)
    require_sums(store, gradients, model.base_model)
    assert store.rows == len(PROMPTS) * generations
    unscored = store.side("row") == 0
    assert (store.side("scored") == ~unscored).all()
    assert not store.side("reward")[unscored].any()
    assert not store.block(0, store.rows)[unscored].any()


def test_completions_that_another_engine_writes(make_model, tokenizer, tmp_path):
    """A stand-in for vLLM: the trainer corrects for the odds that it sampled by, which is part of its loss."""

    class Engine:
        def sync_weights(self):
            pass

        def generate(self, prompts, **_):
            draw = np.random.default_rng(len(prompts))
            ids = [draw.integers(2, 266, size=draw.integers(1, 7)).tolist() for _ in prompts]
            return None, ids, [[[-5.0]] * len(each) for each in ids], None

    model = make_model("gpt2")
    trainer = trainer_of(model, tokenizer, tmp_path, whole(tmp_path))
    trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Engine(), -1
    gradients = Gradients(trainer)
    trainer.train()
    store = epoch_of(tmp_path)
    require_sums(store, gradients, model.base_model)
    lengths = [len(store.data(number)["completion_ids"]) for number in range(store.rows)]
    assert store.side("tokens").tolist() == lengths
    assert len(set(lengths)) > 2


def test_a_resumed_training_has_every_step_once(make_model, tokenizer, tmp_path):
    """Killed one step after its checkpoint and resumed from it: that step's first rows are not those that count."""

    class Killed(Exception):
        pass

    class Kill(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                raise Killed

    options = {"save_strategy": "steps", "save_steps": 1, "num_generations": 2}
    stores = []
    for killed in (False, True):
        path = tmp_path / f"{killed}"
        trainer = trainer_of(without_dropout(make_model("gpt2")), tokenizer, path, whole(path), **options)
        if killed:
            trainer.args.save_steps = 1
            trainer.add_callback(Kill())
            with pytest.raises(Killed):
                trainer.train()
            trainer = trainer_of(without_dropout(make_model("gpt2")), tokenizer, path, whole(path), **options)
            trainer.train(resume_from_checkpoint=True)
        else:
            trainer.train()
        stores.append(epoch_of(path))
        assert not list((path / "run" / "train").glob("*.rows"))
    for name in ("row", "generation", "step"):
        assert stores[0].side(name).tolist() == stores[1].side(name).tolist()
    close(stores[1].block(0, stores[1].rows), stores[0].block(0, stores[0].rows))
    orders = [(tmp_path / f"{each}" / "run" / "order.jsonl").read_text() for each in (False, True)]
    assert orders[0] == orders[1]


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


def test_an_epoch_is_asked_and_read_as_any_index(make_model, tokenizer, tmp_path):
    model = make_model("gpt2")
    trainer_of(model, tokenizer, tmp_path, GradientCollectorCallback(tmp_path / "run")).train()
    model.eval()
    tokens = tokenizer("the sea and a hill", return_tensors="pt")["input_ids"]
    path = tmp_path / "run" / "train" / "epoch_0"
    with Attributor(path, unit_norm=True).trace(model.base_model, 3) as result:
        model(input_ids=tokens, labels=tokens).loss.backward()
    assert result.proponents(0)[0].record["completion"]
    dataset = load_gradient_dataset(path, cache_dir=tmp_path / "cache")
    assert {"prompt", "completion", "reward", "advantage", "step", "generation"} <= set(dataset.column_names)


def test_what_cannot_be_collected_is_refused(make_model, tokenizer, tmp_path):
    model = make_model("gpt2")
    with pytest.raises(ModelError, match="reduction='mean'"):
        trainer_of(model, tokenizer, tmp_path, whole(tmp_path, reduction="mean"))
    trainer = trainer_of(model, tokenizer, tmp_path)
    for column, message in (("completion", "rename_column"), ("image", "remove_columns")):
        callback = whole(tmp_path)
        trainer.callback_handler.callbacks = [callback]
        plain = trainer.train_dataset
        trainer.train_dataset = plain.add_column(column, ["x"] * len(plain))
        with pytest.raises(ModelError, match=message):
            prepare_for_gradient_collection(trainer)
        trainer.train_dataset = plain
    plain, trainer.train_dataset = trainer.train_dataset, [{"prompt": each} for each in PROMPTS]
    with pytest.raises(ModelError, match="load it as a datasets"):
        prepare_for_gradient_collection(trainer)
    trainer.train_dataset = plain
    trainer.args.use_liger_kernel = True
    with pytest.raises(ModelError, match="use_liger_kernel=False"):
        prepare_for_gradient_collection(trainer)


def test_a_module_that_is_passed_by_is_refused(make_model, tokenizer, tmp_path):
    """TRL multiplies with the output embedding's weight itself, where no hook sees it."""
    peft = pytest.importorskip("peft")
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    trainer = trainer_of(make_model("llama"), tokenizer, tmp_path, whole(tmp_path), peft_config=adapters)
    with pytest.raises(ModelError, match="learns, but its forward is never called"):
        trainer.train()
