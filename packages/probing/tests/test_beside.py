"""The probes beside: closed forms, planted variables, and the network whose algorithm is known."""

import pytest
import torch
import zoo

from probing import ConfigError, DataError, ReadoutError, beside
from probing._structure import example_inputs


def planted(n=400, d=12, classes=4, seed=0, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(0, classes, (n,), generator=generator)
    return directions[labels] + noise * torch.randn(n, d, generator=generator), labels


class TestVectorProbes:
    def test_a_linear_probe_finds_a_linear_variable_and_only_the_mlp_a_product(self):
        x, y = planted()
        assert beside.train_vector_probe(x, y).accuracy(*planted(seed=1)).mean > 0.97
        signs = torch.randn(800, 6, generator=torch.Generator().manual_seed(0))
        product = (signs[:, 0] * signs[:, 1] > 0).long()
        linear = beside.train_vector_probe(signs[:600], product[:600])
        mlp = beside.train_vector_probe(signs[:600], product[:600], hidden=64)
        assert linear.accuracy(signs[600:], product[600:]).mean < 0.65
        assert mlp.accuracy(signs[600:], product[600:]).mean > 0.9

    def test_the_same_seed_gives_the_same_probe(self):
        x, y = planted()
        one, two = (beside.train_vector_probe(x, y, epochs=3, seed=5).logits(x) for _ in range(2))
        assert torch.equal(one, two)

    def test_bad_labels(self):
        x, y = planted()
        with pytest.raises(DataError, match="one class"):
            beside.train_vector_probe(x, y * 0)
        with pytest.raises(DataError, match="400 vectors but 399 labels"):
            beside.train_vector_probe(x, y[:-1])


class TestControlTasks:
    def test_one_random_label_a_key_drawn_as_labels_occur(self):
        keys = torch.randint(0, 500, (4000,), generator=torch.Generator().manual_seed(0))
        labels = (torch.arange(4000) % 10 == 0).long()
        control = beside.control_labels(keys, labels)
        for key in range(20):
            assert control[keys == key].unique().numel() <= 1
        assert control.float().mean() == pytest.approx(0.1, abs=0.04)
        assert not torch.equal(control, beside.control_labels(keys, labels, seed=1))

    def test_a_planted_variable_is_selective_and_a_memorised_one_is_not(self):
        x, y = planted(600)
        keys = torch.arange(600) % 150
        train, test = [(v[part] for v in (x, y, keys)) for part in (slice(0, 300), slice(300, 600))]
        real, control, difference = beside.selectivity(tuple(train), tuple(test))
        assert real.mean > 0.95
        assert difference == pytest.approx(real.mean - control.mean)
        assert difference > 0.5

    def test_one_key_is_no_task_and_few_keys_still_are(self):
        x, y = planted(200)
        one, two = torch.zeros(200, dtype=torch.long), torch.arange(200) % 2
        for seed in range(6):
            found = [beside.selectivity((x, y, keys), (x, y, keys), seed=seed, epochs=5) for keys in (one, two)]
            assert found[0][1:] == (None, None)
            assert found[1][1] is not None

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32])
    def test_labels_of_any_integer_type(self, dtype):
        x, y = planted(200)
        y = (y > 0).to(dtype)
        assert beside.train_vector_probe(x, y, epochs=2).logits(x).shape == (200, 2)
        assert beside.Eraser.fit(x, y)(x).shape == x.shape

    @pytest.mark.parametrize("how", [{"epochs": 0}, {"hidden": 0}])
    def test_nothing_to_train_is_refused(self, how):
        with pytest.raises(ConfigError, match="at least 1"):
            beside.train_vector_probe(*planted(100), **how)


