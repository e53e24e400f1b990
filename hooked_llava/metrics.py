"""Logits -> number: what an intervention did to the answer.

Every metric is made by a function that takes the answer and returns a function of logits [..., d_vocab] at the position
where the answer is read; `at_last` turns such a function into one of TransformerLens's [batch pos d_vocab], and
`from_transformer_lens` one of theirs into such a function.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.errors import InputError
from hooked_llava.inputs import Inputs
from hooked_llava.positions import Positions
from hooked_llava.readout import token_id, wide, words

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
        cls,
        model: HookedLLaVA,
        answer: str | SupportsIndex | Answer,
        *,
        variants: bool = False,
        first_token: bool = False,
    ) -> Answer:
        """The answer's token; with `variants` also lower case, capitalised, and each with a leading space.

        With `first_token` a word of several tokens stands for its first (spellings whose first token it shares with
        another word count as well). Raises `InputError` if the word as given is not a single token otherwise, and for
        words that the tokenizer does not know.

        >>> from hooked_llava import HookedLLaVA
        >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
        >>> len(Answer.of(model, "Red", variants=True).ids)
        2
        """
        if isinstance(answer, Answer):
            return answer
        if not isinstance(answer, str):
            return cls(str(token_id(model, answer)), (token_id(model, answer),))
        shortened = first_token and answer.strip()
        first = _first_visible(model, _known(model, answer)) if shortened else token_id(model, answer)
        if not variants:
            return cls(answer, (first,))
        found = [first]
        for word in (answer, answer.lower(), answer.capitalize()):
            for spelling in (word, " " + word):
                ids = _encode(model, spelling)
                if (len(ids) == 1 or (first_token and ids)) and _begins(model, word, ids[0]):
                    found.append(ids[0])
        return cls(answer, tuple(dict.fromkeys(found)))


def one_each(given: Any, n_prompts: int, what: str = "target") -> list[Any]:
    """One answer for each prompt: the same for all, or a list's own; raises `InputError` for a list of another length.

    >>> one_each("Red", 2), one_each([7, 8], 2)
    (['Red', 'Red'], [7, 8])
    """
    is_number = hasattr(given, "__index__") and not getattr(given, "ndim", 0)  # an int of any library
    if given is None or is_number or isinstance(given, (str, Answer)):
        return [given] * n_prompts
    if not isinstance(given, Iterable):
        raise InputError(
            f"{what}={given!r}; expected a word, a token id or an Answer, or a list with one for each prompt."
        )
    each = list(given)
    if len(each) != n_prompts:
        raise InputError(
            f"{what}= names {len(each)} answers for {n_prompts} prompts; give one for each prompt, or one for all."
        )
    return each


def log_probability(answer: Answer | SupportsIndex) -> Metric:
    """log P(answer) in nats, over all its spellings."""
    ids = _ids(answer)
    return lambda logits: _of(wide(logits).log_softmax(-1), ids).logsumexp(-1)


def probability(answer: Answer | SupportsIndex) -> Metric:
    """P(answer), over all its spellings."""
    ids = _ids(answer)
    return lambda logits: _of(wide(logits).softmax(-1), ids).sum(-1)


def logit_difference(answer: Answer | SupportsIndex, baseline: Answer | SupportsIndex) -> Metric:
    """Logit of the answer less that of the baseline; of several spellings the logits' log-sum-exp is taken."""
    a, b = _ids(answer), _ids(baseline)
    return lambda logits: wide(_of(logits, a)).logsumexp(-1) - wide(_of(logits, b)).logsumexp(-1)


def own_answers(
    clean: Float[Tensor, "*shape d_vocab"],
    corrupted: Float[Tensor, "*shape d_vocab"],
    model: HookedLLaVA | None = None,
) -> Metric:
    """Logit difference of the answers that two runs give, from their logits [d_vocab].

    Raises `InputError` if both give the same; with the model it names the word.
    """
    answers = [int(logits.argmax()) for logits in (clean, corrupted) if logits.ndim == 1]
    if len(answers) != 2:
        raise InputError("Logits are read at several positions, so there is no one answer to compare; give metric=.")
    if answers[0] == answers[1]:
        word = "" if model is None or model.processor is None else f"{words(model, clean.argmax())!s}, "
        raise InputError(
            f"The clean and the corrupted prompt have the same answer ({word}token {answers[0]}), so there is no difference "
            "of answers to measure. Give metric=, for example log_probability(Answer.of(model, 'Red'))."
        )
    return logit_difference(*answers)


def rank(answer: Answer | SupportsIndex) -> Metric:
    """How many tokens have a larger logit than the answer's best spelling: 0 if it is the model's choice."""
    ids = _ids(answer)
    return lambda logits: (logits > _of(logits, ids).amax(-1, keepdim=True)).sum(-1).float()


def kl_divergence(reference: Float[Tensor, "*shape d_vocab"]) -> Metric:
    """KL(reference || changed) in nats, of next-token distributions, given the reference logits."""
    log_p = wide(reference).log_softmax(-1)
    return lambda logits: (log_p.exp() * (log_p - wide(logits).log_softmax(-1))).sum(-1)


def relative_change(answer: Answer | SupportsIndex, reference: Float[Tensor, "*shape d_vocab"]) -> Metric:
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


