"""What is stored is the gradient that autograd gives, one document at a time, however the documents were batched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attribute import DataConfig, IndexConfig, LanguageModel, ModelError, collect_gradients
from attribute.model import load_model
from gradstore import GradientStore

TOLERANCE = 1e-5  # relative to the largest entry of a module's gradient: float32 sums in another order
INVARIANCE = 1e-6  # relative to the norm of the row


def oracle(model: nn.Module, ids: list[int], labels: list[int], config: IndexConfig) -> tuple[np.ndarray, float]:
    """Autograd over the model's own loss, one document; then the sketch written out as L G Rᵀ."""
    language_model = LanguageModel.wrap(model)
    plan = language_model.plan(config)
    if sum(label != -100 for label in labels[1:]) == 0:
        return np.zeros(plan.width, dtype=np.float32), 0.0
    model.eval()
    model.zero_grad()
    loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), use_cache=False).loss
    if config.loss_reduction == "sum":
        loss = loss * sum(label != -100 for label in labels[1:])
    loss.backward()
    parts: list[Tensor] = []
    for planned in plan.modules:
        module = language_model.base.get_submodule(planned.name)
        gradient = module.get_parameter("weight").grad
        assert gradient is not None
        if type(module).__name__ == "Conv1D":  # GPT-2 stores [in, out]
            gradient = gradient.T
        if config.projection_dim:
            left = plan.sketch.matrix(planned.name, "left", planned.out_features)  # type: ignore[attr-defined]
            right = plan.sketch.matrix(planned.name, "right", planned.in_features)  # type: ignore[attr-defined]
            gradient = left @ gradient @ right.T
        parts.append(gradient.flatten())
    model.zero_grad()
    return torch.cat(parts).numpy(), loss.item()


def build(model: nn.Module, records: list[dict], path: Path, tokenizer: Any, **options: Any) -> GradientStore:
    config = IndexConfig(**{"projection_dim": 0, "token_batch_size": 64, **options})
    return collect_gradients(model, records, path, tokenizer=tokenizer, config=config)


def assert_exact(model: nn.Module, store: GradientStore, rows: list[tuple[list[int], list[int]]], config: IndexConfig):
    """Every stored row against the oracle, module by module."""
    losses = store.side("loss")
    for number, (ids, labels) in enumerate(rows):
        expected, loss = oracle(model, ids, labels, config)
        found = store.row(number)
        for columns in store.columns.values():
            # Where a module's gradient vanishes (queries and keys of a first token), only rounding is left of it.
            scale = max(TOLERANCE * np.abs(expected[columns]).max(), 1e-7 * np.abs(expected).max())
            np.testing.assert_allclose(found[columns], expected[columns], rtol=TOLERANCE, atol=scale)
        assert losses[number] == pytest.approx(loss, rel=TOLERANCE)
        assert store.side("tokens")[number] == sum(label != -100 for label in labels[1:])


@pytest.mark.parametrize("sketch", [0, 4])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_stored_rows_are_autograds(architecture, sketch, reduction, make_model, tokenizer, documents, tmp_path):
    model = make_model(architecture)
    options = {"projection_dim": sketch, "loss_reduction": reduction}
    store = build(model, [{"text": text} for text in documents], tmp_path / "run", tokenizer, **options)
    rows = [(ids, ids) for ids in tokenizer(documents)["input_ids"]]
    assert_exact(model, store, rows, IndexConfig(**options))


def test_labels_decide_what_is_differentiated(architecture, make_model, tmp_path):
    generator = np.random.default_rng(0)
    rows = []
    for length in (2, 5, 17, 30, 48):
        ids = generator.integers(0, 300, length).tolist()
        rows.append((ids, [token if generator.random() < 0.4 else -100 for token in ids]))
    rows.append(([3, 4, 5], [-100, -100, -100]))  # a row without loss
    model = make_model(architecture)
    records = [{"input_ids": ids, "labels": labels} for ids, labels in rows]
    store = build(model, records, tmp_path / "run", None)
    assert_exact(model, store, rows, IndexConfig(projection_dim=0))
    assert not store.row(5).any()


