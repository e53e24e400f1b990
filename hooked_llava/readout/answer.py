"""Which tokens is an answer made of, where is each of them predicted, and how probable is it?

An answer's tokens are those that it adds to its prompt: prompt, separator and answer are tokenized together, since a
tokenizer cuts a word by what stands before it ("2" alone is one token, "ASSISTANT: 2" ends in "▁" and "2"). An answer of
several tokens is appended to the prompt (teacher forcing), and each token is read where it is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.positions import Positions
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.readout.answer_tokens import (
    Answer,
    AnswerLike,
    Target,
    answer_tokens,
    check_appendable,
    continued,
    is_index,
    one_answer,
    per_prompt,
)
from hooked_llava.readout.lens import log_p_of_odds
from hooked_llava.readout.metric_names import NamedMetric
from hooked_llava.readout.vocabulary import decode_text, token_names

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.token_map import TokenMap

NOTHING = -1
"""In a table of token ids: no token counts here."""
WHOLE, FIRST = "whole answer", "first token"
"""What a result measured, in its attribute `measured`."""
ONE = "one token"
"""The same where one token of an answer was chosen."""


# ---------------------------------------------------------------------- how probable it is


def answer_log_probability(
    logits: Float[Tensor, "*shape read d_vocab"], ids: Int[Tensor, "*prompts read variant"]
) -> Float[Tensor, "*shape"]:
    """log P(answer) in nats: the sum over its tokens, each read from the logits at its own predicting position.

    `ids` are the tokens wanted at each position, whose probabilities add up where there are several variants; -1 stands
    for no token. Taken from the odds, see `log_p_of_odds`. In float32 at least; gradients pass.

    >>> answer_log_probability(torch.zeros(2, 4), torch.tensor([[1], [3]])).exp().item()
    0.0625
    """
    values = at_least_float32(logits)
    index, missing = _indices(ids, values)
    absent = missing & ~missing[..., :1]  # where nothing counts a number stays, whose gradient is one
    own = values.gather(-1, index).masked_fill(absent, float("-inf")).logsumexp(-1)
    others = values.scatter(-1, index, float("-inf")).logsumexp(-1)
    return log_p_of_odds(own - others).masked_fill(missing[..., 0], 0.0).sum(-1)


def answer_is_said(
    logits: Float[Tensor, "*shape read d_vocab"], ids: Int[Tensor, "*prompts read variant"]
) -> Bool[Tensor, "*shape"]:
    """Whether the model would generate the answer: each of its tokens is the most probable one where it is predicted.

    With the answer appended to the prompt that is the same as decoding greedily, token by token.

    >>> answer_is_said(torch.eye(4)[:2], torch.tensor([[0], [3]])).item()
    False
    """
    ids = to_device(ids, logits.device)
    return ((logits.argmax(-1)[..., None] == ids).any(-1) | (ids[..., 0] < 0)).all(-1)


def said_until_wrong(best: Int[Tensor, " read"], ids: Int[Tensor, "read variant"]) -> list[int]:
    """What the model says where an answer's tokens are predicted, up to the first token that is not the answer's.

    `best` are the most probable tokens there; beyond the first wrong one they follow an answer that was not given.

    >>> said_until_wrong(torch.tensor([7, 3, 8]), torch.tensor([[7], [9], [8]]))
    [7, 3]
    """
    n = int((ids[:, 0] >= 0).sum())
    wrong = (best[:n, None] != ids[:n]).all(-1).nonzero()[:, 0].tolist()
    return best[: wrong[0] + 1 if wrong else n].tolist()


def answer_is_first(
    logits: Float[Tensor, "*shape read d_vocab"], ids: Int[Tensor, "*prompts read variant"]
) -> Bool[Tensor, "*shape"]:
    """Whether no token is more probable than the answer's, at any position that predicts one; ties count for the answer.

    >>> answer_is_first(torch.zeros(2, 4), torch.tensor([[0], [3]])).item()
    True
    """
    index, missing = _indices(ids, logits)
    return ((logits.gather(-1, index).amax(-1) >= logits.amax(-1)) | missing[..., 0]).all(-1)


def _indices(ids: Int[Tensor, "*prompts read variant"], logits: Tensor) -> tuple[Tensor, Tensor]:
    """Indices into the vocabulary for all logits, and which of them stand for no token.

    Only ids on the CPU are checked: those on a device are the model's own, or were checked when they were sent.
    """
    if ids.device.type == "cpu" and (largest := int(ids.max())) >= logits.shape[-1]:
        raise InputError(f"Token id {largest} is not in the vocabulary; expected 0..{logits.shape[-1] - 1}.")
    ids = to_device(ids, logits.device)
    index = torch.where(ids < 0, ids[..., :1].clamp(min=0), ids)  # a variant again, or any where nothing counts
    shape = (*logits.shape[:-1], -1)
    return index.expand(shape), (ids < 0).expand(shape)


# ---------------------------------------------------------------------- where it is read


@dataclass(frozen=True, eq=False)
class AnswerReading:
    """One answer for each prompt, where its tokens are predicted, and which they are: see `read_answer`.

    Positions and tokens are on the CPU, which plans by them and names them.

    Attributes:
        inputs (Inputs): The prompts; with answers of several tokens appended.
        logit_positions (Int[Tensor, "prompt read"]): Where each of the answer's tokens is predicted.
        ids (Int[Tensor, "prompt read variant"] | None): The tokens that count there, -1 for none; None for the model's
            own next token.
        texts (tuple[str, ...]): The answers in words; () for the model's own next token.
        measured (Literal["whole answer", "first token", "one token"]): Whether these tokens are the whole answers.
    """

    inputs: Inputs
    logit_positions: Int[Tensor, "prompt read"]
    ids: Int[Tensor, "prompt read variant"] | None
    texts: tuple[str, ...]
    measured: Literal["whole answer", "first token", "one token"]

    @property
    def positions(self) -> Literal["last"] | list[int]:
        """`positions=` of `Replay`: where logits are read."""
        appended = any(m.n_answer for m in self.inputs.token_maps)
        return self.logit_positions[0].tolist() if appended else "last"

    def shaped(self, logits: Float[Tensor, "..."], *lead: int) -> Float[Tensor, "*lead prompt read d_vocab"]:
        """Logits that Replay read at `positions`, with all axes; `lead` are the axes before the prompts'."""
        return logits.reshape(*lead, *self.logit_positions.shape, logits.shape[-1])

    def with_own(self, model: HookedLLaVA, logits: Float[Tensor, "prompt read d_vocab"]) -> AnswerReading:
        """The same, with the model's own next tokens, read off its logits, filled in if no answer was given."""
        return self if self.ids is not None else self.with_ids(model, logits.argmax(-1, keepdim=True))

    def with_ids(self, model: HookedLLaVA, ids: Int[Tensor, "prompt read one"]) -> AnswerReading:
        """The same, with these tokens filled in if no answer was given."""
        if self.ids is not None:
            return self
        ids = ids.cpu()
        return replace(self, ids=ids, texts=tuple(decode_text(model, [i]) for i in ids[:, 0, 0].tolist()))

    def log_probability(self, logits: Float[Tensor, "*run prompt read d_vocab"]) -> Float[Tensor, "*run prompt"]:
        """log P of each prompt's answer; the model's own must have been filled in."""
        assert self.ids is not None
        return answer_log_probability(logits, self.ids)

    def as_answers(self) -> list[Answer]:
        """The first token of each prompt's answer, with its variants, as metrics take it."""
        assert self.ids is not None
        rows = zip(self.texts, self.ids[:, 0].tolist(), strict=True)
        return [Answer(text, tuple(i for i in row if i >= 0), self.measured == WHOLE) for text, row in rows]

    def metric(self, prompt: int) -> Callable[[Tensor], Tensor]:
        """log P of one prompt's answer, of logits [..., read, d_vocab]."""
        assert self.ids is not None
        ids = self.ids[prompt]
        return lambda logits: answer_log_probability(logits, ids)

    @property
    def probability(self) -> NamedMetric:
        """P of the only prompt's answer, a metric of logits that Replay read at `positions`."""
        log_p, at_last = self.metric(0), self.positions == "last"
        return NamedMetric(lambda x: log_p(x[..., None, :] if at_last else x).exp(), "probability", {})

    def attrs(self, model: HookedLLaVA, what: str = "answer") -> dict[str, Any]:
        """What a result says of its answers, see `about_answers`."""
        return about_answers(model, self.texts, self.ids, self.measured, what)


