"""EleutherAI's layout: exact names and keys, bit-exact round trips, and clear words for everything else."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify import ConfigError, FormatError, Sae, SaeConfig, SparseCoder, push_to_hub

CONFIGS = {
    "topk": SaeConfig(k=4, expansion_factor=8),
    "skip": SaeConfig(k=4, num_latents=48, transcode=True, skip_connection=True),
    "tied": SaeConfig(k=4, num_latents=48, tied=True),
    "batchtopk": SaeConfig(k=4, num_latents=48, activation="batchtopk", matryoshka=(8, 48)),
    "jumprelu": SaeConfig(k=4, num_latents=48, activation="jumprelu"),
    "gated": SaeConfig(k=4, num_latents=48, activation="gated"),
}


def trained(cfg, dtype=torch.float32, d_out=None):
    coder = SparseCoder(6, cfg, dtype=dtype, d_out=d_out)
    for p in coder.parameters():
        p.data = torch.randn_like(p)
    if cfg.activation in ("batchtopk", "jumprelu"):
        coder.threshold.data.fill_(0.7)
    return coder.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_exact(tmp_path, name, dtype):
    coder = trained(CONFIGS[name], dtype, d_out=9 if name == "skip" else None)
    coder.save_to_disk(tmp_path / "layers.1")
    again = Sae.load_from_disk(tmp_path / "layers.1")
    assert again.cfg == coder.cfg
    assert not again.training
    assert again.dtype == dtype
    for key, value in coder.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    x = torch.randn(5, 6, dtype=dtype)
    assert torch.equal(coder.reconstruct(x), again.reconstruct(x))
    if name == "tied":
        assert again.W_dec is again.encoder.weight


def test_the_files_are_eleutherais(tmp_path):
    trained(CONFIGS["skip"]).save_to_disk(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae.safetensors"]
    shapes = {k: tuple(v.shape) for k, v in load_file(tmp_path / "sae.safetensors").items()}
    assert shapes == {
        "encoder.weight": (48, 6),
        "encoder.bias": (48,),
        "W_dec": (48, 6),
        "b_dec": (6,),
        "W_skip": (6, 6),
    }
    values = json.loads((tmp_path / "cfg.json").read_text())
    theirs = ["activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk"]
    assert list(values) == [*theirs, "skip_connection", "transcode", "d_in", "trace"]


def test_reads_an_old_cfg_with_keys_since_dropped(tmp_path):
    coder = trained(CONFIGS["topk"])
    coder.save_to_disk(tmp_path)
    (tmp_path / "cfg.json").write_text(
        '{"expansion_factor": 8, "normalize_decoder": true, "k": 4, "signed": false, "d_in": 6}'
    )
    assert torch.equal(Sae.load_from_disk(tmp_path).b_dec, coder.b_dec)


def test_encoder_alone(tmp_path):
    coder = trained(CONFIGS["topk"])
    coder.save_to_disk(tmp_path)
    encoder = Sae.load_from_disk(tmp_path, decoder=False)
    x = torch.randn(2, 3, 6)
    assert encoder.W_dec is None
    assert torch.equal(encoder.encode(x).top_acts, coder.encode(x).top_acts)
    with pytest.raises(ConfigError, match="decoder=False"):
        encoder.reconstruct(x)


def test_load_many_sorts_naturally_and_knows_what_is_not_a_coder(tmp_path):
    hooks = ["layers.10", "layers.2", "embed_tokens", "layers.2.mlp", "layers.2/seed1"]
    for hook in hooks:
        trained(CONFIGS["topk"]).save_to_disk(tmp_path / hook)
    trained(CONFIGS["topk"]).save_to_disk(tmp_path / "best" / "layers.2")
    (tmp_path / "training_state").mkdir()
    (tmp_path / "config.json").write_text("{}")
    found = Sae.load_many(str(tmp_path), local=True)
    assert list(found) == ["embed_tokens", "layers.2", "layers.2.mlp", "layers.2/seed1", "layers.10"]
    assert list(Sae.load_many(str(tmp_path), local=True, pattern="layers.1?")) == ["layers.10"]
    assert list(Sae.load_many(str(tmp_path), local=True, layers=["layers.10", "layers.2"])) == ["layers.2", "layers.10"]
    with pytest.raises(FormatError, match=r"no hookpoint 'layers.3'; close ones: layers.2"):
        Sae.load_many(str(tmp_path), local=True, layers=["layers.3"])
    with pytest.raises(FormatError, match=r"no coder matching 'h\.\*'"):
        Sae.load_many(str(tmp_path), local=True, pattern="h.*")


def test_load_from_hub_reads_the_snapshot(tmp_path, monkeypatch):
    trained(CONFIGS["topk"]).save_to_disk(tmp_path / "layers.10")
    asked = []

    def snapshot(name, **options):
        asked.append((name, options["allow_patterns"], options["revision"]))
        return str(tmp_path)

    monkeypatch.setattr("sparsify._files.snapshot_download", snapshot)
    assert Sae.load_from_hub("org/sae", hookpoint="layers.10", revision="v1").d_in == 6
    assert list(Sae.load_many("org/sae")) == ["layers.10"]
    assert asked == [("org/sae", "layers.10/*", "v1"), ("org/sae", None, None)]
    with pytest.raises(FormatError, match=r"org/sae has no hookpoint 'layers.3'"):
        Sae.load_from_hub("org/sae", hookpoint="layers.3")
    with pytest.raises(FormatError, match=r"several coders: give a hookpoint, one of layers.10"):
        Sae.load_from_hub("org/sae")
    with pytest.raises(FormatError, match="may not lead out"):
        Sae.load_from_hub("org/sae", hookpoint="../elsewhere")


def test_what_the_hub_does_not_give_is_said_in_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    trained(CONFIGS["topk"]).save_to_disk(tmp_path / "run" / "layers.1")
    with pytest.raises(FormatError, match=r"'./run' is a folder here: load it with local=True"):
        Sae.load_many("./run")
    for load in (Sae.load_many, Sae.load_from_hub):
        for name in ("me/not-in-the-cache", "no/such/name", "./nowhere"):
            with pytest.raises(FormatError, match=f"'{name}' is neither a folder here nor to be had from the Hub: "):
                load(name)


def test_a_folder_of_one_coder_is_called_as_the_folder(tmp_path, monkeypatch):
    coder = trained(CONFIGS["topk"])
    coder.save_to_disk(tmp_path / "layers.2")
    assert list(Sae.load_many(str(tmp_path / "layers.2"), local=True)) == ["layers.2"]
    monkeypatch.chdir(tmp_path / "layers.2")
    assert Sae.load_many(".", local=True)["layers.2"].W_dec.equal(coder.W_dec)
    plan = push_to_hub(".", "me/sae", dry_run=True)
    assert "layers.2/sae.safetensors" in plan.files


def test_tensors_of_two_dtypes_lose_nothing(tmp_path):
    """EleutherAI's loader takes the first tensor's dtype for all, so half of such a file is rounded."""
    coder = trained(CONFIGS["topk"])
    coder.save_to_disk(tmp_path)
    tensors = load_file(tmp_path / "sae.safetensors")
    tensors["b_dec"] = tensors["b_dec"].bfloat16()
    save_file(tensors, tmp_path / "sae.safetensors")
    again = Sae.load_from_disk(tmp_path)
    assert torch.equal(again.encoder.weight, coder.encoder.weight)
    assert torch.equal(again.b_dec, coder.b_dec.bfloat16().float())


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(FormatError, match="there is no such folder"):
        Sae.load_from_disk(tmp_path / "nothing")
    trained(CONFIGS["topk"]).save_to_disk(tmp_path / "a")
    with pytest.raises(FormatError, match=r"coders in subfolders \(a\)"):
        Sae.load_from_disk(tmp_path)

    weights = tmp_path / "a" / "sae.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-40])
    with pytest.raises(FormatError, match="the file is torn"):
        Sae.load_from_disk(tmp_path / "a")

    weights.write_bytes(whole)
    tensors = load_file(weights)
    for change, message in [
        ({"b_dec": None}, "lacks the tensor b_dec"),
        ({"b_dec": torch.zeros(7)}, r"b_dec has shape \(7,\), expected \(6,\)"),
        ({"extra": torch.zeros(1)}, "holds extra"),
        ({"b_dec": torch.full((6,), torch.nan)}, "not finite"),
        ({"encoder.weight": torch.zeros(40, 6)}, "not of one coder"),
    ]:
        save_file({k: v for k, v in {**tensors, **change}.items() if v is not None}, weights)
        with pytest.raises(FormatError, match=message):
            Sae.load_from_disk(tmp_path / "a")
    weights.unlink()
    with pytest.raises(FormatError, match=r"has no sae.safetensors; the folder holds cfg.json"):
        Sae.load_from_disk(tmp_path / "a")


def test_saving_leaves_no_temporary_files_and_replaces_whole_files(tmp_path):
    first, second = trained(CONFIGS["topk"]), trained(CONFIGS["topk"])
    first.save_to_disk(tmp_path)
    second.save_to_disk(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cfg.json", "sae.safetensors"]
    assert torch.equal(Sae.load_from_disk(tmp_path).b_dec, second.b_dec)
