"""Fused experts of transformers' mixtures: every expert's gradient is autograd's, example by example."""

from __future__ import annotations

import pytest
import torch
from gradcore_reference import relative

from gradcore import (
    MATRICES,
    CaptureError,
    CapturePlan,
    GradientCollector,
    Normalizer,
    TensorSketch,
    TwoSided,
    coverage,
)

hf = pytest.importorskip("transformers")
SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 32,
}  # fmt: skip
CONFIGS = {
    "mixtral": lambda: hf.MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=12, head_dim=4),
    "gpt_oss": lambda: hf.GptOssConfig(
        **SMALL, num_local_experts=4, head_dim=4, layer_types=["full_attention"] * 2, sliding_window=8
    ),
}
IDS = torch.arange(3 * 7).view(3, 7) % 40


def model_of(kind: str, implementation: str = "eager"):
    torch.manual_seed(0)
    config = CONFIGS[kind]()
    config._experts_implementation = implementation
    model = hf.AutoModel.from_config(config).eval()
    for parameter in model.parameters():  # some are left as they were in memory
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def run(model, ids=IDS):
    model(input_ids=ids, use_cache=False)[0].tanh().square().sum().backward()


def experts_by_autograd(model, row: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    run(model, IDS[row : row + 1])
    found = {}
    for path, module in model.named_modules():
        for name in ("gate_up_proj", "down_proj"):
            weights = getattr(module, name, None)
            if isinstance(weights, torch.nn.Parameter) and weights.dim() == 3:
                for index, gradient in enumerate(weights.grad):
                    turned = gradient.T if getattr(module, "is_transposed", False) else gradient
                    found[f"{path}.{name}.expert_{index}"] = turned.clone()
    model.zero_grad()
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_experts_gradient_is_autograds(kind):
    model = model_of(kind)
    plan = CapturePlan.for_model(model, kinds=MATRICES)
    names = [each.name for each in plan.modules if each.expert]
    assert len(names) == 2 * 4 * 2
    before = model(input_ids=IDS, use_cache=False)[0].detach()
    with GradientCollector(model, plan) as collector:
        run(model)
        torch.testing.assert_close(model(input_ids=IDS, use_cache=False)[0].detach(), before)
    for row in range(3):
        truth = experts_by_autograd(model, row)
        assert set(truth) == set(names)
        for name in names:
            found = collector.gradients[name][row]
            assert found.shape == truth[name].shape
            torch.testing.assert_close(found, truth[name], rtol=1e-4, atol=1e-5)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_models_own_implementation_gives_the_same():
    rows = []
    for implementation in ("eager", "grouped_mm"):
        model = model_of("mixtral", implementation)
        with GradientCollector(model, CapturePlan.for_model(model, kinds=MATRICES, sketch=TwoSided(4))) as collector:
            run(model)
        rows.append(collector.rows.clone())
    assert relative(rows[1], rows[0]) < 1e-4


@pytest.mark.parametrize("sketch", [TwoSided(3), TensorSketch(16)])
def test_sketches_normalisers_and_positions_work_as_for_any_matrix(sketch):
    model = model_of("mixtral")
    plan = CapturePlan.for_model(model, "*.experts")
    draw = torch.Generator().manual_seed(0)
    moments = {m.matrix: torch.rand(m.out_features, m.in_features, generator=draw) + 0.1 for m in plan.modules}
    for normalizer in (None, *(Normalizer.of_moments(kind, moments) for kind in ("adam", "adafactor"))):
        with GradientCollector(model, CapturePlan(plan.modules, normalizer=normalizer)) as collector:
            run(model)
        whole = dict(collector.gradients)
        sketched = CapturePlan(plan.modules, sketch, normalizer=normalizer)
        with GradientCollector(model, sketched) as collector:
            run(model)
        rows = collector.rows.clone()
        with GradientCollector(model, sketched, per_position=True) as collector:
            run(model)
        assert relative(collector.rows.unflatten(0, (3, 7)).sum(1), rows) < 1e-4
        for each in plan.modules:
            if not whole[each.name].any():
                continue
            bound = sketch.bind(each.name, each.out_features, each.in_features, torch.device("cpu"))
            assert relative(rows[:, sketched.slices[each.name]], bound.matrix(whole[each.name]).flatten(1)) < 1e-4


def test_a_plan_of_experts_is_saved_and_counted():
    model = model_of("gpt_oss")
    plan = CapturePlan.for_model(model, "*.experts")
    assert CapturePlan.from_dict(plan.to_dict()) == plan
    report = coverage(model, plan)
    assert report.captured == sum(each.out_features * each.in_features for each in plan.modules)
    biases = [each for each in report.left_out if each.kind == "GptOssExperts"]
    assert biases
    assert all("bias" in name for each in biases for name in each.parameters)
    with pytest.raises(CaptureError, match=r"no module 'layers\.0\.mlp\.experts'"):
        GradientCollector(hf.AutoModel.from_config(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2)), plan).__enter__()
