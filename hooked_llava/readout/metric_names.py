"""What does a metric measure? Metrics are functions; those of this library can say so, for a result's attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hooked_llava.readout.vocabulary import decode_text

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA


@dataclass(frozen=True, eq=False)
class NamedMetric:
    """A metric, from logits [..., d_vocab] to [...], with its name and its tokens.

    Attributes:
        function (Callable[[Tensor], Tensor]): From logits at the read position to one number per prompt.
        name (str): What the result calls it.
        tokens (Mapping[str, Sequence[int]]): Token ids by role: answer, baseline. Of several variants all, the one that
            was given first.
    """

    function: Callable[[Tensor], Tensor]
    name: str
    tokens: Mapping[str, Sequence[int]]

    def __call__(self, logits: Tensor) -> Tensor:
        """The metric's value."""
        return self.function(logits)


def about_metric(model: HookedLLaVA, metric: object) -> dict[str, Any]:
    """Attributes of a result: `metric` by name, and for its tokens `answer` and `answer_ids` (`baseline` likewise).

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.readout.metrics import logit_difference
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> red, blue = model.to_single_token("Red"), model.to_single_token("Blue")
    >>> about = about_metric(model, logit_difference(red, blue))
    >>> about["metric"], about["answer"], about["baseline"], about["answer_ids"] == [red]
    ('logit_difference', 'Red', 'Blue', True)
    >>> about_metric(model, lambda logits: logits[..., 0])
    {'metric': 'a function of your own, <lambda>'}
    """
    if not isinstance(metric, NamedMetric):
        return {"metric": f"a function of your own, {getattr(metric, '__name__', type(metric).__name__)}"}
    about: dict[str, Any] = {"metric": metric.name}
    for role, ids in metric.tokens.items():
        about[role] = decode_text(model, [int(ids[0])])
        about[f"{role}_ids"] = [int(i) for i in ids]
    return about
