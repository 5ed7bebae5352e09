"""What sketches keep: cosines of sketched gradients against exact ones, at equal floats a module, on two real models.

    python benchmarks/sketch_fidelity.py [--rows 100] [--sample 200] [--floats 64 256 1024] [--seeds 3]

Every linear layer; the spectral basis is fitted on documents that are not compared. Printed are the mean Spearman
correlation of cosines, the share of the five nearest rows that are found, and the error of inner products; means over
seeds where a sketch is random, and under them their standard errors. "by energy" is a tensor sketch
whose modules share the floats. The last lines are the relative noise of a rank-1 gradient's squared norm, over 2,000
seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _setup import assets

from attribute._fidelity import share_by_energy
from attribute.config import IndexConfig
from attribute.data import Row, TokenFile, TokenFileWriter
from attribute.engine import capturing_nothing, gradients_of, run_windows
from attribute.model import load_model, load_tokenizer
from gradcore import CapturePlan, Identity, TensorSketch, TwoSided, fidelity, fit_spectral, with_residual


def pieces(name: str, letters: int) -> list[str]:
    """Paragraphs of a text, joined until they have so many letters."""
    parts, piece = [], ""
    for paragraph in (assets() / "text" / name).read_text().split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) > letters:
            parts.append(piece)
            piece = ""
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--sample", type=int, default=200)
    parser.add_argument("--floats", type=int, nargs="*", default=[64, 256, 1024])
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    for name, texts in (
        ("llama-stories260k", pieces("tinystories-0.9mb.txt", 600)),
        ("gpt2-shakespeare/run0", pieces("tinyshakespeare.txt", 400)),
    ):
        model = load_model(str(assets() / name), device="cpu")
        tokenizer = load_tokenizer(str(assets() / name))
        every = np.random.default_rng(0).permutation(len(texts))[: args.rows + args.sample]
        with tempfile.TemporaryDirectory() as folder:
            tokens = {}
            for part, chosen in {"rows": every[: args.rows], "sample": every[args.rows :]}.items():
                Path(folder, part).mkdir()
                found = [tokenizer(texts[i], truncation=True, max_length=model.context)["input_ids"] for i in chosen]
                rows = [Row(np.array(ids), np.ones(len(ids), dtype=bool), {}) for ids in found]
                tokens[part] = TokenFileWriter(Path(folder, part), model.vocabulary).write(rows)
            measure(name, model, tokens["rows"], tokens["sample"], args.floats, args.seeds)
    noise()


def measure(name: str, model, rows: TokenFile, sample: TokenFile, floats: list[int], seeds: int) -> None:
    plan = model.plan(IndexConfig(projection_dim=0))
    exact = torch.from_numpy(gradients_of(model, rows, plan))
    print(f"{name}: {len(plan.modules)} modules, {plan.width:,} exact floats, {len(rows)} rows, {len(sample)} to fit")
    names = ("two-sided", "tensor", "by energy", "spectral", "by λ", "and rest")
    print(f"{'floats a module':>16} " + " ".join(f"{each:>19}" for each in names))
    near = nearest(exact)

    def judged(other) -> np.ndarray:
        found = torch.from_numpy(gradients_of(model, rows, other))
        kept = fidelity(found, exact)
        overlap = np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(nearest(found), near)])
        return np.array([kept.spearman, overlap, kept.error])

    def run() -> None:
        windows = [(0, 0, len(sample))]
        run_windows(model, sample, windows, [], capturing_nothing(model, plan), budget=4096)

    for count in floats:
        two = [judged(replace(plan, sketch=TwoSided(round(count**0.5), seed=seed))) for seed in range(seeds)]
        tensor = [judged(tensor_plan(plan, count, seed)) for seed in range(seeds)]
        budgeted = [share_by_energy(model, sample, tensor_plan(plan, count, s), budget=4096) for s in range(seeds)]
        shared = [judged(each) for each in budgeted]
        spectral = judged(fit_spectral(model.base, plan, run, floats=count))
        fitted = fit_spectral(model.base, plan, run, total=count * len(plan.modules))
        columns = [np.mean(each, 0) for each in (two, tensor, shared)]
        columns += [spectral, judged(fitted), judged(with_residual(fitted))]
        print(f"{count:16,} " + " ".join(f"{s:7.4f} {o:4.2f} {e:6.4f}" for s, o, e in columns), flush=True)
        if seeds > 1:
            spread = [np.std([s for s, _, _ in each], ddof=1) / seeds**0.5 for each in (two, tensor, shared)]
            print(f"{'±':>16} " + " ".join(f"{each:7.4f} {'':11}" for each in spread), flush=True)
    assert isinstance(plan.sketch, Identity)


def tensor_plan(plan: CapturePlan, count: int, seed: int) -> CapturePlan:
    return replace(plan, sketch=TensorSketch(count, seed))


def nearest(rows: torch.Tensor, count: int = 5) -> list[list[int]]:
    """Of each row, the others with the largest cosine."""
    unit = torch.nn.functional.normalize(rows.double())
    return (unit @ unit.T).fill_diagonal_(-2).topk(count).indices.tolist()


def noise() -> None:
    draw = torch.Generator().manual_seed(0)
    out, into = torch.randn(1, 1, 384, generator=draw), torch.randn(1, 1, 128, generator=draw)
    size = float(out.square().sum() * into.square().sum())
    for sketch in (TwoSided, TensorSketch):
        found = []
        for seed in range(2000):
            bound = (sketch(16, seed=seed) if sketch is TwoSided else sketch(256, seed)).bind(
                "m", 384, 128, torch.device("cpu")
            )
            found.append(float(bound.combine(bound.project_out(out), bound.project_in(into)).square().sum()) / size)
        ratio = np.array(found)
        print(f"rank-1 gradient, 256 floats, {sketch.kind}: mean {ratio.mean():.3f}, relative noise {ratio.std():.3f}")


if __name__ == "__main__":
    main()
