"""A training that is killed and resumed leaves the very files of one that was not, and drops no other's rows."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from attribute_training import files_of, rows_of_tokens, trainer_of, transformers

from attribute import GradientCollectorCallback, ModelError, RunError
from gradstore import GradientStore

OPTIONS = {"save_strategy": "steps", "num_train_epochs": 2}  # of three steps, each of two batches


@pytest.fixture
def data():
    return rows_of_tokens()


class Killed(Exception):
    pass


class Kill(transformers.TrainerCallback):
    """An end at one place of a training, after the collector's callback has had its turn there."""

    def __init__(self, event, step):
        def kill(args, state, control, **_):
            if state.global_step == step:
                raise Killed

        setattr(self, f"on_{event}", kill)


def collector(path, **options):
    return GradientCollectorCallback(path, **{"projection_dim": 4, "track_order": True, **options})


def killed(make_model, data, tmp_path, kills, resume=True, sampler=None, collected=None, **options):
    """The files of a training that ends at each ``(event, step)`` and is resumed; the model has its dropout."""
    run, out = tmp_path / f"run{len(kills)}", tmp_path / f"out{len(kills)}"
    for number, kill in enumerate([*kills, None]):
        callback = collector(run, **collected or {})
        trainer = trainer_of(make_model("gpt2"), data, out, callback=callback, **{**OPTIONS, **options})
        if sampler is not None:
            trainer._get_train_sampler = lambda *_: sampler
        if kill is None:
            trainer.train(resume_from_checkpoint=resume if number else None)
            return files_of(run)
        trainer.add_callback(Kill(*kill))
        with pytest.raises(Killed):
            trainer.train(resume_from_checkpoint=resume if number else None)
    raise AssertionError


@pytest.mark.parametrize(
    ("save_steps", "kills"),
    [
        (1, [("step_end", 2)]),
        (1, [("substep_end", 1)]),
        (2, [("epoch_end", 3)]),
        (2, [("step_end", 4)]),
        (2, [("step_end", 5)]),
        (3, [("save", 3)]),
        (3, [("save", 6)]),
        (2, [("train_end", 6)]),
        (2, [("step_end", 4), ("epoch_end", 3), ("substep_end", 5), ("train_end", 6)]),
    ],
    ids=[
        "in-an-epoch",
        "in-a-step",
        "after-an-epoch",
        "in-the-second-from-the-first",
        "in-the-second",
        "before-an-epoch-is-written",
        "before-the-last-is-written",
        "when-all-is-written",
        "often",
    ],
)
@pytest.mark.parametrize("collected", [{}, {"normalizer": "adam"}], ids=["plain", "adam"])
def test_a_killed_training_leaves_the_same_bytes(save_steps, kills, collected, make_model, data, tmp_path):
    expected = killed(make_model, data, tmp_path, [], save_steps=save_steps, collected=collected)
    assert "order.jsonl" in expected
    assert {name.split("/")[1] for name in expected if "/" in name} == {"epoch_0", "epoch_1"}
    assert killed(make_model, data, tmp_path, kills, save_steps=save_steps, collected=collected) == expected


@pytest.mark.parametrize("kills", [[("step_end", 2)], [("step_end", 5)], [("save", 3)]])
def test_rows_that_a_sampler_draws_again(kills, make_model, data, tmp_path):
    sampler = [0, 5, 0, 3, 1, 0, 5, 2, 7, 0, 9]
    options = {"save_steps": 1 if kills[0][1] == 2 else 3, "sampler": sampler}
    expected = killed(make_model, data, tmp_path, [], **options)
    store = GradientStore.open(tmp_path / "run0" / "train" / "epoch_0")
    assert store.side("times").tolist() == np.bincount(sampler, minlength=11).tolist()
    assert store.side("step").tolist() == [2, 1, 1, 0, -1, 1, -1, 2, -1, 2, -1]
    assert killed(make_model, data, tmp_path, kills, **options) == expected


def test_a_sum_of_a_finished_epoch_is_not_taken_apart(make_model, data, tmp_path):
    with pytest.raises(RunError, match="row 0 came 2 times"):
        killed(make_model, data, tmp_path, [("epoch_end", 3)], save_steps=2, sampler=[0, 5, 2, 3, 1, 0, 6, 7, 8])


def test_one_trainer_that_is_interrupted_and_resumed(make_model, data, tmp_path):
    """As in a notebook: hooks that the interrupted training left are gone, and its open epoch too."""
    expected = killed(make_model, data, tmp_path, [], save_steps=1)
    model = make_model("gpt2")
    trainer = trainer_of(model, data, tmp_path / "out", callback=collector(tmp_path / "run"), save_steps=1, **OPTIONS)
    kill = Kill("step_end", 2)
    trainer.add_callback(kill)
    with pytest.raises(Killed):
        trainer.train()
    trainer.remove_callback(kill)
    trainer.train(resume_from_checkpoint=True)
    assert files_of(tmp_path / "run") == expected
    assert not any(module._forward_hooks for module in model.modules())


def test_a_training_that_is_made_longer(make_model, data, tmp_path):
    """The last epoch of the shorter one was written though it was not whole: it is taken up again."""
    expected = killed(make_model, data, tmp_path, [], save_steps=2, lr_scheduler_type="constant")
    options = {**OPTIONS, "save_steps": 2, "lr_scheduler_type": "constant"}
    for steps in (4, 6):
        trainer = trainer_of(
            make_model("gpt2"), data, tmp_path / "out", callback=collector(tmp_path / "run"), max_steps=steps, **options
        )
        trainer.train(resume_from_checkpoint=steps == 6)
        store = GradientStore.open(tmp_path / "run" / "train" / "epoch_1")
        assert store.side("times").sum() == (4 if steps == 4 else 11)
    assert files_of(tmp_path / "run") == expected


