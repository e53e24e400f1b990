"""Ways to corrupt the words that a question hangs on, for causal tracing.

A constraint is what the answer must fit: the words "this place", "Paris", or positions of any kind. A corruption takes
them away; what is left of the answer says how much hung on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from hooked_llava.checks import is_whole_number
from hooked_llava.errors import InputError, counted
from hooked_llava.experiments.pairs import gaussian_noise, other_image
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.requirements import require
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.positions import Positions
from hooked_llava.prompt.requirements import WORDS_UNKNOWN
from hooked_llava.prompt.token_map import GIVE_POSITIONS, TokenMap
from hooked_llava.prompt.token_text import begins_with_bos, repeat_image_tokens
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.replay import Replay

Constraint = str | int | Sequence[int] | Int[np.ndarray, " position"] | Int[Tensor, " position"]
"""Words of the question, a position, or positions."""


@dataclass(frozen=True)
class Replace:
    """The constraint's words are replaced by others of as many tokens; the image stays (Basu et al., 2406.04236).

    Attributes:
        words (str | Sequence[str]): Words for every constraint, or a list with those for each.
        repeat (bool): Write the first token of the words at each of the constraint's tokens, as the released code does.
    """

    words: str | Sequence[str]
    repeat: bool = False


@dataclass(frozen=True)
class Noise:
    """Gaussian noise is added to the constraint's embeddings (Meng et al. 2022, 2202.05262).

    Attributes:
        std (float | None): Its spread; three times that of the token embeddings by default.
        seed (int): Seed of the noise.
        samples (int): How many draws the effects are averaged over.
    """

    std: float | None = None
    seed: int = 0
    samples: int = 1


@dataclass(frozen=True)
class MeanEmbedding:
    """The constraint's embeddings are replaced by the mean of all token embeddings."""


@dataclass(frozen=True)
class OtherImage:
    """The image is exchanged for another; the words stay.

    Attributes:
        image (ImageLike or Inputs): An image, anything `prepare` takes as one; or inputs with one, as a processor
            returns them too.
    """

    image: Any


Corruption = str | Replace | Noise | MeanEmbedding | OtherImage
"""A string stands for `Replace` by those words."""


@dataclass(frozen=True)
class Corrupted:
    """Runs of one prompt under a corruption.

    Attributes:
        replays (list[Replay]): One for each draw of the noise, else one.
        first (int | None): First position whose embedding may differ from the clean one; None if none does.
        labels (list[str]): What stands at every position now.
        n_forward (int): Full forward passes that it took.
    """

    replays: list[Replay]
    first: int | None
    labels: list[str]
    n_forward: int


def find_constraints(token_map: TokenMap, constraint: Constraint | Sequence[Constraint]) -> list[Positions]:
    """The positions of one or several constraints; words are looked for in the question where it is known.

    Raises `SpanError` for words that are not there or stand there several times, and `InputError` for no constraint,
    positions outside the prompt, and constraints that overlap.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> find_constraints(model.prepare("Is there a red star?").token_map, ["red", "star"])
    [Positions(5), Positions(6)]
    """
    entries = [constraint] if isinstance(constraint, str | int) or is_whole_number(constraint) else list(constraint)
    given: list[Any] = [entries] if all(map(is_whole_number, entries)) else entries
    if not entries or not all(len(entry) for entry in given):
        raise InputError(f"constraint={constraint!r} names nothing; give words of the question, or positions.")
    parts = token_map.words.parts if token_map.words is not None else {}
    within = "question" if "question" in parts else None
    found = [
        token_map.find(c, within=within, advice=GIVE_POSITIONS) if isinstance(c, str) else Positions(c) for c in given
    ]
    if outside := [p for positions in found for p in positions if p not in token_map.real]:
        raise InputError(
            f"constraint={constraint!r}: positions {outside} are not in the prompt; expected {token_map.real.start} to "
            f"{token_map.real.stop - 1}."
        )
    for i, one in enumerate(found):
        for j, other in enumerate(found[:i]):
            if not one.isdisjoint(other):
                raise InputError(
                    f"Constraints {j} and {i}, {given[j]!r} and {given[i]!r}, share positions {(one & other).tolist()}, which "
                    "cannot be corrupted in two ways. Give constraints that do not overlap."
                )
    return found