@pytest.mark.parametrize(
    ("architecture", "options", "fused"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}, False),
        ("gemma2", {"final_logit_softcapping": 30.0}, False),
        ("gemma2", {"final_logit_softcapping": None}, True),
        ("cohere", {"logit_scale": 0.25}, False),
        ("llama", {}, True),
        ("llama", {"tie_word_embeddings": True}, True),
        ("gpt2", {"tie_word_embeddings": False}, True),
        ("gpt_neox", {}, True),
    ],
)
def test_the_loss_is_the_models_own(architecture, options, fused, make_model, tokenizer, documents, tmp_path):
    """A soft cap of 30 changes a small model's logits by next to nothing, and is found all the same."""
    model = make_model(architecture, **options)
    assert LanguageModel.wrap(model).fused is fused
    texts = documents[:6]
    store = build(model, [{"text": text} for text in texts], tmp_path / "run", tokenizer)
    assert_exact(model, store, [(ids, ids) for ids in tokenizer(texts)["input_ids"]], IndexConfig(projection_dim=0))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    norms = np.linalg.norm(expected, axis=1)
    distance = np.linalg.norm(found.astype(np.float64) - expected, axis=1)
    return float((distance[norms > 0] / norms[norms > 0]).max())


@pytest.mark.parametrize("sketch", [0, 8])
def test_rows_do_not_depend_on_batch_size(architecture, sketch, make_model, tokenizer, documents, tmp_path):
    model, records = make_model(architecture), [{"text": text} for text in documents]
    alone, *others = (
        build(model, records, tmp_path / str(budget), tokenizer, projection_dim=sketch, token_batch_size=budget)
        for budget in (1, 50, 333, 100_000)
    )
    for other in others:
        assert relative(other.block(0, 40), alone.block(0, 40)) < INVARIANCE
        np.testing.assert_allclose(other.side("loss"), alone.side("loss"), rtol=INVARIANCE)


def test_rows_do_not_depend_on_order_or_company(architecture, make_model, tokenizer, documents, tmp_path):
    model = make_model(architecture)
    order = np.random.default_rng(1).permutation(len(documents))
    straight = build(model, [{"text": text} for text in documents], tmp_path / "a", tokenizer)
    shuffled = build(model, [{"text": documents[at]} for at in order], tmp_path / "b", tokenizer, rows_per_shard=7)
    few = build(model, [{"text": text} for text in documents[:5]], tmp_path / "c", tokenizer)
    assert relative(shuffled.block(0, 40), straight.block(0, 40)[order]) < INVARIANCE
    assert relative(few.block(0, 5), straight.block(0, 5)) < INVARIANCE


def test_rows_do_not_depend_on_padding(architecture, make_model, tmp_path):
    """A short row beside the longest possible one, and alone."""
    model = make_model(architecture)
    short, long = {"input_ids": [3, 9, 27, 81]}, {"input_ids": list(range(48))}
    together = build(model, [short, long], tmp_path / "a", None, token_batch_size=96)
    alone = build(model, [short], tmp_path / "b", None)
    assert relative(together.block(0, 1), alone.block(0, 1)) < INVARIANCE


