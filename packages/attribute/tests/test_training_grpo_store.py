"""The store that a ``GRPOTrainer``'s completions leave, whatever wrote and interrupted them; and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from attribute_grpo import (
    PROMPTS,
    Gradients,
    epoch_of,
    mean_token,
    require_sums,
    trainer_of,
    whole,
)
from attribute_training import files_of

from attribute import (
    Attributor,
    GradientCollectorCallback,
    ModelError,
    load_gradient_dataset,
    prepare_for_gradient_collection,
)

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings(  # the libraries' own, of each other
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"
)


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


@pytest.mark.parametrize(
    ("save_steps", "event", "step"),
    [(1, "step_end", 2), (1, "substep_end", 1), (2, "epoch_end", 3), (2, "step_end", 4), (3, "save", 3)],
    ids=["in-an-epoch", "in-a-step", "after-an-epoch", "in-the-second-from-the-first", "before-an-epoch-is-written"],
)
def test_a_killed_training_leaves_the_same_bytes(save_steps, event, step, make_model, tokenizer, tmp_path):
    """Killed after its checkpoint and resumed from it: rows of steps that come again are not those that count."""

    class Killed(Exception):
        pass

    class Kill(transformers.TrainerCallback):
        pass

    def kill(args, state, control, **_):
        if state.global_step == step:
            raise Killed

    def sometimes(prompts, completion_ids, **_):
        found = mean_token(completion_ids, name=prompts)
        return [None if prompt == PROMPTS[0] else value for prompt, value in zip(prompts, found)]

    setattr(Kill, f"on_{event}", staticmethod(kill))
    options = {"save_strategy": "steps", "save_steps": save_steps, "num_train_epochs": 2, "reward": sometimes}
    found = []
    for killed in (False, True):
        path = tmp_path / f"{killed}"
        trainer = trainer_of(make_model("gpt2"), tokenizer, path, whole(path), **options)
        if killed:
            trainer.add_callback(Kill())
            with pytest.raises(Killed):
                trainer.train()
            trainer = trainer_of(make_model("gpt2"), tokenizer, path, whole(path), **options)
        trainer.train(resume_from_checkpoint=killed or None)
        assert epoch_of(path, 1).side("step").tolist() == [3] * 4 + [4] * 4 + [5] * 4
        found.append(files_of(path / "run"))
        if event == "save":  # TRL's sampler shuffles the second epoch as it did the first where it is resumed there
            found[-1] = {name: each for name, each in found[-1].items() if "epoch_0" in name}
    assert found[0]
    assert found[0] == found[1]


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
