"""Models that PEFT has put adapters into: collected, trained, asked, and loaded from the adapter's folder alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attribute import Attributor, DataConfig, IndexConfig, ModelError, _adapters, build_index, collect_gradients
from attribute.model import LanguageModel, load_model, load_tokenizer
from attribute.query import Asker, QueryConfig
from gradstore import GradientStore

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # the libraries', of each other

IDS = torch.arange(4, 24).reshape(2, 10)


def adapted(folder: Path, **options: Any) -> Any:
    """The model of a folder with adapters whose weights are not zero."""
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(1)
    lora = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**{**lora, **options})).eval()


@pytest.fixture(scope="module")
def adapter(folders, tmp_path_factory) -> Path:
    """A folder of an adapter, without a tokenizer."""
    path = tmp_path_factory.mktemp("adapter") / "lora"
    adapted(folders["llama"]).save_pretrained(path)
    return path


def places(model: Any) -> dict[str, Any]:
    """Every part of a PEFT model that a person may pass."""
    inner = model.base_model.model
    return {"wrapper": model, "tuner": model.base_model, "model": inner, "transformer": inner.base_model}


def test_gradients_are_collected_and_asked_whatever_part_is_passed(folders, documents, tokenizer, tmp_path):
    model = adapted(folders["llama"])
    data = [{"text": text} for text in documents[:6]]
    store = collect_gradients(
        model, data, tmp_path / "run", tokenizer=tokenizer, config=IndexConfig(modules=("*lora_*",), projection_dim=0)
    )
    assert next(iter(store.columns)) == "layers.0.self_attn.q_proj.lora_A.default"
    ids = torch.tensor([tokenizer(documents[2])["input_ids"]])
    for name, part in places(model).items():
        with Attributor(store, unit_norm=True).trace(part, 1) as result:
            model(input_ids=ids, labels=ids).loss.backward()
        assert result.indices.tolist() == [[2]], name
        assert result.scores[0, 0] == pytest.approx(1, abs=1e-5)
    model.zero_grad()
    (model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)).backward()
    inner = model.base_model.model.model
    expected = np.concatenate([inner.get_submodule(each).weight.grad.numpy().ravel() for each in store.columns])
    np.testing.assert_allclose(store.block(2, 3)[0], expected, rtol=1e-3, atol=1e-5)


def test_prompts_before_the_text_are_refused(folders):
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(folders["llama"])
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ModelError, match="prompts that are put before a text have none"):
        LanguageModel.wrap(peft.get_peft_model(model, config))


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_an_adapted_output_embedding_is_one(folders, options):
    model = adapted(folders["llama"], **options)
    wrapped = LanguageModel.wrap(model)
    logits = model(input_ids=IDS).logits[:, :-1].double()
    expected = torch.nn.functional.cross_entropy(logits.mT, IDS[:, 1:], reduction="none").sum(1)
    torch.testing.assert_close(wrapped.losses(IDS, IDS).double(), expected, rtol=1e-5, atol=1e-5)
    config = IndexConfig(modules=("lm_head.*",), projection_dim=0)
    plan = wrapped.plan(config)
    assert any("default" in each.name for each in plan.modules)
    with wrapped.collector(plan) as collector:
        wrapped.losses(IDS, IDS).sum().backward()
        found = collector.gradients
    expected.sum().backward()
    for name, rows in found.items():
        weight = model.base_model.model.get_submodule(name).weight
        if weight.grad is not None:
            torch.testing.assert_close(rows.sum(0), weight.grad, rtol=1e-3, atol=1e-5)


def test_an_adapter_folder_is_a_model(folders, adapter):
    expected, found = LanguageModel.wrap(adapted(folders["llama"])), load_model(str(adapter), device="cpu")
    assert found.fused
    torch.testing.assert_close(found.losses(IDS, IDS), expected.losses(IDS, IDS))
    assert found.fingerprint() == expected.fingerprint()
    assert found.fingerprint() != load_model(str(folders["llama"]), device="cpu").fingerprint()
    trained = {name for name, parameter in found.model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 8
    assert all("lora_" in name for name in trained)  # as an optimiser's state numbers them
    half = load_model(str(adapter), precision="bf16", device="cpu")
    assert {each.dtype for each in half.model.parameters()} == {torch.bfloat16}
    assert load_tokenizer(str(adapter)).vocab_size == load_tokenizer(str(folders["llama"])).vocab_size


def test_kl_compares_an_adapter_with_its_base(folders, adapter):
    model = load_model(str(adapter), device="cpu")
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    found = model.losses(IDS, IDS, loss="kl")
    logits = [load_model(str(each), device="cpu").model(input_ids=IDS).logits for each in (adapter, folders["llama"])]
    p, r = (each[:, :-1].double().log_softmax(-1) for each in logits)
    torch.testing.assert_close(found.double(), (p.exp() * (p - r)).sum((1, 2)), rtol=1e-4, atol=1e-6)
    assert found.min() > 0
    assert not any(parameter.requires_grad for parameter in model.model.parameters())
    with pytest.raises(ModelError, match="let --model be the folder of an adapter"):
        load_model(str(folders["llama"]), device="cpu").losses(IDS, IDS, loss="kl")


def test_an_index_of_an_adapter_is_asked_by_texts_and_by_the_model(folders, adapter, documents, tokenizer, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents[:6]))
    config = IndexConfig(model=str(adapter), projection_dim=4, device="cpu", data=DataConfig(dataset=str(data)))
    build_index(tmp_path / "run", config)
    found = Asker.open(tmp_path / "run", device="cpu").ask([{"text": documents[3]}], QueryConfig(top_k=1))
    assert found.indices.tolist() == [[3]]
    model, ids = adapted(folders["llama"]), torch.tensor([tokenizer(documents[3])["input_ids"]])
    with Attributor(tmp_path / "run", unit_norm=True).trace(model, 1) as result:
        model(input_ids=ids, labels=ids).loss.backward()
    assert result.indices.tolist() == [[3]]
    assert GradientStore.open(tmp_path / "run").meta["config"]["model"] == str(adapter)


def test_the_base_is_found_from_here_and_from_the_adapter(folders, adapter, tmp_path, monkeypatch):
    expected = load_model(str(adapter), device="cpu").fingerprint()
    shutil.copytree(adapter, tmp_path / "run" / "lora")
    shutil.copytree(folders["llama"], tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for base in ("../../base", "base"):
        renamed(tmp_path / "run" / "lora", base)
        assert load_model("run/lora", device="cpu").fingerprint() == expected


def renamed(folder: Path, base: str | None) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))


def test_an_adapter_that_cannot_be_loaded_says_why(folders, adapter, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(adapter, tmp_path / "lora"))

    def refused(reason: str) -> None:
        with pytest.raises(ModelError, match=reason):
            load_model(str(broken), device="cpu")

    renamed(broken, str(tmp_path / "gone"))
    refused("for the base model '.*gone', and there is no such folder: put where it lies now under base_model_name")
    renamed(broken, None)
    refused("names no base model")
    renamed(broken, str(folders["gpt2"]))
    refused("cannot be put into .*gpt2'")
    renamed(broken, str(folders["llama"]))
    weights = load_file(broken / "adapter_model.safetensors")
    weights.pop(min(weights))
    save_file(weights, broken / "adapter_model.safetensors")
    refused("lacks 1 weights")
    (broken / "adapter_model.safetensors").unlink()
    refused("cannot be put into")
    (broken / "adapter_config.json").write_text("{")
    refused("cannot be read as an adapter's configuration")
    monkeypatch.setattr(_adapters, "find_spec", lambda name: None)
    refused("is a PEFT adapter, which needs peft: pip install peft")
