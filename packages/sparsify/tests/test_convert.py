"""Every layout against that library's own forward pass, written here from its source; and refusals with reasons."""

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sparsify import ConfigError, FormatError, SaeConfig, SparseCoder, convert

K, D, M = 4, 8, 40


def coder(activation, **changes):
    cfg = SaeConfig(activation=activation, k=K, num_latents=M, **changes)
    made = SparseCoder(D, cfg, d_out=6 if cfg.transcode else None)
    for p in made.parameters():
        p.data = torch.randn_like(p)
    if activation in ("jumprelu", "batchtopk"):
        made.threshold.data.fill_(0.8) if activation == "batchtopk" else made.threshold.data.uniform_(0.1, 1)
    return made.eval()


def topk(a, k):
    return torch.zeros_like(a).scatter(-1, a.topk(k).indices, a.topk(k).values)


def saelens_forward(folder, x):
    """sae_lens.saes, inference."""
    import json

    c, t = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    h = (x - t["b_dec"] if c["apply_b_dec_to_input"] else x) @ t["W_enc"]
    if c["architecture"] == "gated":
        f = (h + t["b_gate"] > 0) * (h * t["r_mag"].exp() + t["b_mag"]).relu()
    elif c["architecture"] == "topk":
        f = topk(h + t["b_enc"], c["k"]).relu()
    else:
        h = h + t["b_enc"]
        f = h.relu() * (h > t["threshold"])
    out = f @ t["W_dec"] + t["b_dec"]
    return out + x @ t["W_skip"].T if "W_skip" in t else out


