"""A corpus of invented facts in which lexical search goes astray, and queries that know their sources.

Every person has a trade, a birthplace, an instrument and an animal, and each of these facts is told in several
wordings. A query states a fact in a wording that no document has for it. Its *planted* documents are those that state
the fact. Its *twins* are near-duplicates with changed facts: the query's very wording, half of its name, another
person and another answer. Counting words, a twin looks better than a source; names and answers recur, wordings too.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from random import Random

from attribute._errors import DataError
from attribute.demo._names import different, first_names, surnames, towns
from attribute.demo._wordings import COLOURS, RELATIONS, SMALL_TALK, SPANS, Relation

NO_FACT = -1


@dataclass(frozen=True)
class Document:
    """One training text; ``fact`` numbers what it states, and is −1 in small talk."""

    text: str
    fact: int


@dataclass(frozen=True)
class Query:
    """A fact in words that no document has for it, with the rows that state it and the rows made to mislead.

    ``name`` is the person asked about: with the completion the very words a search would need, if somebody told it.
    """

    prompt: str
    completion: str
    name: str
    fact: int
    planted: tuple[int, ...]
    twins: tuple[int, ...]

    @property
    def text(self) -> str:
        """Prompt and completion in one."""
        return self.prompt + self.completion

    @property
    def record(self) -> dict[str, str]:
        """The query as a dataset row."""
        return {"prompt": self.prompt, "completion": self.completion}


@dataclass(frozen=True)
class DemoCorpus:
    """Documents, and the queries that refer to them by row."""

    documents: tuple[Document, ...]
    queries: tuple[Query, ...]

    @property
    def records(self) -> list[dict[str, str | int]]:
        """The documents as dataset rows, in row order."""
        return [asdict(document) for document in self.documents]

    @property
    def digest(self) -> str:
        """SHA-256 of all texts and rows."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Telling:
    """A document before it has a row."""

    first: str
    last: str
    relation: Relation
    answer: str
    wording: str
    fact: int

    @property
    def name(self) -> str:
        return f"{self.first} {self.last}"

    def text(self) -> str:
        return self.wording.format(name=self.name, answer=self.answer)

    def misleads(self, other: _Telling) -> bool:
        """The same wording and half of the name, but another answer."""
        half_namesake = (self.first == other.first) != (self.last == other.last)
        return half_namesake and self.wording == other.wording and self.answer != other.answer


def demo_corpus(
    seed: int = 0, *, people: int = 48, names: int = 12, tellings: int = 6, queries: int = 96, small_talk: int = 240
) -> DemoCorpus:
    """The corpus of ``trace demo``.

    >>> corpus = demo_corpus()
    >>> query = corpus.queries[0]
    >>> query.completion.strip() in corpus.documents[query.planted[0]].text
    True

    Args:
        seed: another seed is another world: other names, facts, wordings.
        people: how many people there are; four facts are known of each.
        names: how many first names and how many surnames they share.
        tellings: wordings in which a fact is stated, of eight; the query takes another.
        queries: how many of the facts are asked for, drawn at random.
        small_talk: documents that state no fact.

    Raises:
        DataError: more of something than this world has.
    """
    in_all = min(len(relation.wordings) for relation in RELATIONS)
    for what, asked_for, most in (
        ("people", people, names**2),
        ("queries", queries, len(RELATIONS) * people),
        ("tellings", tellings, in_all - 1),  # one
    ):
        if not 1 <= asked_for <= most:
            raise DataError(f"{what}={asked_for}, but with these names and people there can be 1 to {most}")
    generator = Random(seed)
    first, last = first_names(generator, names), surnames(generator, names)
    pools = {relation.name: relation.answers or tuple(towns(generator, 24)) for relation in RELATIONS}
    folk = _people(generator, first, last, people)
    answers = {name: _deal(generator, pool, people) for name, pool in pools.items()}

    told: list[_Telling] = []
    asked: list[_Telling] = []
    for number, (own, family) in enumerate(folk):
        for relation in RELATIONS:
            wordings = generator.sample(relation.wordings, tellings + 1)
            answer = answers[relation.name][number]
            fact = len(asked)
            tell = [_Telling(own, family, relation, answer, wording, fact) for wording in wordings]
            asked.append(tell[0])
            told += tell[1:]
    chosen = sorted(generator.sample(asked, queries), key=lambda each: each.fact)
    rows: list[_Telling | str] = [*told, *_small_talk(generator, first, last, small_talk)]
    generator.shuffle(rows)
    return DemoCorpus(
        documents=tuple(
            Document(row, NO_FACT) if isinstance(row, str) else Document(row.text(), row.fact) for row in rows
        ),
        queries=tuple(_query(each, rows) for each in chosen),
    )


def _query(asked: _Telling, rows: list[_Telling | str]) -> Query:
    prompt, _, _ = asked.wording.partition(" {answer}")
    told = [(number, row) for number, row in enumerate(rows) if isinstance(row, _Telling)]
    return Query(
        prompt=prompt.format(name=asked.name),
        completion=f" {asked.answer}",
        name=asked.name,
        fact=asked.fact,
        planted=tuple(number for number, row in told if row.fact == asked.fact),
        twins=tuple(number for number, row in told if row.misleads(asked)),
    )


def _people(generator: Random, first: list[str], last: list[str], count: int) -> list[tuple[str, str]]:
    """Different pairs, every name used equally often: the diagonals of the table of first names and surnames."""
    names = len(first)
    diagonals = generator.sample(range(names), -(-count // names))
    return [(first[n], last[(n + shift) % names]) for shift in diagonals for n in range(names)][:count]


def _deal(generator: Random, pool: tuple[str, ...], count: int) -> list[str]:
    """Answers for ``count`` people, each answer used equally often."""
    cards = [pool[number % len(pool)] for number in range(count)]
    generator.shuffle(cards)
    return cards


def _small_talk(generator: Random, first: list[str], last: list[str], count: int) -> list[str]:
    """Different sentences about the same people that state none of their facts."""

    def draw() -> str:
        one, other = generator.sample(first, 2)
        return generator.choice(SMALL_TALK).format(
            first=one,
            other=other,
            surname=generator.choice(last),
            span=generator.choice(SPANS),
            colour=generator.choice(COLOURS),
        )

    return different(count, draw, "sentences of small talk")
