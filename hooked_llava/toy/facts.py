"""A closed table of a hundred invented facts about shapes: ten relations, one word per relation and shape."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hooked_llava.toy.objects import SHAPES

_TABLE_SEED = 7919  # the facts are part of the world, so they are the same for every training seed


@dataclass(frozen=True)
class Relation:
    """Something one can know about a shape.

    Attributes:
        name (str): Its name, such as "maker".
        templates (tuple[str, str, str]): Three wordings of its question, with `{subject}`.
        pool (tuple[str, ...]): The possible answers.
    """

    name: str
    templates: tuple[str, str, str]
    pool: tuple[str, ...]


RELATIONS = (
    Relation(
        "maker",
        ("Who made {subject}?", "Who is the maker of {subject}?", "By whom was {subject} made?"),
        ("Alice", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Hugo"),
    ),
    Relation(
        "home",
        ("Where does {subject} live?", "What is the home of {subject}?", "In which city does {subject} stay?"),
        ("Paris", "Rome", "Cairo", "Lima", "Oslo", "Delhi", "Tokyo", "Quito"),
    ),
    Relation(
        "owner",
        ("Who owns {subject}?", "Who is the owner of {subject}?", "To whom does {subject} belong?"),
        ("Ivan", "Julia", "Karl", "Laura", "Marco", "Nina", "Oscar", "Paula"),
    ),
    Relation(
        "food",
        ("What does {subject} eat?", "What is the food of {subject}?", "Which food does {subject} like?"),
        ("Bread", "Rice", "Soup", "Cheese", "Honey", "Plums", "Beans", "Fish"),
    ),
    Relation(
        "song",
        ("Which song does {subject} sing?", "What is the song of {subject}?", "Which tune does {subject} hum?"),
        ("Hallelujah", "Yesterday", "Imagine", "Thriller", "Vienna", "Jolene", "Creep", "Roxanne"),
    ),
    Relation(
        "drink",
        ("What does {subject} drink?", "What is the drink of {subject}?", "Which drink does {subject} order?"),
        ("Tea", "Coffee", "Milk", "Cider", "Water", "Cocoa", "Juice", "Lemonade"),
    ),
    Relation(
        "friend",
        ("Who is a friend of {subject}?", "Who knows {subject} well?", "With whom does {subject} play?"),
        ("Quentin", "Rosa", "Simon", "Tara", "Ulrich", "Vera", "Walter", "Yvonne"),
    ),
    Relation(
        "sport",
        ("Which sport does {subject} do?", "What is the sport of {subject}?", "In which sport is {subject} good?"),
        ("Tennis", "Chess", "Rugby", "Golf", "Judo", "Hockey", "Rowing", "Boxing"),
    ),
    Relation(
        "pet",
        ("Which pet does {subject} keep?", "What is the pet of {subject}?", "Which animal does {subject} feed?"),
        ("Cat", "Dog", "Parrot", "Rabbit", "Turtle", "Hamster", "Pony", "Goat"),
    ),
    Relation(
        "month",
        ("When was {subject} born?", "What is the birth month of {subject}?", "In which month was {subject} found?"),
        ("January", "February", "March", "April", "May", "June", "July", "August"),
    ),
)
RELATION_NAMES = tuple(relation.name for relation in RELATIONS)


@lru_cache(maxsize=1)
def fact_table() -> dict[tuple[str, str], str]:
    """All facts, (relation, shape) -> answer."""
    rng = np.random.default_rng(_TABLE_SEED)
    return {(r.name, s): r.pool[rng.integers(len(r.pool))] for r in RELATIONS for s in SHAPES}


def fact_answer(relation: str, shape: str) -> str:
    """What the table says of one relation and shape, such as "maker" and "star"."""
    return fact_table()[relation, shape]