def dictionary_learning_forward(kind, t, x):
    """dictionary_learning.dictionary, inference."""
    if kind == "AutoEncoder":
        f = ((x - t["bias"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
        return f @ t["decoder.weight"].T + t["bias"]
    if kind == "AutoEncoderNew":
        f = (x @ t["encoder.weight"].T + t["encoder.bias"]).relu()
        return f @ t["decoder.weight"].T + t["decoder.bias"]
    if kind == "GatedAutoEncoder":
        h = (x - t["decoder_bias"]) @ t["encoder.weight"].T
        f = (h + t["gate_bias"] > 0) * (t["r_mag"].exp() * h + t["mag_bias"]).relu()
        return f @ t["decoder.weight"].T + t["decoder_bias"]
    if kind == "JumpReluAutoEncoder":
        a = x @ t["W_enc"] + t["b_enc"]
        return (a * (a > t["threshold"])).relu() @ t["W_dec"] + t["b_dec"]
    if kind == "MatryoshkaBatchTopKSAE":
        a = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
        return (a * (a > t["threshold"])) @ t["W_dec"] + t["b_dec"]
    a = ((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    f = topk(a, int(t["k"])) if kind == "AutoEncoderTopK" else a * (a > t["threshold"])
    return f @ t["decoder.weight"].T + t["b_dec"]


SAELENS = {
    "topk": ("topk", {}),
    "jumprelu": ("jumprelu", {}),
    "batchtopk": ("batchtopk", {}),
    "gated": ("gated", {}),
    "transcoder": ("jumprelu", {"transcode": True}),
    "skip": ("jumprelu", {"transcode": True, "skip_connection": True}),
}


@pytest.mark.parametrize("name", SAELENS)
def test_saelens_both_ways(tmp_path, name):
    activation, changes = SAELENS[name]
    made, x = coder(activation, **changes), torch.randn(30, D)
    convert.save({"layers.1": made}, tmp_path, "saelens", metadata={"model_name": "m"})
    assert_close(saelens_forward(tmp_path / "layers.1", x), made.reconstruct(x), rtol=1e-5, atol=1e-5)
    back = convert.load(tmp_path / "layers.1")
    assert back.layout == "saelens"
    assert_close(back.coder.reconstruct(x), made.reconstruct(x), rtol=1e-6, atol=1e-6)


def write_saelens(folder, tensors, **values):
    import json

    folder.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"apply_b_dec_to_input": True, **values}))


def test_saelens_variants_are_folded_exactly(tmp_path):
    x = torch.randn(30, D)
    t = {"W_enc": torch.randn(D, M), "b_enc": torch.randn(M), "W_dec": torch.randn(M, D), "b_dec": torch.randn(D)}
    write_saelens(tmp_path / "a", t, architecture="topk", k=3, rescale_acts_by_decoder_norm=True)
    norms = t["W_dec"].norm(dim=1)
    f = topk(((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norms, 3).relu() / norms
    assert_close(convert.load(tmp_path / "a").coder.reconstruct(x), f @ t["W_dec"] + t["b_dec"], rtol=1e-5, atol=1e-5)
    write_saelens(tmp_path / "b", t, architecture="standard", apply_b_dec_to_input=False)
    f = (x @ t["W_enc"] + t["b_enc"]).relu()
    assert_close(convert.load(tmp_path / "b").coder.reconstruct(x), f @ t["W_dec"] + t["b_dec"], rtol=1e-5, atol=1e-5)
    for field, message in [
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"architecture": "temporal"}, "'temporal' has no SparseCoder"),
        ({"reshape_activations": "hook_z"}, "hook_z"),
    ]:
        home = tmp_path / next(iter(field.values()))
        write_saelens(home, t, **{"architecture": "topk", "k": 3, **field})
        with pytest.raises(FormatError, match=message):
            convert.load(home)


@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu", "gated"])
def test_dictionary_learning_both_ways(tmp_path, name):
    import json

    made, x = coder(name), torch.randn(30, D)
    convert.save({"layers.1": made}, tmp_path, "dictionary_learning")
    t = torch.load(tmp_path / "layers.1" / "ae.pt", weights_only=True, map_location="cpu")
    kind = json.loads((tmp_path / "layers.1" / "config.json").read_text())["trainer"]["dict_class"]
    assert_close(dictionary_learning_forward(kind, t, x), made.reconstruct(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(FormatError, match="read only on request"):
        convert.load(tmp_path / "layers.1")
    back = convert.load(tmp_path / "layers.1", allow_pickle=True)
    assert back.layout == "dictionary_learning"
    assert_close(back.coder.reconstruct(x), made.reconstruct(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderNew", "MatryoshkaBatchTopKSAE"])
def test_more_dictionary_learning_classes(tmp_path, kind):
    linear = {"encoder.weight": torch.randn(M, D), "encoder.bias": torch.randn(M), "decoder.weight": torch.randn(D, M)}
    upper = {"W_enc": torch.randn(D, M), "b_enc": torch.randn(M), "W_dec": torch.randn(M, D), "b_dec": torch.randn(D)}
    t = {
        "AutoEncoder": {**linear, "bias": torch.randn(D)},
        "AutoEncoderNew": {**linear, "decoder.bias": torch.randn(D)},
        "MatryoshkaBatchTopKSAE": {
            **upper,
            "k": torch.tensor(3),
            "threshold": torch.tensor(0.4),
            "group_sizes": torch.tensor([10, 30]),
        },
    }[kind]
    torch.save(t, tmp_path / "x.pt")
    x = torch.randn(30, D)
    found = convert.load(tmp_path / "x.pt", allow_pickle=True).coder
    assert_close(found.reconstruct(x), dictionary_learning_forward(kind, t, x), rtol=1e-5, atol=1e-5)
    if kind.startswith("M"):
        assert found.cfg.matryoshka == (10, 40)


@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracer_both_ways(tmp_path, skip):
    made = {f"layers.{i}.mlp": coder("jumprelu", transcode=True, skip_connection=skip) for i in (1, 0, 2)}
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    convert.save(made, tmp_path, "circuit_tracer", metadata={"model_name": "m", **hooks})
    t, x = load_file(tmp_path / "layer_2.safetensors"), torch.randn(30, D)
    a = x @ t["W_enc"].T + t["b_enc"]
    out = (a * (a > t["activation_function.threshold"])) @ t["W_dec"] + t["b_dec"]
    out = out + x @ t["W_skip"].T if skip else out
    assert_close(out, made["layers.2.mlp"].reconstruct(x), rtol=1e-5, atol=1e-5)
    back = convert.load(tmp_path)
    assert back.layout == "circuit_tracer"
    assert list(back.coders) == ["layer_0", "layer_1", "layer_2"]
    assert_close(back.coders["layer_2"].reconstruct(x), made["layers.2.mlp"].reconstruct(x))
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["feature_input_hook"] == "mlp.hook_in"
    with pytest.raises(FormatError, match="3 coders, not one"):
        _ = back.coder


def test_an_autoencoders_centring_is_folded_for_circuit_tracer(tmp_path):
    made, x = coder("jumprelu"), torch.randn(30, D)
    metadata = {"model_name": "m", "feature_input_hook": "a", "feature_output_hook": "a"}
    convert.save({"layers.0": made}, tmp_path, "circuit_tracer", metadata=metadata)
    assert_close(convert.load(tmp_path).coder.reconstruct(x), made.reconstruct(x), rtol=1e-5, atol=1e-5)


def test_sparsify_is_a_layout_too(tmp_path):
    made = {"layers.1": coder("topk"), "layers.0": coder("groupmax")}
    convert.save(made, tmp_path, "sparsify")
    found = convert.load(tmp_path)
    assert (found.layout, list(found.coders)) == ("sparsify", ["layers.0", "layers.1"])
    assert torch.equal(convert.load(tmp_path / "layers.1").coder.b_dec, made["layers.1"].b_dec)


@pytest.mark.parametrize(
    ("activation", "changes", "layout", "reason"),
    [
        ("groupmax", {}, "saelens", "no other library has the groupmax"),
        ("groupmax", {}, "dictionary_learning", "no other library has the groupmax"),
        ("groupmax", {"transcode": True}, "circuit_tracer", "no groupmax activation"),
        ("topk", {"transcode": True}, "saelens", "no topk transcoder"),
        ("topk", {"transcode": True}, "dictionary_learning", "neither transcoders nor skip"),
        ("topk", {"transcode": True}, "circuit_tracer", "its top-k has no ReLU"),
        ("topk", {"skip_connection": True}, "saelens", "in transcoders only"),
    ],
)
def test_what_cannot_be_exact_is_refused(tmp_path, activation, changes, layout, reason):
    metadata = {"model_name": "m", "feature_input_hook": "a", "feature_output_hook": "b"}
    with pytest.raises(FormatError, match=reason):
        convert.save({"layers.0": coder(activation, **changes)}, tmp_path, layout, metadata=metadata)
    assert not any(tmp_path.rglob("*.safetensors"))


def test_topk_for_circuit_tracer_on_request(tmp_path):
    made = coder("topk", transcode=True)
    made.encoder.bias.data += 20
    metadata = {"model_name": "m", "feature_input_hook": "a", "feature_output_hook": "b"}
    convert.save({"layers.0": made}, tmp_path, "circuit_tracer", metadata=metadata, allow_inexact=True)
    t, x = load_file(tmp_path / "layer_0.safetensors"), torch.randn(30, D)
    assert set(t) == {"W_enc", "b_enc", "W_dec", "b_dec"}, "a tensor k would make circuit-tracer's strict loader fail"
    k = yaml.safe_load((tmp_path / "config.yaml").read_text())["k"]
    out = topk(x @ t["W_enc"].T + t["b_enc"], k) @ t["W_dec"] + t["b_dec"]
    assert_close(out, made.reconstruct(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(FormatError, match="keeps negative pre-activations"):
        convert.load(tmp_path)


def test_the_checkpoints_found_in_the_wild(assets):
    home = assets / "sae-checkpoints"
    for name, d, m in (("ae1.pt", 48, 192), ("ae2.pt", 120, 1920)):
        path = home / "dictlearn-autoencoder-delphi" / name
        found = convert.load(path, allow_pickle=True)
        assert found.layout == "dictionary_learning"
        assert (found.coder.d_in, found.coder.num_latents) == (d, m)
        assert found.coder.cfg.normalize_decoder, "its columns have unit norm"
        x, t = torch.randn(50, d), torch.load(path, weights_only=True, map_location="cpu")
        assert_close(found.coder.reconstruct(x), dictionary_learning_forward("AutoEncoder", t, x), rtol=1e-4, atol=1e-4)

    path = home / "dictlearn-batchtopk-listcomp" / "sae_d100_k4_50ksteps_2layer_100dig_64d.pt"
    with pytest.raises(FormatError, match="look alike"):
        convert.load(path, allow_pickle=True)
    with pytest.raises(FormatError, match="act_mean='fold'"):
        convert.load(path, allow_pickle=True, dict_class="BatchTopKSAE")
    raw, x = torch.load(path, weights_only=True, map_location="cpu"), torch.randn(50, 64)
    plain = convert.load(path, allow_pickle=True, dict_class="BatchTopKSAE", act_mean="ignore").coder
    want = dictionary_learning_forward("BatchTopKSAE", raw["state_dict"], x)
    assert_close(plain.reconstruct(x), want, rtol=1e-4, atol=1e-4)
    folded = convert.load(path, allow_pickle=True, dict_class="BatchTopKSAE", act_mean="fold").coder
    shifted = dictionary_learning_forward("BatchTopKSAE", raw["state_dict"], x - raw["act_mean"]) + raw["act_mean"]
    assert_close(folded.reconstruct(x), shifted, rtol=1e-4, atol=1e-4)

    with pytest.raises(FormatError, match="records neither k nor whether a ReLU"):
        convert.load(home / "topk-tinystories1m-layer6" / "sae_512_4.pt", allow_pickle=True)
    with pytest.raises(FormatError, match="without a configuration"):
        convert.load(home / "toy-routing-mit" / "sae.pt", allow_pickle=True)
    with pytest.raises(FormatError, match="read only on request"):
        convert.load(home / "toy-routing-mit" / "sae.pt")


def test_unknown_things_are_named(tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        convert.load(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FormatError, match=r"none of the layouts .* it holds notes.txt"):
        convert.load(tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'saelens'"):
        convert.load(tmp_path, layout="sealens")
    (tmp_path / "evil.pt").write_bytes(b"\x80\x02cposix\nsystem\n(S'true'\ntR.")
    with pytest.raises(FormatError, match="cannot be read as tensors and plain values"):
        convert.load(tmp_path / "evil.pt", allow_pickle=True)


@pytest.mark.parametrize("layout", ["sparsify", "saelens", "dictionary_learning"])
def test_folders_of_many_coders_are_read(tmp_path, layout):
    """Seeds, too: what a layout was written with, it is read with."""
    names = ["layers.2/seed0", "layers.2/seed1", "layers.10"]
    coders = {name: SparseCoder(6, SaeConfig(k=4, num_latents=48)) for name in names}
    convert.save(coders, tmp_path / "all", layout)
    found = convert.load(tmp_path / "all", allow_pickle=True)
    assert (found.layout, list(found.coders)) == (layout, names)
    for name, coder in coders.items():
        assert found.coders[name].W_dec.equal(coder.W_dec)
    one = convert.load(tmp_path / "all" / "layers.10", allow_pickle=True)
    assert list(one.coders) == ["layers.10"]
    with pytest.raises(FormatError, match=r"one transcoder for every layer from 0, found layers \[2, 10\]"):
        convert.save(coders, tmp_path / "ct", "circuit_tracer")
