"""One forward pass, kept only where the answer is read: the last row of every pattern, the values, and the
residual stream there.

That is a small part of what passes by: for a LLaVA-1.5 of 7 billion weights and 600 positions 0.3 GB instead of tens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.checks import as_index
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.model.cache_hooks import caching_hook
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.readout.answer import ONE, AnswerReading, about_answers, read_answer
from hooked_llava.readout.answer_tokens import Target, per_prompt
from hooked_llava.readout.lens import log_probabilities, log_probabilities_along, log_probability_increase
from hooked_llava.readout.resid import logits_at, rows_at
from hooked_llava.readout.vocabulary import decode_text

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

PARTS = ("pattern", "v", "z", "attn_out", "mlp_out")
Asked: TypeAlias = Target | AnswerReading
"""An answer, or where and as which tokens it is read."""


@dataclass(frozen=True, eq=False)
class AnswerCache:
    """What a forward pass holds at the positions where the answer's tokens are predicted.

    Attributes:
        model (HookedLLaVA): The model that ran.
        inputs (Inputs): The prompts, with the answer appended if it has several tokens.
        logit_positions (Int[Tensor, "prompt read"]): Where the answer's tokens are predicted.
        target (Int[Tensor, "prompt read variant"]): The tokens that are scored there.
        names (tuple[str, ...]): The target of each prompt in words.
        measured (str): Whether the target is the "whole answer", or the "first token" of one.
        resid (tuple[Float[Tensor, "prompt read d_model"], ...]): What enters every block, and what leaves the last.
        scale (Float[Tensor, "prompt read 1"]): The final norm's scale: what the frozen lens divides by.
        held (dict[str, Tensor]): The parts that were asked for, by full hook name: values everywhere, the others at
            `read`.
        beside (dict[str, Tensor]): Activations at other positions, by full hook name, as `cache_answer(beside=)` asks.
    """

    model: HookedLLaVA
    inputs: Inputs
    logit_positions: Int[Tensor, "prompt read"]
    target: Int[Tensor, "prompt read variant"]
    names: tuple[str, ...]
    measured: str
    resid: tuple[Float[Tensor, "prompt read d_model"], ...]
    scale: Float[Tensor, "prompt read 1"]
    held: dict[str, Tensor]
    beside: dict[str, Tensor] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Blocks of the language tower."""
        return len(self.resid) - 1

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        kept = (*self.resid, self.scale, *self.held.values(), *self.beside.values())
        return sum(tensor.nbytes for tensor in kept)

    @staticmethod
    def forecast(model: HookedLLaVA, inputs: InputsLike, parts: Sequence[str] = PARTS) -> int:
        """Bytes that `cache_answer` keeps for answers of one token, without running the model.

        >>> from hooked_llava import HookedLLaVA
        >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
        >>> prompt = model.prepare("Who made the star?")
        >>> AnswerCache.forecast(model, prompt) == cache_answer(model, prompt).nbytes
        True
        """
        prompt, last = model.as_inputs(inputs), model.cfg.n_layers - 1
        here = ["resid_pre", f"blocks.{last}.hook_resid_post", "ln_final.hook_scale", *(p for p in parts if p != "v")]
        return model.cache_size(prompt, here, "last") + ("v" in parts and model.cache_size(prompt, "v"))

    def part(self, layer: int, name: str) -> Tensor:
        """A part of a layer: "pattern" [prompt head read key], "v" [prompt key kv_head d_head], "z", "attn_out", "mlp_out"."""
        return self.held[self.model.hooks_table.name(name, layer)]

    def target_attrs(self) -> dict[str, Any]:
        """What a result says of the target: `target` in words, `answer_tokens` and `measured`."""
        return about_answers(self.model, self.names, self.target, self.measured, "target")

    def take(self, prompts: Sequence[int]) -> AnswerCache:
        """The same for some of the prompts; `inputs` stays that of all."""
        if list(prompts) == list(range(len(self.logit_positions))):
            return self
        chosen = list(prompts)
        index = to_device(chosen, self.scale.device)
        return replace(
            self,
            logit_positions=self.logit_positions[chosen],
            target=self.target[chosen],
            names=tuple(self.names[i] for i in prompts),
            resid=tuple(resid[index] for resid in self.resid),
            scale=self.scale[index],
            held={name: tensor[index] for name, tensor in self.held.items()},
            beside={name: tensor[index] for name, tensor in self.beside.items()},
        )

    def only(self, prompt: int) -> AnswerCache:
        """One prompt's part of it, `inputs` included."""
        return replace(self.take([prompt]), inputs=self.inputs[prompt])

    def of_token(self, token: int) -> AnswerCache:
        """The same for one of the answer's tokens, from the end where negative; raises `InputError` for one that it lacks."""
        index = slice(at := as_index(token, self.target.shape[1], "token"), at + 1)
        cut = {"v": (slice(None),), "pattern": (slice(None), slice(None), index)}
        held = {name: x[cut.get(name.rpartition("hook_")[2], (slice(None), index))] for name, x in self.held.items()}
        return replace(
            self,
            logit_positions=self.logit_positions[:, index],
            target=self.target[:, index],
            names=words_of(self.model, self.target[:, at]),
            measured=self.measured if self.target.shape[1] == 1 else ONE,
            resid=tuple(resid[:, index] for resid in self.resid),
            scale=self.scale[:, index],
            held=held,
        )

    def log_probability(self, resid: Float[Tensor, "prompt read d_model"]) -> Float[Tensor, " prompt"]:
        """log P(answer) that a residual stream at the answer's position stands for, through the frozen lens."""
        return log_probabilities(self.model, resid, self.target, scale=self.scale).sum(-1)

    def score(
        self,
        vectors: Float[Tensor, "prompt read *more d_model"],
        base: Float[Tensor, "prompt read d_model"],
    ) -> Tensor:
        """S(v | u) of each vector, summed over the answer's tokens: [prompt, *more]."""
        deeper = (*self.logit_positions.shape, *[1] * (vectors.ndim - 3))
        target = self.target.reshape(*deeper, -1)
        scale, below = self.scale.reshape(*deeper, 1), base.reshape(*deeper, -1)
        return log_probability_increase(self.model, vectors, below.to(vectors.dtype), target, scale=scale).sum(1)

    def score_along(
        self,
        coordinates: Float[Tensor, "prompt read key rank"],
        basis: Float[Tensor, "rank d_model"],
        base: Float[Tensor, "prompt read d_model"],
    ) -> Float[Tensor, "prompt key"]:
        """`score` of vectors that are given by their coordinates in a small basis."""
        where = {"target": self.target[:, :, None], "scale": self.scale[:, :, None]}
        after = log_probabilities_along(self.model, coordinates, basis, base[:, :, None], **where)
        before = log_probabilities(self.model, base, self.target, scale=self.scale)
        return (after - before[..., None]).sum(1)


