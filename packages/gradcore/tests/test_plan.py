"""The plan is a value: saved, read back, hashed, compared."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from gradcore_models import TinyLM
from torch import nn

from gradcore import MATRICES as CAPTURED_MATRICES
from gradcore import (
    CaptureError,
    CapturePlan,
    GradCoreError,
    PlanMismatch,
    Spectral,
    TwoSided,
    coverage,
    model_fingerprint,
)

MATRICES = ["blocks.*.up", "blocks.*.down"]


@pytest.fixture
def plan():
    return CapturePlan.for_model(TinyLM(), MATRICES, sketch=TwoSided(4), fingerprint="abc")


def test_columns_follow_modules(plan):
    assert plan.columns == {"blocks.0.up": 16, "blocks.0.down": 16, "blocks.1.up": 16, "blocks.1.down": 16}
    assert plan.width == 64
    assert plan.slices["blocks.1.up"] == slice(32, 48)
    whole = CapturePlan.for_model(TinyLM(), MATRICES)
    assert whole.shapes["blocks.0.up"] == (16, 8)
    assert whole.shapes["blocks.0.down"] == (8, 16)


def test_saved_and_read_back(plan):
    saved = json.loads(json.dumps(plan.to_dict()))
    assert CapturePlan.from_dict(saved) == plan
    assert CapturePlan.from_dict(saved).digest == plan.digest
    with pytest.raises(GradCoreError, match="unexpected or missing"):
        CapturePlan.from_dict({**saved, "colour": 1})


def test_digest_tells_every_field_apart(plan):
    others = [
        replace(plan, sketch=TwoSided(5)),
        replace(plan, sketch=TwoSided(4, seed=1)),
        replace(plan, reduction="mean"),
        replace(plan, model="abd"),
        plan.restrict("blocks.0.*"),
    ]
    assert len({each.digest for each in [plan, *others]}) == len(others) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sketch": TwoSided(8)}, r"sketch differs.*side=4.*side=8.*--projection-dim"),
        ({"model": "xyz"}, r"model differs.*'abc'.*'xyz'.*checkpoint"),
        ({"reduction": "mean"}, r"reduction differs.*'sum'.*'mean'.*--loss-reduction"),
    ],
)
def test_mismatch_names_field_values_and_remedy(plan, change, message):
    with pytest.raises(PlanMismatch, match=message):
        plan.require_equal(replace(plan, **change))


def test_mismatch_of_modules_shows_the_first_difference(plan):
    with pytest.raises(PlanMismatch, match=r"this: 4 modules; the other: 2 modules"):
        plan.require_equal(plan.restrict("blocks.0.*"))
    with pytest.raises(PlanMismatch, match=r"query: blocks.0.up \[16, 8\]; index: blocks.0.up \[12, 6\]"):
        plan.require_equal(
            CapturePlan.for_model(TinyLM(width=6), MATRICES, sketch=TwoSided(4)), this="query", that="index"
        )


def test_a_mismatch_of_sketches_fits_on_a_screen(plan):
    """A spectral sketch knows every module's floats."""
    budgets = tuple((f"layers.{n}.mlp.up_proj", 100 + n) for n in range(500))
    fitted = [replace(plan, sketch=Spectral(digest=each * 64, budgets=budgets)) for each in "ab"]
    with pytest.raises(
        PlanMismatch, match=r"digest=aaaaaaaaaaaa, budgets=174,750 in 500 modules.*digest=bbbb"
    ) as error:
        fitted[0].require_equal(fitted[1], this="the queries", that="the curvature runs/h")
    assert len(str(error.value)) < 500


def test_empty_plans_and_unknown_reductions_are_refused(plan):
    with pytest.raises(CaptureError, match="captures nothing"):
        CapturePlan(modules=())
    with pytest.raises(GradCoreError, match="sum, mean"):
        replace(plan, reduction="median")


def test_kinds_narrow_the_layer_types():
    plan = CapturePlan.for_model(TinyLM(), kinds=CAPTURED_MATRICES)
    assert {module.kind for module in plan.modules} == {"linear", "hf_conv1d"}
    assert len(CapturePlan.for_model(TinyLM()).modules) == len(plan.modules) + 3  # an embedding and two norms


def test_coverage_lists_what_is_left_out():
    model = TinyLM()
    report = coverage(model, CapturePlan.for_model(model, MATRICES))
    assert report.total == sum(parameter.numel() for parameter in model.parameters())
    assert report.captured == 4 * 8 * 16
    assert report.captured + sum(each.floats for each in report.left_out) == report.total
    reasons = {each.module: each.reason for each in report.left_out}
    assert reasons["head"] == "not selected"
    assert reasons["blocks.0.up"] == "only the weight is captured (include_bias adds the bias)"


def test_everything_is_covered_with_biases():
    model = TinyLM()
    report = coverage(model, CapturePlan.for_model(model, include_bias=True))
    assert report.share == 1
    assert report.left_out == ()


def test_unknown_layer_types_are_listed():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.PReLU())
    report = coverage(model, CapturePlan.for_model(model))
    assert [(each.module, each.reason) for each in report.left_out] == [("1", "PReLU is not a captured layer type")]


def test_coverage_counts_tied_parameters_once():
    model = TinyLM()
    model.head.weight = model.embed.weight
    report = coverage(model, CapturePlan.for_model(model, MATRICES))
    assert report.total == sum(parameter.numel() for parameter in model.parameters())


def test_fingerprint_follows_values_not_objects():
    model, same = TinyLM(), TinyLM()
    same.load_state_dict(model.state_dict())
    assert model_fingerprint(model) == model_fingerprint(same)
    assert model_fingerprint(model) != model_fingerprint(model.bfloat16())
