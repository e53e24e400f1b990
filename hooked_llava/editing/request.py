"""What is to be changed: a question, the words whose meaning is edited, and the answer that is wanted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hooked_llava.checks import whole_number
from hooked_llava.errors import InputError, SpanError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.requirements import require
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import ImagesLike, InputsLike
from hooked_llava.prompt.token_map import TokenMap
from hooked_llava.readout.answer_tokens import one_answer


@dataclass(frozen=True)
class EditRequest:
    """One fact to be changed: how it is asked, which words of the question it depends on, and the new answer.

    >>> EditRequest("Who made the star?", "Boris", constraint="the star").target
    'Boris'

    Attributes:
        question (str | Sequence[str] | Inputs | Mapping[str, Any]): The question; several (paraphrases, or one for each
            of several images) are edited as one fact. Also inputs, or what a processor returns, images included.
        target (str | int | Sequence[int]): The answer that is wanted: text of one or more tokens, as it is tokenized after
            the question's prompt, or their ids.
        images (ImagesLike | None): The image it is asked about, or for several questions a list with one
            entry each, as `model.prepare` takes them.
        constraint (str | Sequence[str] | None): Words of the question that name what the fact is about, such as "this
            place"; for several questions one or each.
    """

    question: str | Sequence[str] | Inputs | Mapping[str, Any]
    target: str | int | Sequence[int]
    images: ImagesLike | None = None
    constraint: str | Sequence[str] | None = None


Requests = EditRequest | Sequence[EditRequest]
ToKeep = Requests | InputsLike
"""Prompts whose answers are to stay: requests, whose targets do not matter then, or inputs."""
_WIDEN = (
    "take in more of the words around it; or give the question as inputs with a span of your own (inputs.with_spans) and "
    "name that as the position to edit at"
)


@dataclass(frozen=True)
class Prepared:
    """A request as the model takes it, checked.

    Attributes:
        inputs (Inputs): Its prompts, padded on the left.
        from_end (tuple[int, ...]): For each prompt the position that is edited, counted back from the end (-1: the last
            one).
        targets (tuple[tuple[int, ...], ...]): For each prompt the token ids that the wanted answer adds to it.
        words (dict[str, Any]): The request in plain words, for the edit's metadata.
    """

    inputs: Inputs
    from_end: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    words: dict[str, Any]

    @property
    def positions(self) -> tuple[int, ...]:
        """For each prompt the position that is edited."""
        return tuple(self.inputs.shape[1] + back for back in self.from_end)

    @property
    def n_target(self) -> int:
        """How many tokens the wanted answer has, at most."""
        return max(map(len, self.targets))


def check_editable(model: HookedLLaVA) -> None:
    """Raises `InputError` for a model with weights in 8 or 4 bits: what is added to a weight would be lost in rounding."""
    require(["floating_point"], "An edit", model)


def listed_requests(model: HookedLLaVA, requests: Requests) -> list[EditRequest]:
    """What is asked for; raises `InputError` for nothing, and for a model that is quantized or that functions are attached to."""
    check_editable(model)
    listed = [requests] if isinstance(requests, EditRequest) else list(requests)
    if not listed:
        raise InputError("There is no request; give at least one EditRequest.")
    require(["no_functions"], "An edit", model)
    return listed


def prepare_request(model: HookedLLaVA, request: EditRequest, position: str = "constraint") -> Prepared:
    """Prompts, edited positions and target ids of a request.

    `position` is "constraint" (the last token of the constraint) or the name of a span, whose last position it is.
    Raises `InputError` and `SpanError` for a constraint that is not in the question, a target without tokens, and whatever
    `model.prepare` refuses, and `InputError` for a quantized model.
    """
    check_editable(model)
    inputs = _prompts(model, request)
    targets = inputs.each(lambda m: one_answer(model, m, request.target, "target").ids, inputs.token_maps)
    constraints = _per_prompt(request.constraint, len(inputs))
    places = inputs.each(lambda m, c: _place(m, c, position), inputs.token_maps, constraints)
    words = {
        "prompts": list(inputs.prompts) if inputs.prompts else [list(m.token_ids) for m in inputs.token_maps],
        "constraint": request.constraint if isinstance(request.constraint, str) else constraints,
        "position": position,
        "target": request.target if isinstance(request.target, str) else list(targets[0]),
    }
    return Prepared(inputs, tuple(place - inputs.shape[1] for place in places), tuple(targets), words)


def check_reach(prepared: Sequence[Prepared], layer: int, n_layers: int) -> None:
    """Raises `InputError` for the last layer, where an edit at one position reaches no other, unless all is read there."""
    if layer != n_layers - 1:
        return
    if any(place != -1 for request in prepared for place in request.from_end):
        raise InputError(
            f"An edit in the last layer, {layer}, at a position before the last one does not reach the answer. Choose an "
            "earlier layer, or position='last'."
        )
    for request in prepared:
        if request.n_target > 1:
            raise InputError(
                f"The target {request.words['target']!r} has {request.n_target} tokens, and an edit in the last layer, "
                f"{layer}, reaches only the first: the others are read at later positions. Choose an earlier layer, or a "
                "target of one token."
            )


def search_numbers(*, or_zero: Collection[str] = (), **given: Any) -> dict[str, Any]:
    """How an edit is searched for, as Python's numbers (`steps` whole); None stays. Raises `InputError` unless positive."""
    numbers = {
        name: value if value is None else whole_number(value, name) if name == "steps" else float(value)
        for name, value in given.items()
    }
    fine = {name: value is None or value > 0 or (name in or_zero and value == 0) for name, value in numbers.items()}
    if wrong := [f"{name}={numbers[name]}" for name in numbers if not fine[name]]:
        zero = f" ({', '.join(or_zero)} may be 0)" if or_zero else ""
        raise InputError(f"{', '.join(wrong)}: expected positive numbers{zero}.")
    return numbers


def position_of(token_map: TokenMap, span: str) -> int:
    """The last position of a span; raises `SpanError` where the prompt does not have it."""
    positions = token_map[span]
    if not positions:
        raise SpanError(f"The span {span!r} is empty in this prompt; edit at another, such as 'last'.")
    return positions[-1]


def _prompts(model: HookedLLaVA, request: EditRequest) -> Inputs:
    given = request.question
    if isinstance(given, str | Sequence):
        return model.prepare(given, request.images).padded_left()
    if request.images is not None:
        raise InputError(
            f"The request's question is given as {type(given).__name__}, which brings its own images, so images= has no "
            "place. Leave it out, or give the question as text."
        )
    return model.as_inputs(given).padded_left()


def _per_prompt(constraint: str | Sequence[str] | None, n: int) -> list[str | None]:
    if constraint is None or isinstance(constraint, str):
        return [constraint] * n
    if len(constraint) != n:
        raise InputError(f"There are {len(constraint)} constraints for {n} questions; give one, or one for each.")
    return list(constraint)


def _place(token_map: TokenMap, constraint: str | None, position: str) -> int:
    """The position that is edited."""
    if constraint is not None:
        parts = () if token_map.words is None else token_map.words.parts
        words = token_map.find(constraint, within="question" if "question" in parts else None, advice=_WIDEN)
    if position != "constraint":
        return position_of(token_map, position)
    if constraint is None:
        raise InputError(
            "position='constraint' needs the request's constraint=, words of its question such as 'this shape'; or edit "
            "at another place, such as position='last'."
        )
    if not words:
        raise SpanError(f"The constraint {constraint!r} has no token of its own in the prompt; give other words.")
    return words[-1]
