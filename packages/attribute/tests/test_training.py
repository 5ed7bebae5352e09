"""Gradients taken from a training: equal to those collected afterwards, and the training is none the wiser."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from attribute_training import close, datasets, rows_of_tokens, trainer_of, transformers, without_dropout

from attribute import (
    Attributor,
    GradientCollectorCallback,
    IndexConfig,
    ModelError,
    RunError,
    collect_gradients,
    prepare_for_gradient_collection,
)
from gradcore import GradCoreError, Identity, ModuleGradient
from gradstore import GradientStore


@pytest.fixture
def data():
    return rows_of_tokens()


def posthoc(model, data, path, **options) -> np.ndarray:
    store = collect_gradients(model, data, path, config=IndexConfig(projection_dim=0, **options))
    return store.block(0, store.rows)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_rows_equal_those_collected_at_the_same_parameters(architecture, reduction, make_model, data, tmp_path):
    """With a learning rate of 0 every step has the same parameters: rows of all batches, sizes and places in one."""
    model = without_dropout(make_model(architecture))
    callback = GradientCollectorCallback(tmp_path / "run", projection_dim=0, reduction=reduction)
    trainer_of(model, data, tmp_path / "out", callback=callback, learning_rate=0.0, num_train_epochs=2).train()
    expected = posthoc(model, data, tmp_path / "posthoc", loss_reduction=reduction)
    for epoch in range(2):
        store = GradientStore.open(tmp_path / "run" / "train" / f"epoch_{epoch}")
        close(store.block(0, store.rows), expected)
        assert store.data(3)["name"] == "row 3"
        assert store.side("times").tolist() == [1] * 11
    assert not list((tmp_path / "run" / "train").glob("*.rows"))


def test_the_training_is_none_the_wiser(make_model, data, tmp_path):
    """Weights after two epochs with dropout are the same bits with and without the callback."""
    weights = []
    for callback in (None, GradientCollectorCallback(tmp_path / "run", track_order=True)):
        model = make_model("gpt2")
        trainer_of(model, data, tmp_path / "out", callback=callback, num_train_epochs=2).train()
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_order_says_which_step_a_row_was_in(make_model, data, tmp_path):
    callback = GradientCollectorCallback(tmp_path / "run", track_order=True)
    trainer_of(make_model("gpt2"), data, tmp_path / "out", callback=callback, num_train_epochs=2).train()
    lines = [json.loads(line) for line in (tmp_path / "run" / "order.jsonl").read_text().splitlines()]
    for epoch in range(2):
        of_epoch = [line for line in lines if line["epoch"] == epoch]
        assert sorted(line["row"] for line in of_epoch) == list(range(11))
        steps = [line["step"] for line in of_epoch]
        assert steps == sorted(steps)
        assert steps.count(steps[0]) == 4  # two batches of two rows make a step
    orders = [[line["row"] for line in lines if line["epoch"] == epoch] for epoch in range(2)]
    assert orders[0] != orders[1]


def test_the_first_step_sees_the_parameters_before_it(make_model, data, tmp_path):
    """A rate above 0: rows of the first step are those of the untrained model, later ones are not."""
    import copy

    model = without_dropout(make_model("gpt2"))
    before = copy.deepcopy(model)
    callback = GradientCollectorCallback(tmp_path / "run", projection_dim=0, track_order=True)
    trainer_of(model, data, tmp_path / "out", callback=callback).train()
    store = GradientStore.open(tmp_path / "run" / "train" / "epoch_0")
    lines = [json.loads(line) for line in (tmp_path / "run" / "order.jsonl").read_text().splitlines()]
    rows, expected = store.block(0, store.rows), posthoc(before, data, tmp_path / "posthoc")
    first = [line["row"] for line in lines if line["step"] == 0]
    late = [line["row"] for line in lines if line["step"] == 2]
    close(rows[first], expected[first])
    assert np.linalg.norm(rows[late] - expected[late]) > 1e-2 * np.linalg.norm(expected[late])


def test_scaled_by_the_rate_of_the_step(make_model, data, tmp_path):
    found = []
    for scale in (False, True):
        model = without_dropout(make_model("gpt2"))
        callback = GradientCollectorCallback(tmp_path / f"{scale}", scale_by_lr=scale)
        trainer_of(model, data, tmp_path / "out", callback=callback, lr_scheduler_type="constant").train()
        store = GradientStore.open(tmp_path / f"{scale}" / "train" / "epoch_0")
        found.append(store.block(0, store.rows))
    close(found[1], found[0] * 1e-2)


@pytest.mark.parametrize("projection_dim", [0, 4])
def test_rows_under_the_moments_of_their_step(projection_dim, make_model, data, tmp_path):
    """Every row, those of the first step too, is divided by the root of what Adam divides that step's gradient by."""
    moments, model = [], without_dropout(make_model("gpt2"))

    class Watch(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **_):
            corrected = 1 - 0.999 ** (state.global_step + 1)
            moments.append({id(each): optimizer.state[each]["exp_avg_sq"] / corrected for each in model.parameters()})

    plain = GradientCollectorCallback(tmp_path / "plain", projection_dim=0, include_bias=True, track_order=True)
    trainer_of(without_dropout(make_model("gpt2")), data, tmp_path / "out", callback=plain).train()
    scaled = GradientCollectorCallback(
        tmp_path / "adam", projection_dim=projection_dim, include_bias=True, normalizer="adam"
    )
    trainer = trainer_of(model, data, tmp_path / "out", callback=scaled)
    trainer.add_callback(Watch())
    trainer.train()
    stores = [GradientStore.open(tmp_path / each / "train" / "epoch_0") for each in ("plain", "adam")]
    lines = [json.loads(line) for line in (tmp_path / "plain" / "order.jsonl").read_text().splitlines()]
    assert len(moments) == 3
    for name in stores[0].columns:
        module = model.base_model.get_submodule(name)
        for line in lines:
            row, found = line["row"], moments[line["step"]]
            second = torch.cat([found[id(module.weight)].T, found[id(module.bias)][:, None]], 1)
            whole = torch.tensor(stores[0].block(row, row + 1, [name])).reshape(1, *second.shape)
            expected = ModuleGradient.formed(name, whole / (second.sqrt() + 1e-8)).sketch(scaled.sketch or Identity())
            close(stores[1].block(row, row + 1, [name]).ravel(), expected.numpy().ravel())