def test_the_same_build_twice_gives_the_same_bytes(architecture, make_model, tokenizer, documents, tmp_path):
    model = make_model(architecture)
    for name in "ab":
        build(model, [{"text": text} for text in documents], tmp_path / name, tokenizer)
    for path in sorted((tmp_path / "a").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_selected_modules_are_those_of_the_whole(make_model, tokenizer, documents, tmp_path):
    model, records = make_model("gpt2"), [{"text": text} for text in documents[:8]]
    whole = build(model, records, tmp_path / "a", tokenizer)
    part = build(model, records, tmp_path / "b", tokenizer, modules=("h.1.*",), exclude=("*attn*", "*ln_*"))
    assert list(part.columns) == ["h.1.mlp.c_fc", "h.1.mlp.c_proj"]
    assert relative(part.block(0, 8), whole.block(0, 8, modules=list(part.columns))) < INVARIANCE


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_stores_of_half_precision_round_each_row(dtype, make_model, tokenizer, documents, tmp_path):
    model, records = make_model("llama"), [{"text": text} for text in documents[:8]]
    exact = build(model, records, tmp_path / "a", tokenizer).block(0, 8)
    rounded = build(model, records, tmp_path / "b", tokenizer, store_dtype=dtype).block(0, 8)
    assert relative(rounded, exact) < {"fp16": 2**-11, "bf16": 2**-8}[dtype]


@pytest.mark.parametrize(("dtype", "loss"), [("int8", 0.02), ("int4", 0.25), ("int2", 0.6), ("int1", 0.8)])
def test_stores_of_few_bits_keep_the_direction_of_each_row(dtype, loss, make_model, tokenizer, documents, tmp_path):
    model, records = make_model("llama"), [{"text": text} for text in documents[:8]]
    exact = build(model, records, tmp_path / "a", tokenizer).block(0, 8)
    store = build(model, records, tmp_path / "b", tokenizer, store_dtype=dtype)
    assert store.dtype == dtype
    assert relative(store.block(0, 8), exact) < loss  # Gaussian entries would lose .007, .11, .34, .60


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_models_of_half_precision_give_gradients_near_the_exact(precision, folders, documents, tokenizer, tmp_path):
    records = [{"text": text} for text in documents[:8]]
    exact = build(load_model(str(folders["llama"])).model, records, tmp_path / "a", tokenizer).block(0, 8)
    model = load_model(str(folders["llama"]), precision=precision)
    half = collect_gradients(
        model, records, tmp_path / "b", tokenizer=tokenizer, config=IndexConfig(projection_dim=0)
    ).block(0, 8)
    cosines = (half * exact).sum(1) / np.linalg.norm(half, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosines.min() > (0.99 if precision == "bf16" else 0.999)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gpt_neox", "cohere"])
def test_the_model_is_left_as_it_was_found(architecture, make_model, tokenizer, documents, tmp_path):
    model = make_model(architecture).train()
    names = [name for name, _ in model.named_parameters()]
    model.get_parameter(names[1]).requires_grad_(False)
    first_block = next(module for name, module in model.named_modules() if name.endswith(".0"))
    first_block.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    needs = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    build(model, [{"text": text} for text in documents[:5]], tmp_path / "run", tokenizer)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == needs
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_that_a_person_keeps_are_not_touched(make_model, tokenizer, documents, tmp_path):
    model = make_model("cohere")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    build(model, [{"text": text} for text in documents[:5]], tmp_path / "run", tokenizer)
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())


def refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        LanguageModel.wrap(model)


def test_models_that_cannot_be_measured_are_refused(make_model):
    import transformers as hf

    refused(nn.Linear(2, 2), "Linear is no causal language model")
    refused(make_model("gpt2").base_model, "is no causal language model")
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    bidirectional = hf.BertConfig(vocab_size=300, is_decoder=False, **tiny)
    refused(hf.BertForMaskedLM(bidirectional), "looks ahead")
    assert LanguageModel.wrap(hf.BertLMHeadModel(hf.BertConfig(vocab_size=300, is_decoder=True, **tiny))).fused is False


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value, make_model):
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = value
    refused(model, r"the weight model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity")


def test_large_finite_weights_are_not_taken_for_infinite(make_model):
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)  # whose sum overflows
    assert LanguageModel.wrap(model)


def test_a_row_on_which_the_model_overflows_is_named(make_model, tmp_path):
    model = make_model("gpt2", tie_word_embeddings=False)
    with torch.no_grad():
        model.transformer.wte.weight[7] = 3e38
    with pytest.raises(ModelError, match="row 1 has loss"):
        build(model, [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 7, 3]}], tmp_path / "run", None)


def copied(folder: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, to))


def _without_a_weight(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _torn(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:3000])


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (_without_a_weight, r"lacks 1 weights .*h\.1\.mlp\.c_fc\.weight"),
    (_torn, "cannot be loaded: .*header"),
    (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded: .*model.safetensors"),
    (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": '), "cannot be loaded: .*not a valid JSON"),
    (lambda folder: (folder / "config.json").write_text("{}"), "cannot be loaded: Unrecognized model"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_model_folders_are_refused(damage, message, folders, tmp_path, capsys):
    folder = copied(folders["gpt2"], tmp_path / "model")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        load_model(str(folder))


def test_models_and_devices_that_are_not_there_are_refused(folders):
    for name, message in (
        ("", "--model takes"),
        ("./nothing", "no model folder"),
        ("no-such-model", "cannot be loaded"),
    ):
        with pytest.raises(ModelError, match=message):
            load_model(name)
    with pytest.raises(ModelError, match="no device 'abacus'"):
        load_model(str(folders["gpt2"]), device="abacus")


def test_a_folder_without_tokenizer_is_refused(folders, tmp_path):
    from attribute.model import load_tokenizer

    folder = copied(folders["gpt2"], tmp_path / "model")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"no tokenizer in .*--tokenizer names another"):
        load_tokenizer(str(folder))


def test_data_config_of_a_run_reads_back():
    config = IndexConfig(model="m", modules=("a", "re:b"), data=DataConfig(dataset="d", chunk_length=8))
    assert IndexConfig.from_dict(config.to_dict()) == config