@torch.no_grad()
def cache_answer(
    model: HookedLLaVA,
    inputs: InputsLike,
    target: Asked = None,
    *,
    parts: Sequence[str] = PARTS,
    beside: Sequence[str] = (),
    positions: Int[Tensor, "prompt position"] | None = None,
) -> AnswerCache:
    """Run the prompts once and keep what the answer is read from; see `AnswerCache`.

    `beside` names hooks of the residual stream and what is added to it, by their full names, to be kept at `positions` (all
    by default) in the same run, for analyses that learn from the answer where they have to look.

    Raises `InputError` for a target that does not fit the prompts, before anything runs.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> cache_answer(model, model.prepare("Who made the star?"), "Red").part(3, "pattern").shape[1] == model.cfg.n_heads
    True
    """
    found = read_target(model, inputs, target)
    prompts, read = found.inputs, found.logit_positions
    store: dict[str, Tensor] = {}
    table = model.hooks_table
    resid = table.resolve("resid_pre")
    layers = range(model.cfg.n_layers)  # "post" is also a hook of the projector
    here = [*resid, *(table.name(part, layer) for part in parts if part != "v" for layer in layers)]
    hooks: list[Any] = [(here, caching_hook(store, model, read))]
    if "v" in parts:
        hooks.append((table.resolve("v"), caching_hook(store, model)))
    also: dict[str, Tensor] = {}
    end = table.name("resid_post", -1)
    hooks.append(([name for name in beside if name != end], caching_hook(also, model, positions)))
    final = model.run_with_hooks(prompts, fwd_hooks=[one for one in hooks if one[0]], stop_at_layer=model.cfg.n_layers)
    assert final is not None
    if end in beside:
        also[end] = final if positions is None else rows_at(final, positions)
    last = rows_at(final, read)  # (prompt, read, d_model)
    scale = model.ln_final.scale_of(last)
    if found.ids is None:
        found = found.with_own(model, logits_at(model, final, read))
    assert found.ids is not None
    resid = (*(store.pop(name) for name in resid), last)
    return AnswerCache(model, prompts, read, found.ids, found.texts, found.measured, resid, scale, store, also)


