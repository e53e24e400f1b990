"""Other words in the place of a request's question: contexts before it, and the subject's essence.

What ROME (Meng et al. 2022, arXiv 2202.05262) adds to a request: prefixes x_j over which key and loss are averaged
(equations 3 and 4a), and the prompt "{subject} is a", whose next token is to stay (equation 4b).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from hooked_llava.checks import whole_number
from hooked_llava.editing.request import Prepared, position_of
from hooked_llava.editing.rows import joined
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.token_map import TokenMap

Contexts = Sequence[str] | Literal["generated"]
"""Texts that are put before the question, or those that `generated_contexts` makes."""
GENERATED = "generated"
ESSENCE = "{} is a"
"""ROME's prompt about the essence of a subject."""
_TOP = 5


def generated_contexts(
    model: HookedLLaVA, lengths: Sequence[tuple[int, int]] = ((5, 10), (10, 10)), *, start: str = "The", seed: int = 0
) -> list[str]:
    """Beginnings of sentences that the model makes up, drawn among its 5 most probable words: ROME's context templates.

    Args:
        model: the model.
        lengths: of each kind, how many tokens a context has, `start` among them, and how many contexts of it are drawn. ROME's
            released code takes 10 of 5 tokens and 10 of 10.
        start: what they begin with.
        seed: makes them repeatable.

    Raises `InputError` for lengths that leave nothing to generate, and where the model has no tokenizer.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> [text.startswith("The ") and text.endswith(".") for text in generated_contexts(model, [(4, 2)])]
    [True, True]
    """
    made: list[str] = []
    for n_tokens, n in lengths:
        whole_number(n, "The number of contexts", least=1)
        prompts = model.prepare([start] * n, template=None)
        own = len(model.tokenizer(start, add_special_tokens=False)["input_ids"])
        n_new = whole_number(
            n_tokens, "A context's tokens", least=own + 1, expected=f"more than the {own} of {start!r}"
        )
        sampling = {"do_sample": True, "top_k": _TOP, "seed": seed + len(made), "stop_at_eos": False}
        only = [("hook_logits", _without_special(model))]
        ids = model.generate(prompts, n_new - own, return_type="tokens", fwd_hooks=only, **sampling)
        texts = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
        made += [f"{start} {' '.join(str(text).split())}." for text in texts]
    return made


def _without_special(model: HookedLLaVA) -> Callable[..., Tensor]:
    """A function on logits with which an end, an image or another special token is never drawn."""
    special = sorted({*model.tokenizer.all_special_ids, model.config.image_token_id})

    def words_only(logits: Tensor, hook: object) -> Tensor:
        return logits.index_fill(-1, to_device(special, logits.device), float("-inf"))

    return words_only


def chosen_contexts(model: HookedLLaVA, contexts: Contexts) -> list[str]:
    """The contexts as texts; raises `InputError` for empty ones and for another word than "generated"."""
    if isinstance(contexts, str):
        if contexts != GENERATED:
            raise InputError(f"contexts={contexts!r}; expected a list of texts, or {GENERATED!r}.")
        return generated_contexts(model)
    if empty := [i for i, text in enumerate(contexts) if not text.strip()]:
        raise InputError(f"contexts[{empty[0]}] is {contexts[empty[0]]!r}; expected words to put before the question.")
    return list(contexts)


def after_contexts(model: HookedLLaVA, request: Prepared, contexts: Sequence[str]) -> Prepared:
    """All of a request's prompts after every context: "context question" in the question's place.

    The edited position is the same token as without the context. Raises `InputError` where the question's words or the images
    are not known.
    """
    made, from_end, targets = [], [], []
    for row, (back, target) in enumerate(zip(request.from_end, request.targets, strict=True)):
        plain = request.inputs[row]
        question = _question(plain, "contexts=")
        longer = _reworded(model, plain, [f"{context} {question}" for context in contexts])
        for context, token_map in zip(contexts, longer.token_maps, strict=True):
            place = _same_token(plain.token_map, len(plain.token_map) + back, token_map, len(context) + 1)
            from_end.append(place - longer.shape[1])
        made.append(longer)
        targets += [target] * len(contexts)
    return Prepared(joined(model, made), tuple(from_end), tuple(targets), request.words)


def essence_of(model: HookedLLaVA, request: Prepared, words: str = ESSENCE) -> Prepared:
    """The request's prompts with a sentence about the constraint in the question's place, edited at the same kind of position.

    Raises `InputError` for words without a place for the constraint, a request without one, and as `after_contexts`.
    """
    if words.count("{}") != 1:
        raise InputError(f"kl_prompt={words!r}; expected words with one {{}} in the place of the constraint.")
    constraints = request.words["constraint"]
    per_prompt = [constraints] * len(request.inputs) if isinstance(constraints, str) else constraints
    if None in per_prompt:
        raise InputError(
            f"kl= keeps what is said of the constraint ({words!r}), and the request {request.words['prompts'][0]!r} has "
            "none; give constraint=, or kl=0."
        )
    made, from_end, position = [], [], request.words["position"]
    for row, constraint in enumerate(per_prompt):
        _question(request.inputs[row], "kl=")
        one = _reworded(model, request.inputs[row], [words.format(constraint)])
        token_map = one.token_map
        at_constraint = position == "constraint"
        place = token_map.find(constraint, within="question")[-1] if at_constraint else position_of(token_map, position)
        from_end.append(place - one.shape[1])
        made.append(one)
    first = tuple(ids[:1] for ids in request.targets)  # nothing is appended: what follows the prompt is what is kept
    return Prepared(joined(model, made), tuple(from_end), first, request.words)


def _question(prompt: Inputs, what: str) -> str:
    """The question's words; raises `InputError` where other words cannot be put in their place."""
    words = prompt.token_map.words
    if words is None or words.prompt is None or "question" not in words.parts:
        given = "a prompt of token ids" if words is None or words.prompt is None else repr(words.prompt)
        raise InputError(
            f"{what} writes other words in the question's place, and where that is in {given} is not known. Give the "
            "request's question as text, or as model.prepare(question, images) makes it."
        )
    if prompt.n_images and not prompt.images:
        raise InputError(f"{what} asks about the images again, and only their pixel values are known; give the images.")
    start, stop = words.parts["question"]
    return words.prompt[start:stop]


def _reworded(model: HookedLLaVA, prompt: Inputs, questions: Sequence[str]) -> Inputs:
    """A prompt with each of several questions in the place of its own, and about its images."""
    words = prompt.token_map.words
    assert words is not None
    assert words.prompt is not None
    start, stop = words.parts["question"]
    texts = [words.prompt[:start] + question + words.prompt[stop:] for question in questions]
    images = [list(prompt.images)] * len(texts) if prompt.images else None
    made = model.prepare(texts, images, template=None)
    token_maps = []
    for token_map, question in zip(made.token_maps, questions, strict=True):
        assert token_map.words is not None
        part = start, start + len(question)
        known = replace(token_map.words, parts={"question": part})
        token_maps.append(replace(token_map, words=known).with_spans(question=token_map.locate(*part)))
    return replace(made, token_maps=tuple(token_maps))


def _same_token(old: TokenMap, position: int, new: TokenMap, further: int) -> int:
    """Where a token stands after a text that is so many characters longer before the question."""
    if position == old.real.stop - 1:
        return new.real.stop - 1
    assert old.words is not None
    start, stop = old.words.offsets[position]
    if start < old.words.parts["question"][0]:
        further = 0
    return new.locate(start + further, stop + further)[-1]
