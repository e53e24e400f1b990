"""Logits -> number: what an intervention did to the answer.

Every metric is made by a function that takes the answer and returns a function of logits [..., d_vocab] at the position
where the answer is read; `at_last` turns such a function into one of TransformerLens's [batch pos d_vocab], and
`from_transformer_lens` one of theirs into such a function.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.checks import is_whole_number
from hooked_llava.errors import InputError
from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.readout.answer import TeacherForced, answer_log_probability, teacher_forced
from hooked_llava.readout.answer_tokens import Answer, per_prompt
from hooked_llava.readout.metric_names import NamedMetric
from hooked_llava.readout.vocabulary import decode_tokens

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

__all__ = [
    "Answer",
    "Metric",
    "TeacherForced",
    "at_last",
    "from_transformer_lens",
    "kl_divergence",
    "log_probability",
    "logit_difference",
    "per_prompt",
    "own_answers",
    "probability",
    "rank",
    "relative_change",
    "teacher_forced",
    "value_of",
]

Metric = Callable[[Tensor], Tensor]
"""From logits [..., d_vocab] where the answer is read to one number each."""
_WHAT_A_METRIC_IS = (
    "A metric turns logits [..., d_vocab] where the answer is read into [...]; where several positions are read, "
    "[..., position, d_vocab] into [...], as that of teacher_forced does. One written for TransformerLens, "
    "[batch pos d_vocab] -> number, is adapted by metrics.from_transformer_lens(metric)."
)


def log_probability(answer: Answer | SupportsIndex) -> Metric:
    """log P(answer) in nats, over all its variants."""
    ids = _ids(answer)
    return NamedMetric(lambda logits: _log_p(logits, ids), "log_probability", {"answer": ids})


def probability(answer: Answer | SupportsIndex) -> Metric:
    """P(answer), over all its variants."""
    ids = _ids(answer)
    return NamedMetric(lambda logits: _log_p(logits, ids).exp(), "probability", {"answer": ids})


def logit_difference(answer: Answer | SupportsIndex, baseline: Answer | SupportsIndex) -> Metric:
    """Logit of the answer less that of the baseline; of several variants the logits' log-sum-exp is taken."""
    a, b = _ids(answer), _ids(baseline)
    return NamedMetric(
        lambda logits: at_least_float32(_of(logits, a)).logsumexp(-1) - at_least_float32(_of(logits, b)).logsumexp(-1),
        "logit_difference",
        {"answer": a, "baseline": b},
    )


def own_answers(
    clean: Float[Tensor, "*shape d_vocab"],
    corrupted: Float[Tensor, "*shape d_vocab"],
    model: HookedLLaVA | None = None,
) -> Metric:
    """Logit difference of the answers that two runs give, from their logits [d_vocab]: of their first tokens.

    Raises `InputError` if both give the same; with the model it names the word.
    """
    answers = [int(logits.argmax()) for logits in (clean, corrupted) if logits.ndim == 1]
    if len(answers) != 2:
        raise InputError("Logits are read at several positions, so there is no one answer to compare; give metric=.")
    if answers[0] == answers[1]:
        word = "" if model is None or model.processor is None else f"{decode_tokens(model, clean.argmax())!s}, "
        raise InputError(
            f"The clean and the corrupted prompt have the same answer ({word}token {answers[0]}), so there is no difference "
            "of answers to measure. Give metric=, for example log_probability(Answer.of(model, 'Red'))."
        )
    return logit_difference(*answers)


def rank(answer: Answer | SupportsIndex) -> Metric:
    """How many tokens have a larger logit than the answer's best variant: 0 if it is the model's choice."""
    ids = _ids(answer)
    return NamedMetric(
        lambda logits: (logits > _of(logits, ids).amax(-1, keepdim=True)).sum(-1).float(), "rank", {"answer": ids}
    )


def kl_divergence(reference: Float[Tensor, "*shape d_vocab"]) -> Metric:
    """KL(reference || changed) in nats, of next-token distributions, given the reference logits."""
    log_p = at_least_float32(reference).log_softmax(-1)
    return NamedMetric(
        lambda logits: (log_p.exp() * (log_p - at_least_float32(logits).log_softmax(-1))).sum(-1), "kl_divergence", {}
    )


