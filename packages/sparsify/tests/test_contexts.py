"""Strongest contexts against a full table of activations, and the page that shows them."""

import re

import pytest
import torch
from small import Tiny, token_rows
from torch.testing import assert_close

from sparsify import ConfigError, DataError, SaeConfig, SparseCoder, evaluate, plot_evaluation, top_contexts
from sparsify import write_dashboard as write

ROWS = token_rows(23, 12)


class Letters:
    """One letter a token, with a space before every third."""

    def decode(self, ids):
        return "".join((" " if i % 3 == 0 else "") + chr(97 + i % 26) for i in ids)


@pytest.fixture(params=[{}, {"activation": "groupmax"}, {"transcode": True}], ids=["topk", "groupmax", "transcoder"])
def coder(request):
    torch.manual_seed(1)
    return SparseCoder(12, SaeConfig(k=4, num_latents=32, **request.param))


def table_of(model, coder, hook="layers.1"):
    """(rows, tokens, latents) activations, all at once."""
    base = model.base_model
    with torch.no_grad():
        x = base.layers[0](base.embed(ROWS))
        acts, indices, _ = coder.encode(x if coder.cfg.transcode else base.layers[1](x))
    return torch.zeros(*ROWS.shape, coder.num_latents).scatter_(-1, indices, acts)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_contexts_are_the_rows_with_the_strongest_activations(coder, batch_size):
    model = Tiny()
    used = ROWS
    table = table_of(model, coder)[: len(used)]
    found = top_contexts(
        model, {"layers.1": coder}, ROWS, latents=range(32), contexts=3, before=4, after=2, batch_size=batch_size
    )["layers.1"]
    assert sorted(latent.index for latent in found) == list(range(32))
    assert [x.frequency for x in found] == sorted((x.frequency for x in found), reverse=True)
    for latent in found:
        acts = table[..., latent.index]
        assert latent.frequency == pytest.approx(float((acts > 0).double().mean()))
        peaks = acts.amax(1).sort(descending=True).values
        expected = peaks[peaks > 0][:3]
        assert_close(torch.tensor([c.peak for c in latent.contexts]), expected)
        assert len({c.row for c in latent.contexts}) == len(latent.contexts)
        for c in latent.contexts:
            start, stop = max(0, c.position - 4), min(12, c.position + 3)
            assert c.tokens == tuple(used[c.row, start:stop].tolist())
            assert_close(torch.tensor(c.acts), acts[c.row, start:stop])
            assert acts[c.row, c.position] == acts[c.row].max()


def test_the_sample_holds_only_latents_that_fire_and_is_the_same_again(coder):
    model = Tiny()
    ask = {"sample": 5, "batch_size": 4}
    first = top_contexts(model, {"layers.1": coder}, ROWS, **ask)
    assert first == top_contexts(model, {"layers.1": coder}, ROWS, **ask)
    assert len(first["layers.1"]) == 5
    assert all(latent.contexts for latent in first["layers.1"])
    coder.encoder.bias.data -= 1e3
    with pytest.raises(DataError, match="no latent fires"):
        top_contexts(model, {"layers.1": coder}, ROWS, **ask)
    with pytest.raises(ConfigError, match="latents 0 to 31, not 32"):
        top_contexts(model, {"layers.1": coder}, ROWS, latents=[32])


def test_favoured_tokens_are_those_of_the_head(coder):
    model = Tiny()
    model.get_output_embeddings = lambda: model.head
    if coder.cfg.transcode:
        torch.nn.init.normal_(coder.W_dec)
    latent = top_contexts(model, {"layers.1": coder}, ROWS, latents=[7])["layers.1"][0]
    logits = coder.W_dec[7] @ model.head.weight.T
    assert list(latent.promoted) == logits.topk(8).indices.tolist()
    assert list(latent.suppressed) == (-logits).topk(8).indices.tolist()


def test_the_page_stands_alone_and_shows_every_token(coder, tmp_path):
    model = Tiny()
    coders = {"layers.1": coder}
    found = top_contexts(model, coders, ROWS, sample=3, contexts=2, batch_size=4)
    result = evaluate(model, coders, ROWS, batch_size=4)
    page = write(tmp_path / "deep" / "page.html", found, Letters(), title="<b>", evaluation=result).read_text()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "<script" not in page
    assert "http" not in page
    assert f"{result.reconstruction['layers.1'].fvu:.4f}" in page
    shown = re.findall(r'<p class="context"><b[^>]*>[^<]*</b>(.*?)</p>', page, re.S)
    texts = [Letters().decode(c.tokens) for latent in found["layers.1"] for c in latent.contexts]
    assert [re.sub("<[^>]+>", "", text) for text in shown] == texts
    assert page.count('class="peak"') == len(texts)
    with pytest.raises(DataError, match="no latents"):
        write(tmp_path / "none.html", {"layers.1": []}, Letters())


def test_an_evaluation_is_drawn(coder, tmp_path):
    model = Tiny()
    result = evaluate(model, {"layers.1": coder}, ROWS, batch_size=4)
    drawn = plot_evaluation(result, tmp_path / "eval.svg").read_text()
    assert "<svg" in drawn
    bare = evaluate(model.base_model, {"layers.1": coder}, ROWS, batch_size=4)
    assert not bare.grafted
    assert plot_evaluation(bare, tmp_path / "bare.svg").stat().st_size
    assert result.latency["layers.1"].encode > 0
    assert result.latency["layers.1"].model > 0