def test_going_back_by_an_epoch_says_so(make_model, data, tmp_path, caplog):
    """Finished epochs of the run itself are made again, with a word; files that a killed writer left are no matter."""
    expected = killed(make_model, data, tmp_path, [], save_steps=1)
    run = tmp_path / "run0"
    (run / "train" / "epoch_0.rows").mkdir()  # its store was listed, and a kill came before this was gone
    (run / "train" / "epoch_0.rows" / "rows.f32").write_bytes(b"torn")
    with (run / "order.jsonl").open("a") as stream:
        stream.write('{"row": 3, "st')
    trainer = trainer_of(make_model("gpt2"), data, tmp_path / "out0", callback=collector(run), save_steps=1, **OPTIONS)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out0" / "checkpoint-2"))
    assert files_of(run) == expected
    assert "epoch_0 has the steps 0 to 2" in caplog.text
    assert "epoch_1 has the steps 3 to 5" in caplog.text


def test_an_epoch_half_written(make_model, data, tmp_path):
    """Killed while the store was written: the log still has all."""
    expected = killed(make_model, data, tmp_path, [], save_steps=3)
    run, out = tmp_path / "run", tmp_path / "out"
    trainer = trainer_of(make_model("gpt2"), data, out, callback=collector(run), save_steps=3, **OPTIONS)
    trainer.add_callback(Kill("save", 3))
    with pytest.raises(Killed):
        trainer.train()
    shutil.copytree(tmp_path / "run0" / "train" / "epoch_0", run / "train" / "epoch_0")
    (run / "train" / "epoch_0" / "manifest.json").unlink()
    trainer = trainer_of(make_model("gpt2"), data, out, callback=collector(run), save_steps=3, **OPTIONS)
    trainer.train(resume_from_checkpoint=True)
    assert files_of(run) == expected


def test_rows_of_another_training_are_not_touched(make_model, data, tmp_path):
    """Whatever cannot be told to be the run's own is refused before the first step, and nothing changes."""
    run, out = tmp_path / "run0", tmp_path / "out0"
    before = killed(make_model, data, tmp_path, [], save_steps=1)

    def train(match, checkpoint=None, error=RunError, collected=None, **options):
        callback = collector(run, **collected or {})
        trainer = trainer_of(
            make_model("gpt2"), data, tmp_path / "other", callback=callback, **{**OPTIONS, "save_steps": 1, **options}
        )
        with pytest.raises(error, match=match):
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        assert files_of(run) == before

    train("exists already, and this training is resumed from none")
    plain = trainer_of(make_model("gpt2"), data, tmp_path / "plain", save_steps=2, **OPTIONS)
    plain.train()
    train("at step 2 that is not known to be of the same run", tmp_path / "plain" / "checkpoint-2")
    last = out / "checkpoint-5"
    train("another reduction .'sum' before, 'mean' now.", last, collected={"reduction": "mean"})
    train("another normalizer .None before, 'adam' now.", last, collected={"normalizer": "adam"})
    train("another scale_by_lr", last, collected={"scale_by_lr": True})
    train("another plan: ", last, collected={"projection_dim": 2})
    train("ignore_data_skip", last, ModelError, ignore_data_skip=True)
    about = json.loads((run / "run.json").read_text())
    shutil.rmtree(run / "train" / "epoch_1")
    del about["epochs"]["1"]
    (run / "run.json").write_text(json.dumps(about))
    before = files_of(run)
    train("rows up to step 3 only, and the checkpoint is of step 5", last)
    (run / "run.json").unlink()
    train("exists already", last)


def test_collecting_from_a_checkpoint_on(make_model, data, tmp_path, caplog):
    """A training that collected nothing is resumed with the callback: a word, and rows that are not there have none."""
    out = tmp_path / "out"
    trainer_of(make_model("gpt2"), data, out, save_steps=2, **{**OPTIONS, "num_train_epochs": 1}).train()
    trainer = trainer_of(make_model("gpt2"), data, out, callback=collector(tmp_path / "run"), save_steps=1, **OPTIONS)
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert "no rows of the 2 steps before" in caplog.text
    stores = [GradientStore.open(tmp_path / "run" / "train" / f"epoch_{number}") for number in range(2)]
    assert [store.side("times").sum() for store in stores] == [3, 11]
    assert not stores[0].block(0, 11)[stores[0].side("times") == 0].any()


def test_other_batches_after_a_resumption(make_model, data, tmp_path):
    """The trainer counts its epochs by the steps of other batches: rows would go to the wrong one."""
    out, run = tmp_path / "out", tmp_path / "run"
    trainer = trainer_of(make_model("gpt2"), data, out, callback=collector(run), save_steps=1, **OPTIONS)
    trainer.add_callback(Kill("step_end", 3))
    with pytest.raises(Killed):
        trainer.train()
    trainer = trainer_of(
        make_model("gpt2"), data, out, callback=collector(run), save_steps=1,
        **{**OPTIONS, "gradient_accumulation_steps": 3},
    )  # fmt: skip
    with pytest.raises(RunError, match="epoch 0 has not ended"):
        trainer.train(resume_from_checkpoint=True)


def test_an_epoch_that_a_callback_cuts_short_is_refused(make_model, data, tmp_path):
    class Short(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_epoch_stop = state.global_step == 2

    trainer = trainer_of(make_model("gpt2"), data, tmp_path / "out", callback=collector(tmp_path / "run"), **OPTIONS)
    trainer.add_callback(Short())
    with pytest.raises((RunError, ModelError), match="cut"):
        trainer.train()
    assert torch.is_grad_enabled()
