"""Are attention and the MLPs of these layers needed at these positions?

Attention knockout (`attention_knockout`) closes a way from some positions to others. Here what a component adds at some positions
is taken away, in the same windows of layers (Geva et al. 2023, arXiv 2304.14767, block the sublayers' updates alike): so it is
seen whether a span is still worked on after it has taken up what it was to take up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import xarray as xr

from hooked_llava.errors import InputError
from hooked_llava.experiments.edges import Edge, Missing
from hooked_llava.experiments.knockout_runs import Window, knocked_out
from hooked_llava.options.knockout_metrics import MetricName
from hooked_llava.readout.answer_tokens import Target
from hooked_llava.readout.metrics import Metric
from hooked_llava.replay.intervention import Intervention

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.prepare import InputsLike


def output_knockout(
    model: HookedLLaVA,
    inputs: InputsLike,
    outputs: Sequence[str] | str = ("attn at question", "mlp at question", "attn at last", "mlp at last"),
    window: Window = None,
    *,
    answer: Target = None,
    metric: MetricName | Metric = "relative_change",
    total: bool = False,
    missing: Missing = "raise",
    seed: int = 0,
    batch_size: int | None = None,
) -> xr.Dataset:
    """What the answer loses when attention or the MLPs of a window of layers add nothing at some positions.

    Args:
        model: the model.
        inputs: anything `model.as_inputs` takes; a batch gives a first axis prompt.
        outputs: one or several, each "attn at SPAN" or "mlp at SPAN", with spans as for `attention_knockout`: what is set to 0
            there, `hook_attn_out` or `hook_mlp_out`.
        window: how many layers around the center, as for `attention_knockout`.
        answer: likewise, as all that follow.
        metric: "relative_change", "probability", "log_probability", or a function of logits.
        total: also take each output away in every layer at once.
        missing: "skip" gives NaN for spans that a prompt does not have, "raise" an error.
        seed: of the span `random`.
        batch_size: rows at once; by free memory if not given.

    Returns what `attention_knockout` does, with the axis `output` in place of `edge`. Unlike a blocked edge, an output that is
    missing takes away all that the layers bring there, whatever it was read from; and a residual stream without it is
    one that the model never sees, so that a loss may also be damage. One forward pass, and for each output and window what it
    can reach (attribute `work`). Raises as `attention_knockout`.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> found = output_knockout(model, model.prepare("Who made the star?"), ["mlp at question"], total=True)
    >>> dict(found["effect"].sizes) == {"output": 1, "layer": model.cfg.n_layers}
    True
    """
    listed = [outputs] if isinstance(outputs, str) else list(outputs)
    if not listed:
        raise InputError("outputs=[] names no output; expected at least one, such as 'mlp at question'.")
    how = {"missing": missing, "seed": seed, "batch_size": batch_size, "total": total, "centers": None}
    named = [_Output.named(name) for name in listed]
    found = knocked_out("output_knockout", model, inputs, named, window, (answer, None, metric), **how)
    return found.rename(edge="output")


@dataclass(frozen=True)
class _Output(Edge):
    """What attention or an MLP adds at some positions, which are both of its ends.

    Attributes:
        hook (str): Short name of what is set to 0.
    """

    hook: str = "attn_out"

    @classmethod
    def named(cls, name: str) -> _Output:
        """The output of a name such as "mlp at question"; raises `InputError`."""
        kind, at, where = name.partition(" at ") if isinstance(name, str) else ("", "", "")
        if kind not in ("attn", "mlp") or not at or not where.strip():
            raise InputError(f"outputs={name!r}; expected 'attn at SPAN' or 'mlp at SPAN', such as 'mlp at question'.")
        return cls(name, where.strip(), where.strip(), f"{kind}_out")

    def weighted(self, layers: Iterable[int], factor: float = 0.0) -> list[Intervention]:
        """Interventions on marked prompts that multiply it in some layers, by default by 0."""
        return [Intervention((self.hook, layer), positions=self.ends[1], scale=factor) for layer in layers]
