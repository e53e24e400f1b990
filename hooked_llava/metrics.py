"""Logits -> number: what an intervention did to the answer.

Every metric is made by a function that takes the answer and returns a function of logits [..., d_vocab] at the position
where the answer is read; `at_last` turns such a function into one of TransformerLens's [batch pos d_vocab].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.errors import InputError
from hooked_llava.inputs import Inputs
from hooked_llava.positions import Positions
from hooked_llava.readout import token_id

if TYPE_CHECKING:
    from hooked_llava.model import HookedLLaVA

Metric = Callable[[Tensor], Tensor]
"""From logits [..., d_vocab] where the answer is read to one number each."""


@dataclass(frozen=True)
class Answer:
    """An answer as the tokens that count for it: spellings in another case or with a leading space add to it."""

    text: str
    """The word as given."""
    ids: tuple[int, ...]
    """First tokens of all its spellings."""

    @classmethod
    def of(
        cls, model: HookedLLaVA, answer: str | int | Answer, *, variants: bool = False, first_token: bool = False
    ) -> Answer:
        """The answer's token; with `variants` also lower case, capitalised, and each with a leading space.

        With `first_token` a word of several tokens stands for its first (spellings whose first token it shares with
        another word count as well). Raises `InputError` if the word as given is not a single token otherwise.

        >>> from hooked_llava import HookedLLaVA
        >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
        >>> len(Answer.of(model, "Red", variants=True).ids)
        2
        """
        if isinstance(answer, Answer):
            return answer
        if isinstance(answer, int):
            return cls(str(answer), (token_id(model, answer),))
        own = _encode(model, answer)
        first = own[0] if first_token and own else token_id(model, answer)
        if not variants:
            return cls(answer, (first,))
        spellings = [lead + word for word in (answer, answer.lower(), answer.capitalize()) for lead in ("", " ")]
        encoded = [_encode(model, spelling) for spelling in spellings]
        found = [ids[0] for ids in encoded if (len(ids) == 1 or (first_token and ids))]
        return cls(answer, tuple(dict.fromkeys([first, *(i for i in found if i != model.tokenizer.unk_token_id)])))


def log_probability(answer: Answer | int) -> Metric:
    """log P(answer) in nats, over all its spellings."""
    ids = _ids(answer)
    return lambda logits: _wide(logits).log_softmax(-1)[..., ids].logsumexp(-1)


def probability(answer: Answer | int) -> Metric:
    """P(answer), over all its spellings."""
    ids = _ids(answer)
    return lambda logits: _wide(logits).softmax(-1)[..., ids].sum(-1)


def logit_difference(answer: Answer | int, baseline: Answer | int) -> Metric:
    """Logit of the answer less that of the baseline; of several spellings the logits' log-sum-exp is taken."""
    a, b = _ids(answer), _ids(baseline)
    return lambda logits: _wide(logits[..., a]).logsumexp(-1) - _wide(logits[..., b]).logsumexp(-1)


def own_answers(clean: Float[Tensor, "*shape d_vocab"], corrupted: Float[Tensor, "*shape d_vocab"]) -> Metric:
    """Logit difference of the answers that two runs give, from their logits [d_vocab].

    Raises `InputError` if both give the same.
    """
    answers = [int(logits.argmax()) for logits in (clean, corrupted) if logits.ndim == 1]
    if len(answers) != 2:
        raise InputError("Logits are read at several positions, so there is no one answer to compare; give metric=.")
    if answers[0] == answers[1]:
        raise InputError(
            f"The clean and the corrupted prompt have the same answer (token {answers[0]}), so there is no difference "
            "of answers to measure. Give metric=, for example log_probability(Answer.of(model, 'Red'))."
        )
    return logit_difference(*answers)


def rank(answer: Answer | int) -> Metric:
    """How many tokens have a larger logit than the answer's best spelling: 0 if it is the model's choice."""
    ids = _ids(answer)
    return lambda logits: (logits > logits[..., ids].amax(-1, keepdim=True)).sum(-1).float()


def kl_divergence(reference: Float[Tensor, "*shape d_vocab"]) -> Metric:
    """KL(reference || changed) in nats, of next-token distributions, given the reference logits."""
    log_p = _wide(reference).log_softmax(-1)
    return lambda logits: (log_p.exp() * (log_p - _wide(logits).log_softmax(-1))).sum(-1)


