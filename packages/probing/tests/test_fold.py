"""Attention with its masks folded into one query and one output a row is attention with those masks."""

import pytest
import torch
import zoo
from test_probes import circuit_probe, task

from probing import TrainPlan, fit
from probing._attention import AttentionCall, FoldedAttention
from probing._prefix import FullModel, Prefix


def slow_heads(folded, keep, rows):
    """Row by row, head by head: mask queries, keys and values with their biases in, then attend."""
    call, out = folded.call, []
    heads, group, width = call.query.shape[1:]
    m = keep[..., folded.channels]
    for place, row in enumerate(rows.tolist()):
        mine = m if m.ndim == 1 else m[place]
        m_q, m_k, m_v = mine.split([heads * group * width, heads * width, heads * width])
        one = []
        for h in range(heads):
            k = call.key[row, h] * m_k.view(heads, width)[h] + 0.7  # any bias of the keys: it must not matter
            v = call.value[row, h] * m_v.view(heads, width)[h] + folded.value_bias[h, 0]
            for g in range(group):
                q = call.query[row, h, g] * m_q.view(heads, group, width)[h, g] + folded.query_bias[h, g]
                one.append(((k @ q) * call.scale + call.bias[row, 0, 0]).softmax(-1) @ v)
        out.append(torch.cat(one))
    return torch.stack(out)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(("group", "seen"), [(1, 3), (3, 5), (2, 11)])
def test_value_and_gradient_agree_with_the_definition(group, seen, by_row):
    rows, heads, width = 6, 2, 4
    bias = torch.zeros(rows, 1, 1, seen)
    bias[1, ..., 1:] = -torch.inf
    shape = (rows, heads, seen, width)
    call = AttentionCall(torch.randn(rows, heads, group, width), torch.randn(shape), torch.randn(shape), bias, 0.4)
    count = (group + 2) * heads * width
    folded = FoldedAttention(
        call,
        torch.randn(heads, group, width),
        torch.randn(heads, 1, width),
        torch.randperm(count + 3)[:count],
        ("a", "b"),
    )
    chosen = torch.tensor([1, 4, 4, 0])
    keep = torch.rand((4, count + 3) if by_row else (count + 3,), requires_grad=True)
    found = folded.heads([keep[..., :5], keep[..., 5:]], chosen)
    expected = slow_heads(folded, keep, chosen)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(expected)
    one, other = (torch.autograd.grad((v * weights).sum(), keep)[0] for v in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "folds"),
    [("gpt2", True), ("bert", True), ("opt", True), ("vit", True), ("mpnet", None)]
    + [(kind, False) for kind in ("llama", "gpt_neox", "gemma3", "t5")],  # rotated, normed, with a position bias
)
def test_masks_fold_where_they_scale_channels_and_only_there(kind, folds):
    model, data = task(kind)
    prefix = Prefix(circuit_probe(model, kind), data)
    if folds is not None:
        assert (prefix._fold is not None) == folds
    if prefix._fold is not None:
        assert prefix.cached_bytes > 0


def test_half_precision_and_masked_biases_do_not_fold():
    model, data = task("gpt2")
    assert Prefix(circuit_probe(model, hparams={"mask_bias": True}), data)._fold is None
    half = zoo.make("gpt2", torch.bfloat16)
    assert Prefix(circuit_probe(half), task("gpt2", model=half)[1])._fold is None


def test_masks_switched_off_and_other_weights_are_seen():
    """The cache was made with the model's own weights: where an ablation draws others, it is not asked."""
    model, data = task("gpt2")
    for part in ("attn", "mlp"):
        probe = circuit_probe(model, part=part)
        fit(probe, data, TrainPlan(epochs=2, batch_size=5, lr=0.5))
        fast, slow, rows = Prefix(probe, data), FullModel(probe, data), torch.arange(5)
        seen = []
        for change in (
            lambda c: c.use_masks(False),
            lambda c: c.use_masks(True),
            lambda c: c.set_ablate_mode("zero_ablate"),
            lambda c: c.set_ablate_mode("random_ablate"),
        ):
            change(probe.circuit)
            found = fast.vectors(rows)
            torch.testing.assert_close(found, slow.vectors(rows), rtol=1e-4, atol=1e-5)
            seen.append(found)
        assert not torch.allclose(seen[0], seen[1])
        assert not torch.allclose(seen[2], seen[3])


def test_labels_too_large_for_floats_are_told_apart():
    from probing._losses import soft_nearest_neighbour

    vectors = torch.randn(8, 4)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert torch.equal(soft_nearest_neighbour(vectors, labels), soft_nearest_neighbour(vectors, labels + 2**30))


def test_the_one_operation_gelu_is_the_models_own():
    from transformers.activations import NewGELUActivation

    from probing._prefix import _gelu

    x, y = (torch.linspace(-8, 8, 4001, requires_grad=True) for _ in range(2))
    one, other = NewGELUActivation()(x), _gelu(y)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    one.sum().backward()
    other.sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=2e-6)
    assert len(Prefix(circuit_probe(zoo.make("gpt2"), part="mlp"), task("gpt2")[1])._gelus) == 1