def from_transformer_lens(metric: Callable[[Tensor], Tensor]) -> Metric:
    """A metric written for TransformerLens, [batch pos d_vocab] -> one number, as one for Replay and every analysis here.

    It is called once for each run, with the logits where the answer is read as a batch of one prompt of one position: so
    it may read [:, -1] or average over the batch, but not look at other positions. In use it raises `InputError` if it
    gives more than one number.

    >>> theirs = lambda logits: logits[:, -1, 2].mean() - logits[:, -1, 1].mean()
    >>> from_transformer_lens(theirs)(torch.tensor([[0.0, 1.0, 5.0], [0.0, 1.0, 2.0]]))
    tensor([4., 1.])
    """

    def adapted(logits: Float[Tensor, "*shape d_vocab"]) -> Float[Tensor, "*shape"]:
        rows = logits.reshape(-1, 1, 1, logits.shape[-1])
        values = [_only_number(metric(row), row).reshape(()) for row in rows]
        return torch.stack(values).reshape(logits.shape[:-1]) if values else logits.new_zeros(logits.shape[:-1])

    return adapted


def value_of(metric: Metric, logits: Float[Tensor, "*shape d_vocab"]) -> float:
    """What a metric gives for the logits of one run; raises `InputError` if that is not one number.

    >>> value_of(probability(0), torch.zeros(4))
    0.25
    """
    return float(_only_number(metric(logits), logits))


@dataclass(frozen=True)
class TeacherForced:
    """Prompts with an answer of several tokens behind them, and how to score it: see `teacher_forced`."""

    inputs: Inputs
    """The prompts with the answer, which is their span `answer`; all other spans, `last` too, are the prompts' own."""
    positions: list[int]
    """Where each of the answer's tokens is predicted: from the prompt's last position on."""
    metric: Metric
    """log P(answer | prompt) in nats, of logits [..., position, d_vocab] at those positions."""


def teacher_forced(
    model: HookedLLaVA, inputs: Any, answer: str | SupportsIndex | Sequence[SupportsIndex]
) -> TeacherForced:
    """An answer of one or more tokens put behind the prompts, to be scored as a whole.

    `Replay(model, forced.inputs).run(runs, forced.metric, positions=forced.positions)` gives log P(answer) under each
    run, and `activation_patching(..., metric=forced.metric, read=forced.positions)` a map of it.

    Args:
        model: the model.
        inputs: anything `model.as_inputs` takes; prompts of a batch are padded on the left.
        answer: text, or its token id or ids.

    Raises `InputError` if the answer has no tokens, or words that the tokenizer does not know.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.interventions import Replay
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> forced = teacher_forced(model, model.prepare("Who made the star?"), "Red star")
    >>> bool(forced.metric(Replay(model, forced.inputs).logits(forced.positions)) < 0)
    True
    """
    prompt = model.as_inputs(inputs).padded_left()
    given = answer if isinstance(answer, Iterable) else [answer]
    ids = _known(model, answer) if isinstance(answer, str) else [token_id(model, i) for i in given]
    if not ids:
        raise InputError(f"The answer {answer!r} has no tokens; give at least one.")
    n, first = len(ids), prompt.shape[1]
    wanted = torch.tensor(ids, device=prompt.device)

    def metric(logits: Float[Tensor, "*shape d_vocab"]) -> Float[Tensor, "*out"]:
        log_p = wide(logits).log_softmax(-1)
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
        replace(new, named={**old.named, "answer": span}, geometries=old.geometries, n_answer=n)
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


def _known(model: HookedLLaVA, text: str) -> list[int]:
    """The text's tokens; raises `InputError` if one is the unknown token, which stands for every other word as well."""
    ids, unknown = _encode(model, text), model.tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        raise InputError(
            f"The tokenizer does not know {text!r}: it becomes {model.tokenizer.convert_ids_to_tokens(ids)}. Give words of "
            "the model's vocabulary (mind capitals), or token ids."
        )
    return ids


def _first_visible(model: HookedLLaVA, ids: list[int]) -> int:
    """The first token that is more than the space before a word."""
    return next((i for i in ids if model.tokenizer.decode([i]).strip()), ids[0])


def _begins(model: HookedLLaVA, word: str, token: int) -> bool:
    """Whether a token is the beginning of a word: not a bare space, the unknown token, or half a character."""
    piece = model.tokenizer.decode([token]).strip()
    return bool(piece) and token != model.tokenizer.unk_token_id and word.strip().startswith(piece)


def _ids(answer: Answer | SupportsIndex) -> list[int]:
    """The tokens that a metric scores, checked as far as that is possible without the model."""
    if isinstance(answer, Answer):
        return list(answer.ids)
    try:
        token = operator.index(answer)
    except TypeError:
        token = -1
    if token < 0:
        raise InputError(
            f"A metric takes an Answer or a token id, and {answer!r} is neither; give Answer.of(model, {answer!r}) for a "
            "word, or an id from 0 on."
        )
    return [token]


def _of(values: Float[Tensor, "*shape d_vocab"], ids: list[int]) -> Float[Tensor, "*shape spelling"]:
    """The values of some tokens."""
    if (largest := max(ids)) >= values.shape[-1]:
        raise InputError(f"Token id {largest} is not in the vocabulary; expected 0..{values.shape[-1] - 1}.")
    return values[..., ids]


def _only_number(value: Any, logits: Tensor) -> Any:
    """What a metric returned for one run, if it is one number."""
    shape = tuple(getattr(value, "shape", ()))
    if math.prod(shape) != 1:
        raise InputError(
            f"The metric returned shape {shape} for the logits {tuple(logits.shape)} of one run; expected one number. A "
            "metric turns logits [..., d_vocab] into [...]; where read= names several positions, [..., position, d_vocab] "
            "into [...], as that of teacher_forced does."
        )
    return value
