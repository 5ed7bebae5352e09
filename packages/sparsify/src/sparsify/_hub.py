"""Publishing a run: checked, in one commit, with a card that says what the dictionaries are and how well they do."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sparsify._card import BEGIN, END, card
from sparsify._coder import SparseCoder
from sparsify._errors import FormatError
from sparsify._evaluate import Evaluation
from sparsify._files import HUB_ERRORS, load_many, save_coder, write_json

SUFFIXES = (".json", ".yaml", ".safetensors", ".md")
"""Nothing else is ever uploaded: no optimiser state, no pickles, no logs."""


@dataclass(frozen=True)
class Push:
    """What was, or in a dry run would be, uploaded: bytes by path."""

    files: dict[str, int]
    commit_url: str | None
    readme: str
    """"written", or "kept" where the repository has a README somebody wrote by hand."""


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    revision: str = "main",
    private: bool = False,
    evaluation: Evaluation | Mapping[str, Any] | None = None,
    license: str | None = None,
    dry_run: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> Push:
    """Upload a run's coders with a model card, in one commit.

    >>> push_to_hub("checkpoints/run", "me/sae-pythia-160m", dry_run=True).files  # doctest: +SKIP

    Every coder is loaded, saved to a fresh folder and loaded from there again before anything leaves the machine. A
    README without this package's markers was written by hand and stays; one with them is replaced between them.

    Args:
        folder: a run folder, or any folder of coders.
        revision: branch, made where missing.
        evaluation: from `evaluate`; by default the folder's eval.json, where there is one.
        license: of the weights, for the card's header.
        dry_run: list the files and stop; contacts nothing.
        endpoint: of a Hub other than the default.

    Raises:
        FormatError: no coders, one that does not survive saving, a README that cannot be read, or the Hub refuses.
    """
    source = Path(folder)
    coders = load_many(str(source), True, None, "cpu", True)
    recipe = _public(_json(source / "config.json"))
    judged = (
        evaluation.to_dict() if isinstance(evaluation, Evaluation) else dict(evaluation or _json(source / "eval.json"))
    )
    with tempfile.TemporaryDirectory() as scratch:
        stage = Path(scratch)
        for hook, coder in coders.items():
            save_coder(coder, stage / hook)
        _check_survival(coders, stage)
        if recipe:
            write_json(stage / "config.json", recipe)
        if judged:
            write_json(stage / "eval.json", judged)
        text = card(repo_id, coders, recipe, judged, license)
        api = HfApi(endpoint=endpoint, token=token)
        old = None if dry_run else _existing_readme(api, repo_id, revision, stage)
        merged = _merged(old, text)
        if merged is not None:
            (stage / "README.md").write_text(merged, encoding="utf-8")
        paths = sorted(p for p in stage.rglob("*") if p.is_file() and p.suffix in SUFFIXES and ".cache" not in p.parts)
        files = {p.relative_to(stage).as_posix(): p.stat().st_size for p in paths}
        readme = "kept" if merged is None else "written"
        if dry_run:
            return Push(files, None, readme)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision != "main":
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            operations = [CommitOperationAdd(name, stage / name) for name in files]
            message = f"Upload {len(coders)} sparse coder{'s' if len(coders) > 1 else ''}"
            info = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
        except HUB_ERRORS as error:
            raise FormatError(f"the Hub refuses the upload to {repo_id}: {error}") from None
        return Push(files, info.commit_url, readme)


def _check_survival(coders: Mapping[str, SparseCoder], stage: Path) -> None:
    """What will be uploaded is what was trained: every tensor equal, and one encoding too."""
    again = load_many(str(stage), True, None, "cpu", True)
    for hook, coder in coders.items():
        state = again[hook].state_dict()
        same = all(torch.equal(value, state[name]) for name, value in coder.state_dict().items())
        x = torch.linspace(-1, 1, coder.d_in, dtype=coder.dtype)[None]
        with torch.no_grad():
            same = same and torch.equal(coder.encode(x).top_indices, again[hook].encode(x).top_indices)
        if not same:
            raise FormatError(f"{hook} is not the same after saving and loading it: nothing was uploaded")


def _existing_readme(api: HfApi, repo_id: str, revision: str, scratch: Path) -> str | None:
    """What may have been written by hand; only a plain "there is none" counts as none."""
    try:
        path = api.hf_hub_download(repo_id, "README.md", revision=revision, cache_dir=scratch / ".cache")
    except (LocalEntryNotFoundError, GatedRepoError) as error:  # subclasses of the next two, but no such answer
        raise _unread(repo_id, error.__cause__ or error) from None
    except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
        return None
    except HUB_ERRORS as error:
        raise _unread(repo_id, error) from None
    return Path(path).read_text(encoding="utf-8")


def _unread(repo_id: str, reason: BaseException) -> FormatError:
    told = str(reason).strip().partition("\n")[0]
    return FormatError(
        f"the README of {repo_id} cannot be read, and may be written by hand, so nothing was uploaded: {told}; "
        "check the name, the token and the connection, and push again"
    )


def _merged(old: str | None, new: str) -> str | None:
    """The new README; None leaves the old one alone."""
    if old is None:
        return new
    if BEGIN not in old or END not in old:
        return None
    # The header and what people wrote around the marked part are theirs.
    ours = new[new.index(BEGIN) : new.index(END) + len(END)]
    return old[: old.index(BEGIN)] + ours + old[old.index(END) + len(END) :]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _public(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe fit to be seen: no machine paths, no private folders."""
    kept = {name: value for name, value in recipe.items() if name not in ("save_dir", "finetune", "hf_token")}
    for name in ("model", "dataset"):
        if isinstance(kept.get(name), str) and Path(kept[name]).is_absolute():
            kept[name] = Path(kept[name]).name
    return kept
