"""The words that a question of a table names: its two options and its objects, where they stand in it.

Zhang et al. (arXiv 2411.18620) also block the true option, the false option and the central object's word. Their code takes the
first place where the letters occur, "red" in "redder" included. Here words are whole, options are taken where they
stand on either side of "or", and an object's word is found at every place, in the plural too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

from hooked_llava.prompt.positions import Positions

if TYPE_CHECKING:
    from hooked_llava.prompt.token_map import TokenMap

Place = tuple[int, int]
"""First character, and the one after the last."""
_OR = re.compile(r"\bor\b", re.IGNORECASE)


def word_spans(token_map: TokenMap, options: tuple[str, str] | None, objects: Sequence[str]) -> dict[str, Positions]:
    """The spans `true_option`, `false_option` and `object_word` of a prompt, as far as its question names them."""
    words = token_map.words
    if words is None or words.prompt is None or "question" not in words.parts:
        return {}
    start, stop = words.parts["question"]
    found = word_places(words.prompt[start:stop], options, objects)
    spans = {
        name: Positions(p for first, last in places for p in token_map.locate(start + first, start + last))
        for name, places in found.items()
    }
    return {name: positions for name, positions in spans.items() if positions}


def word_places(question: str, options: tuple[str, str] | None, objects: Sequence[str]) -> dict[str, list[Place]]:
    """Where the true and the false option and the objects stand in a question, in characters; without those that do not.

    >>> asked = "Are the bags to the left or to the right of the redder bag?"
    >>> found = word_places(asked, ("left", "right"), ["bag"])
    >>> {name: [asked[slice(*place)] for place in places] for name, places in found.items()}
    {'true_option': ['left'], 'false_option': ['right'], 'object_word': ['bags', 'bag']}
    """
    found: dict[str, list[Place]] = {}
    if options is not None and (both := _options(question, *options)):
        found["true_option"], found["false_option"] = ([place] for place in both)
    named = sorted({place for name in objects for form in _forms(name) for place in _places(question, form)})
    if named:
        found["object_word"] = named
    return found


def _options(question: str, true: str, false: str) -> tuple[Place, Place] | None:
    """The two options nearest to each other with "or" between them; without "or", each where it stands only once."""
    of_true, of_false = list(_places(question, true)), list(_places(question, false))
    pairs = [(a, b) for a, b in product(of_true, of_false) if _or_between(question, a, b)]
    if pairs:
        return min(pairs, key=lambda pair: abs(pair[0][0] - pair[1][0]))
    return (of_true[0], of_false[0]) if len(of_true) == len(of_false) == 1 else None


def _or_between(question: str, one: Place, other: Place) -> bool:
    first, last = sorted((one, other))
    return first[1] <= last[0] and _OR.search(question[first[1] : last[0]]) is not None


def _places(question: str, word: str) -> Iterator[Place]:
    """Every place of a word that is no part of another, in whichever case."""
    if word := word.strip():
        pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
        yield from (match.span() for match in re.finditer(pattern, question, re.IGNORECASE))


def _forms(name: str) -> list[str]:
    """A name, and its regular plurals: GQA names objects in the singular and asks for them in either."""
    word = name.strip()
    if not word:
        return []
    return [word, f"{word}s", f"{word}es", *([f"{word[:-1]}ies"] if word.endswith("y") else [])]