class TestLeace:
    def test_erased_classes_have_equal_means_and_no_linear_probe_finds_them(self):
        x, y = planted(1200, 20, 5)
        erased = beside.Eraser.fit(x, y)(x)
        means = torch.stack([erased[y == c].mean(0) for c in range(5)])
        torch.testing.assert_close(means, means[:1].expand_as(means), atol=1e-4, rtol=0)
        assert beside.train_vector_probe(erased, y).accuracy(erased, y).mean < 0.35

    def test_it_is_idempotent_and_the_least_change_among_erasers(self):
        x, y = planted(1200, 20, 5)
        eraser = beside.Eraser.fit(x, y)
        torch.testing.assert_close(eraser(eraser(x)), eraser(x), atol=1e-4, rtol=0)
        # The alternative: project orthogonally onto the complement of the class means' span. It erases, too, but moves
        # more in the metric LEACE minimises, E‖W(r(x) − x)‖².
        centred = x - x.mean(0)
        means = torch.stack([centred[y == c].mean(0) for c in range(5)])
        basis = torch.linalg.svd(means.T, full_matrices=False).U[:, :4]
        whiten = torch.linalg.inv(torch.linalg.cholesky(centred.T @ centred / len(x)))
        change, other = eraser(x) - x, -centred @ basis @ basis.T
        assert (change @ whiten.T).square().sum() < (other @ whiten.T).square().sum()
        assert change.square().sum() < other.square().sum() * 1.001

    def test_a_degenerate_covariance_is_no_obstacle(self):
        x, y = planted(300, 6, 3)
        wide = torch.cat([x, x[:, :2], torch.zeros(300, 3)], 1)
        erased = beside.Eraser.fit(wide, y)(wide)
        assert torch.isfinite(erased).all()
        means = torch.stack([erased[y == c].mean(0) for c in range(3)])
        torch.testing.assert_close(means, means[:1].expand_as(means), atol=1e-4, rtol=0)


def test_counterfactual_vectors_make_the_probe_read_their_target():
    x, y = planted()
    probe = beside.train_vector_probe(x, y)
    targets = (y + 1) % 4
    moved, success = beside.counterfactual_vectors(probe, x, targets)
    assert success.float().mean() > 0.99
    assert torch.equal(probe.logits(moved).argmax(-1) == targets, success)


class TestPatching:
    def setup_method(self):
        self.model = zoo.make("gpt2")
        self.batch = example_inputs(self.model, rows=3, positions=5)
        self.mask = torch.zeros(3, 5, dtype=torch.bool)
        self.mask[:, 2] = True

    def logits(self, model):
        with torch.no_grad():
            return model(**self.batch).logits

    @pytest.mark.parametrize("key", ["attn_update_0", "mlp_update_1", "resid_in_1", "mlp_stream_0", "resid_out_1"])
    def test_the_same_vectors_change_nothing_and_others_only_later_positions(self, key):
        plain = self.logits(self.model)
        with beside.patched(self.model, key, self.mask, lambda v: v) as model:
            assert torch.equal(self.logits(model), plain)
        with beside.patched(self.model, key, self.mask, lambda v: v + torch.randn_like(v)) as model:
            changed = self.logits(model)
        assert torch.equal(changed[:, :2], plain[:, :2])
        assert not torch.isclose(changed[:, 2], plain[:, 2]).all()
        assert torch.equal(self.logits(self.model), plain)

    @pytest.mark.parametrize("kind", ["bert", "opt", "t5", "gemma3"])
    def test_zeroing_an_update_equals_zeroing_its_last_layer(self, kind):
        model = zoo.make(kind)
        batch = example_inputs(model, rows=3, positions=5)
        from probing._structure import find_layout

        layout = find_layout(model, [1], blocks=zoo.BLOCKS.get(kind))[0]
        mask = torch.ones(3, 5, dtype=torch.bool)
        with beside.patched(model, "mlp_update_1", mask, torch.zeros_like, layout=layout) as changed, torch.no_grad():
            found = next(iter(changed(**batch).values()))
        with torch.no_grad():
            for parameter in model.get_submodule(layout.sources[1]).parameters():
                parameter.zero_()
            if kind == "gemma3":  # a zero-centred norm scale: −1 is the scale that gives nothing
                model.get_submodule(layout.sources[1]).weight.fill_(-1.0)
            torch.testing.assert_close(found, next(iter(model(**batch).values())), rtol=1e-4, atol=1e-5)

    def test_bad_input(self):
        with (
            pytest.raises(ReadoutError, match="attn_update_0"),
            beside.patched(self.model, "resid_mid_0", self.mask, torch.zeros_like),
        ):
            pass
        with (
            pytest.raises(DataError, match=r"\(3, 16\)"),
            beside.patched(self.model, "mlp_update_0", self.mask, torch.zeros(2, 16)) as model,
        ):
            self.logits(model)