def corrupt(model: HookedLLaVA, clean: Replay, constraints: list[Positions], corruption: Corruption) -> Corrupted:
    """The corrupted runs of a kept clean run of one prompt; what lies before the first change is shared with it.

    Raises `InputError` for words of another number of tokens, and for what is no corruption.
    """
    token_map = clean.inputs.token_map
    where = Positions(p for positions in constraints for p in positions)
    if isinstance(corruption, OtherImage):
        return _with_other_image(model, clean.inputs, corruption)
    labels = list(token_map.labels)
    changed = where
    if isinstance(corruption, str | Replace):
        chosen = Replace(corruption) if isinstance(corruption, str) else corruption
        new = replacement(model, token_map, constraints, chosen)
        changed = Positions(p for p, token in new.items() if token != token_map.token_ids[p])
        ids = [new[p] for p in changed]
        runs = [[Intervention("hook_embed", positions=changed, value=model.W_E[ids])]] if ids else [[]]
        for p, token in new.items():
            labels[p] = _shown(model, token)
    elif isinstance(corruption, MeanEmbedding):
        mean = model.W_E.float().mean(0).to(model.W_E.dtype)
        runs = [[Intervention("hook_embed", positions=where, value=mean)]]
    elif isinstance(corruption, Noise):
        seeds = range(corruption.seed, corruption.seed + corruption.samples)
        if not seeds:
            raise InputError(f"Noise(samples={corruption.samples}) draws none; expected at least 1.")
        if corruption.std is not None and not corruption.std >= 0:
            raise InputError(f"Noise(std={corruption.std:g}) is no spread; expected 0 or more.")
        runs = [[gaussian_noise(model, clean.inputs, where, std=corruption.std, seed=seed)] for seed in seeds]
    else:
        raise InputError(
            f"corruption={corruption!r}; expected words that replace the constraint, Replace(...), Noise(...), "
            "MeanEmbedding() or OtherImage(...)."
        )
    return Corrupted([clean.branch(run) for run in runs], min(changed, default=None), labels, 0)


def replacement(
    model: HookedLLaVA, token_map: TokenMap, constraints: list[Positions], corruption: Replace
) -> dict[int, int]:
    """For every position of the constraints the token id that replaces the one there.

    Words are tokenized where they stand, between their neighbors. Raises `InputError` if they take another number of
    tokens than the constraint.
    """
    if token_map.words is None or model.processor is None:
        require(["processor"], "A corruption in words, unlike Noise() and MeanEmbedding(),", model)
        raise InputError(f"A corruption in words, unlike Noise() and MeanEmbedding(), cannot be made: {WORDS_UNKNOWN}")
    words = [corruption.words] * len(constraints) if isinstance(corruption.words, str) else list(corruption.words)
    if len(words) != len(constraints):
        raise InputError(f"There are {len(words)} replacements for {len(constraints)} constraints; expected as many.")
    if corruption.repeat:
        firsts = [_in_place(model, token_map, *both)[0] for both in zip(constraints, words, strict=True)]
        return {p: token for where, token in zip(constraints, firsts, strict=True) for p in where}
    found = _tokenized_in_place(model, token_map, constraints, words)
    if found is not None:
        return found
    new: dict[int, int] = {}
    for where, word in zip(constraints, words, strict=True):
        ids = _in_place(model, token_map, where, word)
        if len(ids) != len(where):
            old = " ".join(token_map.labels[p].strip() for p in where)
            raise InputError(
                f"{word!r} takes {counted(len(ids), 'token')} and the constraint {old!r} {len(where)}, so "
                "the positions after them would not match. Choose words of as many tokens, or have their first token stand "
                "at every place (repeat)."
            )
        new |= dict(zip(where, ids, strict=True))
    return new