def about_answers(
    model: HookedLLaVA,
    texts: Sequence[str],
    ids: Int[Tensor, "prompt read variant"] | None,
    measured: str,
    what: str = "answer",
) -> dict[str, Any]:
    """Attributes of a result: the answer in words, `answer_tokens`, and `measured`: "whole answer" or "first token".

    Of several prompts each has its own.
    """
    rows = [] if ids is None else ids[..., 0].tolist()
    tokens = [token_names(model, [i for i in row if i >= 0]) for row in rows]
    return {what: unwrap_single(texts), "answer_tokens": unwrap_single(tokens), "measured": measured}


def unwrap_single(values: Sequence[Any]) -> Any:
    """What an attribute says: the only prompt's value, or the list of all; text as it is.

    >>> unwrap_single(["red"]), unwrap_single(["red", "blue"])
    ('red', ['red', 'blue'])
    """
    if isinstance(values, str):
        return values
    return values[0] if len(values) == 1 else list(values)


def read_answer(model: HookedLLaVA, inputs: InputsLike, answer: Target = None, what: str = "answer") -> AnswerReading:
    """Where an answer is read: text, a token id, or an `Answer`, the same for all prompts or a list with one for each.

    In a list an answer may also be a list of token ids. One of several tokens is appended to its prompt. Without an answer
    it is the one that the inputs already have appended (`teacher_forced`), otherwise the model's own next token. Raises
    `InputError` for answers that do not fit; `what` is the argument's name.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> asked = model.prepare("Who made the star?")
    >>> reading = read_answer(model, asked, "Red star")
    >>> reading.positions == [asked.shape[1] - 1, asked.shape[1]], reading.measured
    (True, 'whole answer')
    """
    prompts = model.as_inputs(inputs)
    if any(m.n_answer for m in prompts.token_maps):
        if answer is not None:
            raise InputError(f"The inputs have an answer appended already, and {what}={answer!r} was given; give one.")
        return _appended_already(model, prompts)
    if answer is None:
        return AnswerReading(prompts, prompts.last[:, None], None, (), FIRST)
    found = answer_tokens(model, prompts, answer, what)
    measured = WHOLE if all(one.whole for one in found) else FIRST
    table = token_table([one.variants for one in found])
    texts = tuple(one.text for one in found)
    if table.shape[1] == 1:
        return AnswerReading(prompts, prompts.last[:, None], table, texts, measured)
    longer = append_tokens(model, prompts, table[..., 0], [one.text if one.from_text else None for one in found])
    n = table.shape[1]
    return AnswerReading(longer, _predicting(longer, longer.shape[1] - n, n), table, texts, measured)