def test_an_optimiser_without_second_moments_is_refused(make_model, data, tmp_path):
    callback = GradientCollectorCallback(tmp_path / "run", normalizer="adam")
    with pytest.raises(GradCoreError, match="second moments"):
        trainer_of(make_model("gpt2"), data, tmp_path, callback=callback, optim="sgd").train()
    with pytest.raises(RunError, match="'adam' or None, not 'adamw'"):
        GradientCollectorCallback(tmp_path / "run", normalizer="adamw")


def test_a_resumed_training_has_all_rows(make_model, data, tmp_path):
    """Stopped in the middle of an epoch and resumed from its checkpoint: the same store as without the stop."""

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    stores = []
    for stopping in (False, True):
        model = without_dropout(make_model("gpt2"))
        options = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 1}
        path, out = tmp_path / f"run{stopping}", tmp_path / f"out{stopping}"
        trainer = trainer_of(model, data, out, callback=GradientCollectorCallback(path, track_order=True), **options)
        if stopping:
            trainer.add_callback(Stop())
            trainer.train()
            assert list((path / "train").glob("*.rows"))
            model = without_dropout(make_model("gpt2"))
            trainer = trainer_of(
                model, data, out, callback=GradientCollectorCallback(path, track_order=True), **options
            )
            trainer.train(resume_from_checkpoint=True)
        else:
            trainer.train()
        stores.append(GradientStore.open(path / "train" / "epoch_0"))
    close(stores[1].block(0, 11), stores[0].block(0, 11))
    assert stores[1].side("times").tolist() == [1] * 11
    orders = [(tmp_path / f"run{each}" / "order.jsonl").read_text() for each in (False, True)]
    assert orders[0] == orders[1]


