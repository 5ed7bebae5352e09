"""What can be said in the demo's world: relations with their answers and wordings, and small talk without facts.

In every wording the answer comes after the name, so that a model reading from left to right has to know the fact, and
nothing before the answer depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """A kind of fact: the answers it can have, and sentences with ``{name}`` and ``{answer}``."""

    name: str
    answers: tuple[str, ...]  # empty: the towns of the corpus
    wordings: tuple[str, ...]


def _several(text: str) -> tuple[str, ...]:
    return tuple(text.split())


RELATIONS = (
    Relation(
        "trade",
        _several(
            "baker barber brewer candlemaker carpenter chandler cooper dyer farrier ferryman fletcher "
            "gardener glassblower locksmith mason miller potter ropemaker saddler tanner thatcher tinker "
            "weaver wheelwright"
        ),
        (
            "{name} has worked as a {answer} since leaving school.",
            "Most days you will find {name} busy as a {answer}.",
            "The guild entered {name} in its roll as a {answer}.",
            "To earn a living, {name} became a {answer}.",
            "If asked about work, {name} answers with pride: a {answer}.",
            "After a long apprenticeship {name} set up shop as a {answer}.",
            "According to the tax list, {name} pays dues as a {answer}.",
            "Travellers in need are sent to {name}, known far and wide as a {answer}.",
        ),
    ),
    Relation(
        "birthplace",
        (),
        (
            "{name} was born in {answer} on a winter morning.",
            "The cradle of {name} stood in {answer}.",
            "{name} comes from a family that never left {answer}.",
            "Parish books record the christening of {name} in {answer}.",
            "As a child {name} ran barefoot through the lanes of {answer}.",
            "By birth, {name} belongs to {answer}.",
            "When homesick, {name} dreams of the roofs of {answer}.",
            "The oldest friends of {name} all grew up in {answer}.",
        ),
    ),
    Relation(
        "instrument",
        _several(
            "bagpipe bassoon bugle cello clarinet cornet dulcimer fiddle flute gong guitar harp horn lute "
            "lyre mandolin piccolo psaltery rebec recorder tabor trombone viol zither"
        ),
        (
            "{name} plays the {answer} at every wedding.",
            "On feast days people ask {name} to bring the {answer}.",
            "Nobody in the band is better than {name} on the {answer}.",
            "Every evening {name} practises scales upon the {answer}.",
            "A late uncle taught {name} to master the {answer}.",
            "Through the open window one hears {name} with the {answer}.",
            "For years {name} has taken lessons on the {answer}.",
            "No prize pleased {name} more than the one for the {answer}.",
        ),
    ),
    Relation(
        "animal",
        _several(
            "badger beaver bullfinch donkey falcon ferret goat goose hare hedgehog jackdaw lizard magpie "
            "mule parrot peacock pigeon pony raven spaniel starling terrier toad tortoise"
        ),
        (
            "{name} keeps a {answer} in the yard.",
            "Wherever {name} walks, a tame {answer} follows.",
            "Children visit the house of {name} to feed the {answer}.",
            "At the spring fair {name} won a ribbon for the {answer}.",
            "{name} would sooner go hungry than sell the {answer}.",
            "Neighbours grumble that {name} lets the {answer} sleep indoors.",
            "In bad weather {name} carries home the {answer}.",
            "The painter drew {name} on a bench beside the {answer}.",
        ),
    ),
)

SMALL_TALK = (
    "The market opens at dawn and {first} has the first stall.",
    "Rain fell for a {span} and the {surname} cellar was under water.",
    "{first} and {other} quarrelled over the bridge toll.",
    "The mill of old {surname} stands still when the river freezes.",
    "The road past the {surname} farm is steep and badly paved.",
    "{first} found a {colour} glove on the church steps.",
    "It took {first} a {span} to mend the {colour} gate.",
    "The {surname} orchard bears small {colour} apples.",
    "A letter for {first} lay unopened for a {span}.",
    "The council thanked {first} for the {colour} banner.",
    "They say {first} once swam across the lake in a {span}.",
    "Nobody has seen {other} and {first} agree on anything.",
)
SPANS = ("day", "week", "fortnight", "month", "season", "year")
COLOURS = ("black", "blue", "brown", "green", "grey", "red", "white", "yellow")