def _appended_already(model: HookedLLaVA, inputs: Inputs) -> AnswerReading:
    """The reading of inputs that have their answers with them."""
    starts = {m.n_answer and m.own.stop for m in inputs.token_maps}
    if len(starts) != 1 or 0 in starts:
        raise InputError(
            "The answers that the inputs have appended begin at different positions; ask prompt by prompt."
        )
    rows = [[[m.token_ids[p]] for p in range(m.own.stop, m.real.stop)] for m in inputs.token_maps]
    table = token_table(rows)
    texts = tuple(decode_text(model, [i for (i,) in row]) for row in rows)
    return AnswerReading(inputs, _predicting(inputs, starts.pop(), table.shape[1]), table, texts, WHOLE)


def _predicting(inputs: Inputs, start: int, n: int) -> Int[Tensor, "prompt read"]:
    """The positions that predict n tokens from a position on."""
    return torch.arange(start - 1, start - 1 + n).expand(len(inputs), -1)


def token_table(rows: Sequence[Sequence[Sequence[int]]]) -> Int[Tensor, "prompt read variant"]:
    """Token ids [prompt][read][variant] of different lengths, filled up with -1; on the CPU."""
    n_read, n_variants = max(len(row) for row in rows), max(len(ids) for row in rows for ids in row)
    table = torch.full((len(rows), n_read, n_variants), NOTHING, dtype=torch.long)
    for i, row in enumerate(rows):
        for j, ids in enumerate(row):
            table[i, j, : len(ids)] = torch.tensor(ids)
    return table


# ---------------------------------------------------------------------- appended to the prompt


@dataclass(frozen=True)
class TeacherForced:
    """Prompts with an answer of several tokens appended, and how to score it: see `teacher_forced`.

    Attributes:
        inputs (Inputs): The prompts with the answer, which is their span `answer`; all other spans, `last` too, are the
            prompts' own.
        positions (list[int]): Where each of the answer's tokens is predicted: from the prompt's last position on.
        metric (Callable[[Tensor], Tensor]): log P(answer | prompt) in nats, of logits [..., position, d_vocab] at those
            positions.
    """

    inputs: Inputs
    positions: list[int]
    metric: Callable[[Tensor], Tensor]


