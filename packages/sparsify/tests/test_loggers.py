"""Trackers: the real TensorBoard where it is installed, stand-ins with the same calls for the others."""

import sys
from types import SimpleNamespace

import pytest
from small import Tiny, token_rows

from sparsify import ConfigError, SaeConfig, TrainConfig, Trainer


def train(tmp_path, *trackers, **more):
    cfg = TrainConfig(
        SaeConfig(k=4, num_latents=48),
        batch_size=4,
        hookpoints=["layers.1"],
        save_dir=str(tmp_path),
        run_name="run",
        log_every=2,
        log_to=trackers,
        **more,
    )
    trainer = Trainer(cfg, token_rows(32), Tiny())
    trainer.fit()
    return trainer


class Recorder:
    """What wandb and trackio share: init gives a run that logs and finishes."""

    def __init__(self):
        self.asked, self.points, self.finished = {}, [], False

    def init(self, **asked):
        self.asked = asked
        return SimpleNamespace(log=lambda values, step: self.points.append((step, values)), finish=self.finish)

    def finish(self):
        self.finished = True


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_every_interval_reaches_the_tracker(tmp_path, monkeypatch, name):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, name, recorder)
    more = {"log_to_wandb": True} if name == "wandb" else {}
    train(tmp_path, name, **more)
    assert [step for step, _ in recorder.points] == [2, 4, 6, 8]
    assert recorder.points[-1][1]["fvu/layers.1"] > 0
    assert recorder.asked["project"] == "sparsify"
    assert recorder.asked["config"]["sae"]["k"] == 4
    assert recorder.finished


def test_tensorboard_writes_what_it_can_read_again(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    train(tmp_path, "tensorboard")
    events = accumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    points = events.Scalars("fvu/layers.1")
    assert [point.step for point in points] == [2, 4, 6, 8]
    assert points[-1].value > 0


@pytest.mark.parametrize("name", ["trackio", "wandb", "tensorboard"])
def test_a_missing_tracker_is_named_before_anything_is_trained(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"needs the {name} package"):
        train(tmp_path, name)
    with pytest.raises(ConfigError, match="did you mean 'tensorboard'"):
        TrainConfig(log_to=("tensorbord",))