def relative_change(answer: Answer | int, reference: Float[Tensor, "*shape d_vocab"]) -> Metric:
    """100 (P - P_reference) / P_reference, the percentage that Zhang et al. (2411.18620) plot."""
    p = probability(answer)
    before = p(reference)
    return lambda logits: 100 * (p(logits) - before) / before


def at_last(metric: Metric, inputs: Inputs | None = None) -> Callable[[Tensor], Tensor]:
    """The metric at the last position, averaged over the batch: what TransformerLens's patching functions call.

    The function takes logits [batch pos d_vocab]; `inputs` says where the prompts end if they are padded on the right.

    >>> logits = torch.zeros(2, 5, 4)
    >>> at_last(probability(0))(logits).item()
    0.25
    """

    def adapted(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, ""]:
        last = -1 if inputs is None else inputs.last.to(logits.device)
        return metric(logits[torch.arange(len(logits), device=logits.device), last]).mean()

    return adapted


@dataclass(frozen=True)
class TeacherForced:
    """Prompts with an answer of several tokens behind them, and how to score it: see `teacher_forced`."""

    inputs: Inputs
    """The prompts with the answer, which is also their span `answer`."""
    positions: list[int]
    """Where each of the answer's tokens is predicted: from the prompt's last position on."""
    metric: Metric
    """log P(answer | prompt) in nats, of logits [..., position, d_vocab] at those positions."""


def teacher_forced(model: HookedLLaVA, inputs: Any, answer: str | Sequence[int]) -> TeacherForced:
    """An answer of one or more tokens put behind the prompts, to be scored as a whole.

    `Replay(model, forced.inputs).run(runs, forced.metric, positions=forced.positions)` gives log P(answer) under each
    run, and `activation_patching(..., metric=forced.metric, read=forced.positions)` a map of it.

    Args:
        model: the model.
        inputs: anything `model.as_inputs` takes; prompts of a batch are padded on the left.
        answer: text, or its token ids.

    Raises `InputError` if the answer has no tokens.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.interventions import Replay
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> forced = teacher_forced(model, model.prepare("Who made the star?"), "Red star")
    >>> bool(forced.metric(Replay(model, forced.inputs).logits(forced.positions)) < 0)
    True
    """
    prompt = model.as_inputs(inputs).padded_left()
    ids = _encode(model, answer) if isinstance(answer, str) else [token_id(model, i) for i in answer]
    if not ids:
        raise InputError(f"The answer {answer!r} has no tokens; give at least one.")
    n, first = len(ids), prompt.shape[1]
    wanted = torch.tensor(ids, device=prompt.device)

    def metric(logits: Float[Tensor, "*shape d_vocab"]) -> Float[Tensor, "*out"]:
        log_p = _wide(logits).log_softmax(-1)
        index = wanted.to(logits.device).expand(log_p.shape[:-1])[..., None]
        return log_p.gather(-1, index).squeeze(-1).sum(-1)

    fields: dict[str, Tensor] = {
        "input_ids": torch.cat([prompt.input_ids, wanted.expand(len(prompt), -1)], dim=1),
        "attention_mask": torch.cat([prompt.attention_mask, prompt.attention_mask.new_ones(len(prompt), n)], dim=1),
    }
    if prompt.pixel_values is not None:
        fields["pixel_values"] = prompt.pixel_values
    if prompt.position_ids is not None:
        further = prompt.position_ids[:, -1:] + torch.arange(1, n + 1, device=prompt.device)
        fields["position_ids"] = torch.cat([prompt.position_ids, further], dim=1)
    longer = model.as_inputs(fields)
    span = Positions(range(first, first + n))
    token_maps = tuple(
        replace(new, named={**old.named, "answer": span}, geometries=old.geometries)
        for new, old in zip(longer.token_maps, prompt.token_maps, strict=True)
    )
    prompts = (
        None
        if prompt.prompts is None or not isinstance(answer, str)
        else tuple(f"{p} {answer}" for p in prompt.prompts)
    )
    longer = replace(longer, token_maps=token_maps, images=prompt.images, prompts=prompts)
    return TeacherForced(longer, list(range(first - 1, first - 1 + n)), metric)


def _encode(model: HookedLLaVA, text: str) -> list[int]:
    return list(model.tokenizer(text, add_special_tokens=False)["input_ids"])


def _wide(logits: Float[Tensor, "*shape n"]) -> Float[Tensor, "*shape n"]:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _ids(answer: Answer | int) -> list[int]:
    return list(answer.ids) if isinstance(answer, Answer) else [answer]