def teacher_forced(
    model: HookedLLaVA,
    inputs: InputsLike,
    answer: AnswerLike | Sequence[str] | Sequence[Sequence[SupportsIndex]],
) -> TeacherForced:
    """An answer of one or more tokens appended to the prompts, to be scored as a whole.

    `Replay(model, forced.inputs).run(runs, forced.metric, positions=forced.positions)` gives log P(answer) under each
    run, and `activation_patching(..., metric=forced.metric, logit_positions=forced.positions)` a map of it. `causal_trace` and
    `attention_knockout` take `forced.inputs` as they are and measure the whole answer.

    Args:
        model: the model.
        inputs: anything `model.as_inputs` takes; prompts of a batch are padded on the left.
        answer: text, or its token id or ids; or a list of texts (or lists of ids), one for each prompt. Text is tokenized
            together with the prompt, after what the template puts between them, as a rule a space.

    Raises `InputError` if the answer has no tokens, or words that the tokenizer does not know, or if it would change the
    prompt's own tokens.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.replay import Replay
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> forced = teacher_forced(model, model.prepare("Who made the star?"), "Red star")
    >>> bool(forced.metric(Replay(model, forced.inputs).logits(forced.positions)) < 0)
    True
    """
    prompt = model.as_inputs(inputs)
    one_for_all = isinstance(answer, str) or not isinstance(answer, Iterable) or all(is_index(i) for i in answer)
    given = [answer] * len(prompt) if one_for_all else per_prompt(answer, len(prompt))
    found = prompt.each(lambda token_map, one: one_answer(model, token_map, one), prompt.token_maps, given)
    table = token_table([one.variants for one in found])
    longer = append_tokens(model, prompt, table[..., 0], [one.text if one.from_text else None for one in found])
    same = table[0] if bool((table == table[:1]).all()) else table

    def metric(logits: Float[Tensor, "*shape d_vocab"]) -> Float[Tensor, "*out"]:
        return answer_log_probability(logits, same)

    named = NamedMetric(metric, "log_probability of the whole answer", {})
    n, length = table.shape[1], longer.shape[1]
    return TeacherForced(longer, list(range(length - n - 1, length - 1)), named)


def append_tokens(
    model: HookedLLaVA, inputs: Inputs, ids: Int[Tensor, "prompt n"], texts: Sequence[str | None] | None = None
) -> Inputs:
    """The prompts, padded on the left, with token ids appended as their span `answer`; -1 at the end stands for padding.

    Spans, words and images stay the prompts' own. `predicting` is a further span: the positions that predict the tokens.
    Raises `InputError` where the model was made for fewer positions, and for a token that stands for an image.
    """
    check_appendable(model, ids)
    prompt, n, counts = inputs.padded_left().cpu(), ids.shape[1], (ids >= 0).sum(-1).tolist()
    filler = ids.gather(1, (ids >= 0).sum(-1, keepdim=True) - 1)  # a shorter answer's last token: it is never read
    fields: dict[str, Tensor] = {
        "input_ids": torch.cat([prompt.input_ids, torch.where(ids < 0, filler, ids)], dim=1),
        "attention_mask": torch.cat([prompt.attention_mask, ids >= 0], dim=1),
    }
    fields |= prompt.image_fields
    if prompt.position_ids is not None:
        further = prompt.position_ids[:, -1:] + torch.arange(1, n + 1, device=prompt.device)
        fields["position_ids"] = torch.cat([prompt.position_ids, further], dim=1)
    longer = model.as_inputs(fields)
    token_maps = tuple(
        _with_answer(new, old, count)
        for new, old, count in zip(longer.token_maps, prompt.token_maps, counts, strict=True)
    )
    prompts = None
    if prompt.prompts is not None and texts is not None and None not in texts:
        both = zip(prompt.token_maps, prompt.prompts, texts, strict=True)
        prompts = tuple(continued(model, token_map, own, str(text)) for token_map, own, text in both)
    return replace(longer, token_maps=token_maps, images=prompt.images, prompts=prompts)


def _with_answer(new: TokenMap, old: TokenMap, n: int) -> TokenMap:
    """The longer prompt's map with the spans, words and images of the prompt, whose text the answer is no part of."""
    first = len(old)
    named = {
        **old.named,
        "answer": Positions(range(first, first + n)),
        "predicting": Positions(range(first - 1, first - 1 + n)),
    }
    words = new.words
    if words is not None and old.words is not None:
        offsets, further = old.words.prompt_offsets, len(new) - first
        offsets = None if offsets is None else offsets + ((0, 0),) * further
        known = {"prompt": old.words.prompt, "parts": old.words.parts, "prompt_offsets": offsets}
        words = replace(words, real=old.words.real, **known)
    return replace(new, named=named, layouts=old.layouts, words=words, n_answer=n)
