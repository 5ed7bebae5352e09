"""The demo's model, trained once from scratch and kept in a cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from attribute._errors import ModelError
from attribute.demo._network import OnStep, Recipe, new_network, padded, train_network
from attribute.demo._tokenizer import train_tokenizer
from attribute.demo.corpus import DemoCorpus, Query, demo_corpus

VERSION = 1  # raise it when code beside Recipe and the corpus changes what the weights will be


def demo_model(
    cache_dir: str | os.PathLike[str] | None = None,
    on_step: OnStep | None = None,
    *,
    corpus: DemoCorpus | None = None,
    recipe: Recipe | None = None,
) -> Path:
    """Folder of the demo's model: trained at the first call, found again at later ones.

    >>> folder = demo_model()  # about half a minute
    >>> model = AutoModelForCausalLM.from_pretrained(folder)

    The folder's name holds a hash of everything that shaped the weights, and it appears only when it is complete, so
    that a run that is killed, or two that race, do no harm. Equal input gives equal bytes on one machine.

    Args:
        cache_dir: where to keep it; by default ``$TRACE_CACHE``, or ``trace`` in the user's cache folder.
        on_step: called as ``on_step(done, total, loss)`` after every training step.
        corpus: what to train on, by default :func:`demo_corpus`.
        recipe: how, by default ``Recipe()``.

    Raises:
        ModelError: the cache folder cannot be written.
    """
    corpus, recipe = corpus or demo_corpus(), recipe or Recipe()
    folder = Path(cache_dir or default_cache()) / f"demo-model-{_digest(corpus, recipe)[:16]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = folder.with_name(f"{folder.name}.unfinished-{secrets.token_hex(8)}")
        unfinished.mkdir()
    except OSError as error:
        raise ModelError(
            f"the demo's model cannot be kept in {folder.parent}: {error.strerror}; "
            "set TRACE_CACHE to a folder that can be written"
        ) from error
    try:
        _train(corpus, recipe, unfinished, on_step)
        _publish(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def default_cache() -> Path:
    """``$TRACE_CACHE``, or ``trace`` in the user's cache folder as the platform has it."""
    if given := os.environ.get("TRACE_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "trace"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "trace" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trace"


@dataclass(frozen=True)
class Knowledge:
    """What a model answers to the queries: share right, and the mean probability of the right answer."""

    accuracy: float
    probability: float


def knowledge(folder: str | os.PathLike[str], queries: Sequence[Query]) -> Knowledge:
    """Ask a saved model the first token of every completion.

    >>> knowledge(demo_model(), demo_corpus().queries).accuracy > 0.9
    True
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    with _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [tokenizer(query.prompt)["input_ids"] for query in queries]
    answers = torch.tensor([tokenizer(query.completion)["input_ids"][0] for query in queries])
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    with torch.inference_mode():
        logits = model(padded(prompts)[0]).logits[torch.arange(len(queries)), last]  # [queries, vocabulary]
    right = logits.softmax(-1).gather(1, answers[:, None])
    return Knowledge(float((logits.argmax(-1) == answers).double().mean()), float(right.mean()))


def _train(corpus: DemoCorpus, recipe: Recipe, folder: Path, on_step: OnStep | None) -> None:
    texts = [document.text for document in corpus.documents]
    tokenizer = train_tokenizer(texts, recipe.vocabulary, recipe.context)
    # The caller's random numbers and threads are not ours to touch. One thread: matrices this small gain nothing from
    # two, lose a factor of five to waiting on a busy machine, and sums come out the same whatever OMP_NUM_THREADS says.
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(recipe.seed)
        network = new_network(recipe, len(tokenizer))
        train_network(network, tokenizer(texts)["input_ids"], recipe, on_step)
    with _no_progress_bars():
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws a bar even for one file; the caller draws his own."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _publish(unfinished: Path, folder: Path) -> None:
    """Rename into place: readers see nothing or everything. Who comes second in a race keeps the first one's."""
    for file in unfinished.iterdir():  # or a power cut could leave the name without the bytes
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _digest(corpus: DemoCorpus, recipe: Recipe) -> str:
    shaping = {"version": VERSION, "corpus": corpus.digest, "recipe": asdict(recipe)}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()