def _tokenized_in_place(
    model: HookedLLaVA, token_map: TokenMap, constraints: list[Positions], words: list[str]
) -> dict[int, int] | None:
    """The new ids if the whole prompt with the new words differs in the constraints alone, else None."""
    text = token_map.words
    assert text is not None
    spans = [_characters(token_map, where) for where in constraints]
    changed = text.text
    for (start, stop), word in sorted(zip(spans, words, strict=True), reverse=True):
        changed = changed[:start] + word + changed[stop:]
    before, after = (_encoded(model, t, [len(image) for image in token_map.image_ranges]) for t in (text.text, changed))
    real = [token_map.token_ids[p] for p in token_map.own]
    if before != real or len(after) != len(real):
        return None
    new = dict(zip(token_map.own, after, strict=True))
    inside = {p for where in constraints for p in where}
    if any(new[p] != token_map.token_ids[p] for p in token_map.own if p not in inside):
        return None
    return {p: new[p] for p in inside}


def _characters(token_map: TokenMap, where: Positions) -> tuple[int, int]:
    assert token_map.words is not None
    text, offsets = token_map.words.text, token_map.words.offsets
    start, stop = min(offsets[p][0] for p in where), max(offsets[p][1] for p in where)
    while start < stop and text[start].isspace():  # some tokens hold the space before their word
        start += 1
    return start, stop


def _encoded(model: HookedLLaVA, text: str, sizes: Sequence[int]) -> list[int]:
    image = model.tokenizer.convert_ids_to_tokens(model.config.image_token_id)
    special = not begins_with_bos(model.tokenizer, text)
    longer = repeat_image_tokens(text, image, sizes)
    return list(model.tokenizer(longer, add_special_tokens=special)["input_ids"])


def _in_place(model: HookedLLaVA, token_map: TokenMap, where: Positions, word: str) -> list[int]:
    """The tokens of a word where a constraint stands, after what stands before it.

    Raises `InputError` for a word without tokens, and for one that would change the tokens before it.
    """
    assert token_map.words is not None
    start, _ = _characters(token_map, where)
    before = [token_map.token_ids[p] for p in token_map.own if p < where[0]]
    ids = _encoded(model, token_map.words.text[:start] + word, [len(image) for image in token_map.image_ranges])
    if ids[: len(before)] != before:
        raise InputError(
            f"{word!r} would change the tokens before position {where[0]}, where it is to stand. Choose other words, or take "
            "Noise() or MeanEmbedding()."
        )
    if len(ids) == len(before):
        raise InputError(f"The replacement {word!r} has no tokens; give a word.")
    return ids[len(before) :]


def _shown(model: HookedLLaVA, token: int) -> str:
    return model.tokenizer.decode([token])


def _with_other_image(model: HookedLLaVA, inputs: Inputs, corruption: OtherImage) -> Corrupted:
    given = corruption.image
    pool = model.as_inputs(given) if isinstance(given, Inputs | Mapping) else [given]
    other = other_image(model, inputs, pool)
    first = min((start for start in inputs.token_map.image_starts), default=None)
    return Corrupted([Replay(model, other)], first, list(inputs.token_map.labels), 1)


def describe(corruption: Corruption, *, words: bool = True) -> str:
    """The corruption in a few words, for a result's attributes; on request without the words that replace others.

    >>> describe("the ring"), describe("the ring", words=False), describe(Noise(std=0.5))
    ("replaced by 'the ring'", 'replaced by other words', 'noise of spread 0.5, 1 draw')
    """
    if isinstance(corruption, str):
        return describe(Replace(corruption), words=words)
    if isinstance(corruption, Replace):
        new = corruption.words if isinstance(corruption.words, str) else ", ".join(corruption.words)
        by = repr(new) if words else "other words"
        return f"replaced by {by}" + (" at every token" if corruption.repeat else "")
    if isinstance(corruption, Noise):
        spread = "three times the embeddings' spread" if corruption.std is None else f"spread {corruption.std:g}"
        return f"noise of {spread}, {counted(corruption.samples, 'draw')}"
    return "mean embedding" if isinstance(corruption, MeanEmbedding) else "another image"