def relative_change(answer: Answer | SupportsIndex, reference: Float[Tensor, "*shape d_vocab"]) -> Metric:
    """100 (P - P_reference) / P_reference, the percentage that Zhang et al. (2411.18620) plot."""
    p = probability(answer)
    before = p(reference)
    return NamedMetric(lambda logits: 100 * (p(logits) - before) / before, "relative_change", {"answer": _ids(answer)})


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

    return NamedMetric(adapted, f"from_transformer_lens({getattr(metric, '__name__', 'a function')})", {})


def value_of(metric: Metric, logits: Float[Tensor, "*shape d_vocab"]) -> float:
    """What a metric gives for the logits of one run; raises `InputError` if that is not one number.

    >>> value_of(probability(0), torch.zeros(4))
    0.25
    """
    return float(measured(metric, logits, 0, one_number=True))


def measured(
    metric: Metric, logits: Float[Tensor, "*shape d_vocab"], n_axes: int, *, one_number: bool = False
) -> Float[Tensor, "*out"]:
    """A metric's values for logits, checked: every function that takes `metric=` calls it here.

    The first `n_axes` axes of the logits run over runs and prompts, which the metric keeps apart. One more axis before
    d_vocab runs over the positions that are read: a metric keeps it, or sums it up as that of `teacher_forced` does; with
    `one_number` it must. Raises `InputError`, naming `from_transformer_lens`, for a metric of another shape, and for one
    that fails on logits of this shape.

    >>> measured(probability(0), torch.zeros(3, 4), 1)
    tensor([0.2500, 0.2500, 0.2500])
    """
    if not callable(metric):
        raise InputError(
            f"metric={metric!r}; expected a function of logits [..., d_vocab], such as probability(answer)."
        )
    try:
        values = metric(logits)
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError) as error:
        raise InputError(f"The metric failed on logits {tuple(logits.shape)} ({error}). {_WHAT_A_METRIC_IS}") from error
    rows, shape = tuple(logits.shape[:n_axes]), tuple(getattr(values, "shape", ()))
    expected = [rows] if one_number else [tuple(logits.shape[:-1]), rows]
    own = tuple(getattr(metric, "own_axes", ()))  # of metrics that read several numbers off each row
    if not isinstance(values, Tensor) or shape not in [(*axes, *own) for axes in expected]:
        given = f"shape {shape}" if isinstance(values, Tensor) else type(values).__name__
        if not rows and one_number:
            raise InputError(
                f"The metric returned {given} for the logits {tuple(logits.shape)} of one run; expected one number, as a "
                f"tensor. {_WHAT_A_METRIC_IS}"
            )
        raise InputError(
            f"The metric returned {given} for logits of shape {tuple(logits.shape)}; expected "
            f"{' or '.join(map(str, dict.fromkeys(expected)))}: one number for each run and prompt. {_WHAT_A_METRIC_IS}"
        )
    return values


def _ids(answer: Answer | SupportsIndex) -> list[int]:
    """The tokens that a metric scores, checked as far as that is possible without the model."""
    if isinstance(answer, Answer):
        return list(answer.ids)
    token = operator.index(answer) if is_whole_number(answer) else -1
    if token < 0:
        raise InputError(
            f"A metric takes an Answer or a token id, and {answer!r} is neither; give Answer.of(model, {answer!r}) for a "
            "word, or an id from 0 on."
        )
    return [token]


def _log_p(logits: Float[Tensor, "*shape d_vocab"], ids: list[int]) -> Float[Tensor, "*shape"]:
    """log P of any of these tokens at one position."""
    return answer_log_probability(logits[..., None, :], torch.tensor([ids]))


def _of(values: Float[Tensor, "*shape d_vocab"], ids: list[int]) -> Float[Tensor, "*shape variant"]:
    """The values of some tokens."""
    if (largest := max(ids)) >= values.shape[-1]:
        raise InputError(f"Token id {largest} is not in the vocabulary; expected 0..{values.shape[-1] - 1}.")
    return values[..., ids]


def _only_number(value: Any, logits: Tensor) -> Any:
    """What a metric of TransformerLens's returned for one run, if it is one number."""
    shape = tuple(getattr(value, "shape", ()))
    if math.prod(shape) != 1:
        raise InputError(
            f"The metric returned shape {shape} for the logits {tuple(logits.shape)} of one run; expected one number, as "
            "metrics of TransformerLens, [batch pos d_vocab] -> number, give."
        )
    return value