def as_answer_cache(
    model: HookedLLaVA,
    inputs: InputsLike | AnswerCache,
    target: Asked,
    parts: Sequence[str],
    beside: Sequence[str] = (),
) -> tuple[AnswerCache, int]:
    """The answer cache of some prompts, and how many forward passes it took: none if it is given in place of the prompts.

    Raises `InputError` for a given cache of another model, without the parts, or with a target beside it.
    """
    if not isinstance(inputs, AnswerCache):
        return cache_answer(model, inputs, target, parts=parts, beside=beside), 1
    missing = [part for part in parts if not any(name.endswith(f"hook_{part}") for name in inputs.held)]
    missing += [name for name in beside if name not in inputs.beside]
    if inputs.model is not model or target is not None or missing:
        raise InputError(
            f"An answer cache is given in place of prompts: it must be of the same model, have the parts {[*parts, *beside]} and "
            f"bring its own target; it lacks {missing}, and target={target!r}."
        )
    return inputs, 0


def split_prompts(
    model: HookedLLaVA, inputs: InputsLike | AnswerCache, target: Target
) -> list[tuple[Inputs | AnswerCache, Any]]:
    """Each prompt apart with its target; or each prompt's part of an answer cache, which brings its own target."""
    if isinstance(inputs, AnswerCache):
        return [(inputs.only(i), target) for i in range(len(inputs.logit_positions))]
    prompts = model.as_inputs(inputs)
    return list(zip(prompts, per_prompt(target, len(prompts)), strict=True))


def prompts_of(model: HookedLLaVA, inputs: InputsLike | AnswerCache) -> Inputs:
    """The prompts, or those of an answer cache that stands in their place."""
    return inputs.inputs if isinstance(inputs, AnswerCache) else model.as_inputs(inputs)


def read_target(model: HookedLLaVA, inputs: InputsLike, target: Asked) -> AnswerReading:
    """The prompts (with an answer of several tokens appended), where it is read, and its tokens (None: the model's own).

    A reading is returned as it is. Raises `InputError` for a list that has not one target for each prompt, or targets of
    different numbers of tokens.
    """
    if isinstance(target, AnswerReading):
        return target
    found = read_answer(model, inputs, target, "target")
    if found.ids is not None and bool((found.ids < 0).any()):
        raise InputError(
            f"The answers in target={target!r} have different numbers of tokens or of variants after their prompts; ask "
            "prompt by prompt, or give them as single tokens."
        )
    return found


def read_token(model: HookedLLaVA, inputs: InputsLike, target: Target, token: int) -> AnswerReading:
    """One of the answer's tokens, after those before it; from the end where negative. Raises as `read_target`.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> read_token(model, model.prepare("Who made the star?"), "Red star", -1).texts
    ('star',)
    """
    found = read_target(model, inputs, target)
    n = found.logit_positions.shape[1]
    at = as_index(token, n, "token", says=f"token={token} is not in an answer of {n}")
    if found.ids is None or n == 1:
        return found
    ids, where = found.ids[:, at : at + 1], found.logit_positions[:, at : at + 1]
    return replace(found, logit_positions=where, ids=ids, texts=words_of(model, ids[:, 0]), measured=ONE)


def words_of(model: HookedLLaVA, ids: Int[Tensor, "prompt variant"]) -> tuple[str, ...]:
    """The first variant of each prompt's token in words."""
    return tuple(decode_text(model, [i]) for i in ids[:, 0].tolist())