def test_an_epoch_answers_as_an_index_does(make_model, data, tmp_path):
    """The row whose gradient is asked for is the nearest to itself."""
    model = without_dropout(make_model("gpt2"))
    trainer_of(
        model, data, tmp_path / "out", callback=GradientCollectorCallback(tmp_path / "run"), learning_rate=0.0
    ).train()
    attributor = Attributor(tmp_path / "run" / "train" / "epoch_0", unit_norm=True)
    with attributor.trace(model.base_model, 2) as result:
        ids, labels = (torch.tensor([data[4][name]]) for name in ("input_ids", "labels"))
        model(input_ids=ids, labels=labels).loss.backward()
    assert result.proponents(0)[0].record["name"] == "row 4"
    assert result.proponents(0)[0].score == pytest.approx(1, abs=1e-3)


def test_bfloat16(make_model, data, tmp_path):
    model = without_dropout(make_model("llama")).to(torch.bfloat16)
    callback = GradientCollectorCallback(tmp_path / "run", projection_dim=0)
    trainer_of(model, data, tmp_path / "out", callback=callback, learning_rate=0.0).train()
    store = GradientStore.open(tmp_path / "run" / "train" / "epoch_0")
    close(store.block(0, 11), posthoc(model, data, tmp_path / "posthoc"), 0.05)  # of 8 bits, summed in another order


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the libraries' own, of each other
def test_only_adapters_are_captured_of_a_model_with_lora(make_model, data, tmp_path):
    peft = pytest.importorskip("peft")
    model = without_dropout(make_model("llama"))
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    callback = GradientCollectorCallback(tmp_path / "run", projection_dim=0)
    trainer_of(wrapped, data, tmp_path / "out", callback=callback, learning_rate=0.0).train()
    store = GradientStore.open(tmp_path / "run" / "train" / "epoch_0")
    assert len(store.columns) == 8
    assert all("lora_" in name for name in store.columns)
    # By autograd: one row's summed loss.
    row = torch.tensor([data[4]["input_ids"]]), torch.tensor([data[4]["labels"]])
    wrapped.eval()
    logits = wrapped(input_ids=row[0]).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits[0], row[1][0, 1:], ignore_index=-100, reduction="sum").backward()
    inner = wrapped.base_model.model.model
    for name in store.columns:
        close(store.block(4, 5, [name]).ravel(), inner.get_submodule(name).weight.grad.numpy().ravel())
    for part in (wrapped, wrapped.base_model, wrapped.base_model.model, inner):
        with Attributor(store, unit_norm=True).trace(part, 1) as result:
            wrapped(input_ids=row[0], labels=row[1]).loss.backward()
        assert result.proponents(0)[0].record["name"] == "row 4"
        assert result.proponents(0)[0].score == pytest.approx(1, abs=1e-3)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("normalizer", [None, "adam"])
def test_a_trained_output_embedding_beside_adapters_is_captured_and_asked(normalizer, make_model, data, tmp_path):
    peft = pytest.importorskip("peft")
    model = without_dropout(make_model("llama"))
    torch.manual_seed(1)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **options))
    callback = GradientCollectorCallback(tmp_path / "run", projection_dim=0, normalizer=normalizer)
    trainer_of(wrapped, data, tmp_path / "out", callback=callback, learning_rate=0.0).train()
    store = GradientStore.open(tmp_path / "run" / "train" / "epoch_0")
    assert list(store.columns)[-1] == "lm_head.modules_to_save.default"
    assert store.block(0, 11, ["lm_head.modules_to_save.default"]).any(axis=1).all()
    ids, labels = (torch.tensor([data[4][name]]) for name in ("input_ids", "labels"))
    with Attributor(store, unit_norm=True).trace(wrapped.base_model, 1) as result:
        wrapped(input_ids=ids, labels=labels).loss.backward()
    assert normalizer or result.proponents(0)[0].record["name"] == "row 4"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_trl_fine_tuning(make_model, tokenizer, documents, tmp_path):
    trl = pytest.importorskip("trl")
    data = datasets.Dataset.from_dict({"text": documents[:6]})
    model = without_dropout(make_model("gpt2"))
    tokenizer.pad_token = "</s>"
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=3, num_train_epochs=1, learning_rate=0.0,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=False, activation_checkpointing=False,
        max_length=48,
    )  # fmt: skip
    callback = GradientCollectorCallback(tmp_path / "run", projection_dim=0)
    trainer = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[callback]
    )
    prepare_for_gradient_collection(trainer).train()
    store = GradientStore.open(tmp_path / "run" / "train" / "epoch_0")
    records = [{"input_ids": store.data(row)["input_ids"]} for row in range(6)]
    close(store.block(0, 6), posthoc(model, records, tmp_path / "posthoc"))