class TestInterchange:
    def test_the_rotation_is_orthogonal_and_the_mask_hardens(self):
        swap = beside.Interchange(6, 2.0)
        with torch.no_grad():
            swap.skew.normal_()
        rotation = swap.rotation()
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(6), atol=1e-5, rtol=0)
        assert swap.eval().mask().tolist() == [1, 1, 0, 0, 0, 0]
        assert (swap.train().mask().diff() < 0).all()

    def test_no_coordinate_swaps_nothing_and_every_coordinate_swaps_all(self):
        base, source = torch.randn(5, 6), torch.randn(5, 6)
        none, every = beside.Interchange(6, 0.0).eval(), beside.Interchange(6, 6.0).eval()
        torch.testing.assert_close(none(base, source), base)
        torch.testing.assert_close(every(base, source), source, atol=1e-5, rtol=1e-5)

    def test_a_planted_variable_is_found_in_the_update_that_carries_it(self):
        """A model whose MLP writes the first token's class along a hidden direction: swapping it swaps the answer."""

        class Block(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.attention, self.mlp = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)

            def forward(self, x):
                x = x + self.attention(x)
                return x + self.mlp(x)

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed, self.head = torch.nn.Embedding(8, 16), torch.nn.Linear(16, 2)
                self.blocks = torch.nn.ModuleList([Block()])
                self.config = type("Config", (), {"vocab_size": 8, "model_type": "toy"})()

            def forward(self, input_ids):
                x = self.embed(input_ids)
                for block in self.blocks:
                    x = block(x)
                return type("Output", (), {"logits": self.head(x)})()

        torch.manual_seed(0)
        net = Net()
        direction = torch.nn.functional.normalize(torch.randn(16), dim=0)
        with torch.no_grad():
            net.embed.weight[:] = torch.randn(8, 16)
            net.embed.weight -= (net.embed.weight @ direction)[:, None] * direction
            classes = torch.arange(8) % 2 * 2.0 - 1
            pinv = torch.linalg.pinv(net.embed.weight)
            net.blocks[0].attention.weight.mul_(0.01)
            net.blocks[0].attention.weight -= direction[:, None] * (direction @ net.blocks[0].attention.weight)[None]
            net.blocks[0].attention.bias.zero_()
            net.blocks[0].mlp.weight[:] = torch.outer(direction, pinv @ classes * 3) + 0.3 * torch.randn(16, 16)
            net.head.weight[:] = torch.stack([-direction, direction]) * 3
            net.head.bias.zero_()
        ids = torch.randint(0, 8, (400, 1), generator=torch.Generator().manual_seed(0))
        other = ids[torch.randperm(400, generator=torch.Generator().manual_seed(1))]
        expected = net(other).logits[:, -1].argmax(-1).detach()
        mask = torch.ones(400, 1, dtype=torch.bool)
        task = ("mlp_update_0", mask, {"input_ids": ids}, {"input_ids": other}, expected)
        swap = beside.train_interchange(net, *task, swap=beside.Interchange(16, 4.0, fixed=True), epochs=10)
        trained = beside.interchange_accuracy(net, *task, swap).mean()
        untrained = beside.interchange_accuracy(net, *task, beside.Interchange(16, 4.0)).mean()
        nothing = beside.interchange_accuracy(net, *task, beside.Interchange(16, 0.0)).mean()
        assert trained > 0.95
        assert trained > untrained + 0.1
        assert nothing < 0.65
        assert all(p.requires_grad for p in net.parameters())
