"""The entries of `fwd_hooks`: pairs (names, function), and `Intervention`s, which must know the prompt.

A function sees a tensor and does not have the prompt. An `Intervention` names spans, heads and images, so it is
attached as a `PromptHook` (`replay.attached.AttachedIntervention`). Before every pass the model gives it the prompt,
and it finds its positions there: it is placed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import singledispatch
from typing import Any, Literal

from torch import Tensor

from hooked_llava.architecture.hooks import NamesFilter
from hooked_llava.errors import InputError
from hooked_llava.model.components.hook_point import HookPoint
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.positions import Positions
from hooked_llava.prompt.token_map import TokenMap

HookEntry = tuple[NamesFilter, Callable[..., Any]]
"""Which activations, and the function `fn(tensor)` or `fn(tensor, hook)` that reads or replaces them."""
Phase = Literal["prefill", "decode", "both"]
"""The run over the prompt, the runs over single new tokens, or all of them."""


class PromptHook(ABC):
    """A hook function that must know the prompt; it never writes to the tensor that it is given."""

    reads_only = True
    placed: Callable[[Tensor], Tensor] | None = None
    """What `place` returned for the pass that is running: a function of the activation; None between passes."""

    @property
    def phases(self) -> Phase:
        """The phases of generation in which it acts, whatever phase it is attached in."""
        return "both"

    @abstractmethod
    def place(self, inputs: Inputs, n_new: int = 0) -> Callable[[Tensor], Tensor]:
        """What it does to the activation in a pass over a prompt, or over the newest of `n_new` tokens after it.

        Raises `InputError` or `SpanError` where it does not fit.
        """

    @abstractmethod
    def acts_on_new_tokens(self, inputs: Inputs) -> bool:
        """Whether it does anything in passes over tokens that are generated after the prompt."""

    @classmethod  # noqa: B027 (most have nothing to do)
    def prepare(cls, hooks: Sequence[Any]) -> None:
        """Do what must be done before several of this class are attached."""

    @staticmethod
    def prepare_all(functions: Sequence[Any]) -> None:
        """Prepare those of some functions that are prompt hooks."""
        for kind in {type(fn) for fn in functions if isinstance(fn, PromptHook)}:
            kind.prepare([fn for fn in functions if type(fn) is kind])

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        """The changed activation."""
        if self.placed is None:
            raise InputError(
                f"An Intervention on {hook.name!r} met a pass whose prompt is not known: the model was run by its parts. "
                "Interventions act in model(inputs), run_with_hooks, run_with_cache, generate and Replay; attach a function "
                "instead."
            )
        return self.placed(tensor)


@singledispatch
def as_hook(entry: Any, model: Any) -> HookEntry:
    """An entry of `fwd_hooks` as (names, function).

    Pairs are read here. `replay.attached`, which the model does not import, registers how an `Intervention` is read.

    >>> as_hook(("pattern", print), None)
    ('pattern', <built-in function print>)
    """
    if isinstance(entry, Sequence) and len(entry) == 2 and callable(entry[1]):
        return entry[0], entry[1]
    raise InputError(f"fwd_hooks holds {entry!r}; expected pairs (names, function), or Interventions.")


@contextmanager
def placing(hooks: Sequence[PromptHook], inputs: Inputs | None, n_new: int = 0) -> Iterator[None]:
    """The hooks placed in a prompt for one pass, and as they were afterwards.

    Raises `InputError` for a pass that begins with a residual stream, which has no prompt.
    """
    if hooks and inputs is None:
        raise InputError(
            "Interventions are placed by the prompt, and this run begins with a residual stream; attach functions, or run "
            "the prompt."
        )
    before = [(hook, hook.placed) for hook in hooks]
    functions = [hook.place(inputs, n_new) for hook in hooks if inputs is not None]
    try:
        for hook, function in zip(hooks, functions, strict=True):
            hook.placed = function
        yield
    finally:
        for hook, earlier in before:
            hook.placed = earlier


def with_answer_span(inputs: Inputs) -> Inputs:
    """Prompts that are about to be continued: with the spans `answer`, still empty, and `predicting`.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> with_answer_span(model.prepare("Who made the star?")).token_map["answer"]
    Positions()
    """
    return replace(inputs, token_maps=tuple(continued(token_map, 0) for token_map in inputs.token_maps))


def continued(token_map: TokenMap, n: int) -> TokenMap:
    """The map of a prompt, padded on the left, with n generated tokens appended: what `answer` and `predicting` then are."""
    start, stop = token_map.real.start, token_map.real.stop
    answer, predicting = (token_map.named.get(name, Positions()) for name in ("answer", "predicting"))
    further = {
        "answer": answer | range(stop, stop + n),
        "predicting": predicting | range(stop - 1, stop + max(0, n - 1)),
    }
    return replace(
        token_map,
        token_ids=(*token_map.token_ids, *[0] * n),
        real=range(start, stop + n),
        named={**token_map.named, **further},
        n_answer=token_map.n_answer + n,
    )