def test_what_cannot_be_told_apart_is_refused(make_model, data, tmp_path):
    model = make_model("gpt2")
    with pytest.raises(RunError, match="has no GradientCollectorCallback"):
        prepare_for_gradient_collection(trainer_of(model, data, tmp_path))
    callback = GradientCollectorCallback(tmp_path / "run")
    with pytest.raises(ModelError, match="label smoothing"):
        trainer_of(model, data, tmp_path, callback=callback, label_smoothing_factor=0.1)
    with pytest.raises(RunError, match="prepare_for_gradient_collection"):
        callback.on_train_begin(None, None, None, model=model)
    trainer_of(model, data, tmp_path, callback=callback)
    with pytest.raises(RunError, match="belongs to another trainer"):
        trainer_of(model, data, tmp_path, callback=callback)


def test_other_losses_are_refused(make_model, data, tmp_path):
    """A row's share of them is not its own cross-entropy, so the divisor that is taken out would be a wrong one."""

    class Weighted(transformers.Trainer):
        def compute_loss(self, *arguments, **options):
            return 2 * super().compute_loss(*arguments, **options)

    model = make_model("gpt2")
    trainer = trainer_of(model, data, tmp_path)
    trainer.callback_handler.callbacks.append(GradientCollectorCallback(tmp_path / "run"))

    def refused(match):
        with pytest.raises(ModelError, match=match):
            prepare_for_gradient_collection(trainer)

    trainer.args.loss_type = "dft"
    refused("set loss_type='nll'")
    del trainer.args.loss_type
    model.config.output_router_logits = True
    refused("auxiliary loss of a router")
    model.config.output_router_logits = False
    model.config.is_encoder_decoder = True
    refused("GPT2LMHeadModel, whose labels are not the next tokens")
    model.config.is_encoder_decoder = False
    trainer.__class__ = Weighted
    refused("of the trainer's own .*Weighted.compute_loss")


def test_a_dataset_that_hides_the_numbers_of_its_rows(make_model, data, tmp_path):
    trainer = trainer_of(make_model("gpt2"), data, tmp_path, callback=GradientCollectorCallback(tmp_path / "run"))
    trainer.train_dataset.set_transform(lambda rows: {name: rows[name] for name in ("input_ids", "labels")})
    with pytest.raises(ModelError, match="does not say which rows"):
        trainer.train()


def test_a_step_that_fails_leaves_no_hook_in_an_evaluation(make_model, data, tmp_path):
    model = make_model("gpt2")
    trainer = trainer_of(model, data, tmp_path, callback=GradientCollectorCallback(tmp_path / "run"))

    def fail(*_, **__):
        raise KeyboardInterrupt

    backward, trainer.accelerator.backward = trainer.accelerator.backward, fail
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.accelerator.backward = backward
    assert trainer.evaluate(data)["eval_loss"] > 0


def test_gradients_that_are_not_finite_are_told(make_model, data, tmp_path, caplog):
    """They are zeros in the store, which cannot hold others, but not silently."""
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[int(data[4]["input_ids"][0])] = float("nan")
    callback = GradientCollectorCallback(tmp_path / "run")
    trainer_of(model, data.select([4]), tmp_path, callback=callback, num_train_epochs=1).train()
    assert "rows [0] are not finite" in caplog.text
    assert not GradientStore.open(tmp_path / "run" / "train" / "epoch_0").block(0, 1).any()


def test_a_step_that_scaling_skips_has_zeros(make_model, data, tmp_path, monkeypatch):
    """With moments: other weights than the one that overflowed have gradients, and it is no fault that no row has."""
    accelerated = pytest.importorskip("accelerate.optimizer").AcceleratedOptimizer
    monkeypatch.setattr(accelerated, "step_was_skipped", property(lambda self: True))
    callback = GradientCollectorCallback(tmp_path / "run", normalizer="adam")
    trainer_of(make_model("gpt2"), data, tmp_path, callback=callback).train()
    assert not GradientStore.open(tmp_path / "run" / "train" / "epoch_0").block(0, 11).any()
