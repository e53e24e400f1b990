"""What does attention carry to the constraint, and from the constraint to the answer?

Attention contributions (Basu et al. 2024, arXiv 2406.04236, after Yuksekgonul et al. 2023): what heads write from position k
to position q is o = A v W_O, and the contribution of k to q in a layer is the norm of the heads' sum, || sum_h o ||. Two
steps are looked at: from the image to the constraint's last token, and from the constraint to the last position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_llava.checks import one_of
from hooked_llava.errors import InputError
from hooked_llava.experiments.corruptions import Constraint, find_constraints
from hooked_llava.model.cache_hooks import caching_hook
from hooked_llava.model.requirements import supported_inputs
from hooked_llava.prompt.positions import Positions
from hooked_llava.readout.answer import FIRST, WHOLE
from hooked_llava.readout.answer_tokens import single_token
from hooked_llava.readout.head_outputs import head_outputs, head_outputs_along, summed_head_outputs
from hooked_llava.readout.metrics import probability
from hooked_llava.readout.resid import logits_at, rows_at
from hooked_llava.readout.vocabulary import decode_text
from hooked_llava.results.arrays import to_numpy
from hooked_llava.results.image_axes import ImageAxes, take
from hooked_llava.results.map_quality import roc_auc
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs

Measure = Literal["norm", "logit"]


def attention_contribution(
    model: HookedLLaVA,
    inputs: Any,
    constraint: Constraint | Sequence[Constraint],
    *,
    measure: Measure = "norm",
    by_head: bool = False,
    answer: str | int | None = None,
) -> xr.Dataset:
    """Size of what heads write from the image to the constraint's last token, and from the constraint to the last position.

    Args:
        model: the model.
        inputs: one prompt, anything `model.as_inputs` takes.
        constraint: words of the question, positions, or a list of several; the first step ends at the last one's last token.
        measure: "norm" of the output (of the heads' sum, unless `by_head`), or "logit", its signed part along the
            answer's direction through the frozen final norm, in logits.
        by_head: every head's outputs apart.
        answer: for "logit", a token id, or a word that is one token after the prompt; the model's own next token by default.

    Returns a dataset with `constraint_to_last` [layer, source] over the constraint's tokens (`source` are positions,
    `label` their text), and with an image `image_to_constraint` [layer, image, patch_row, patch_col], for images of several
    grids [layer, image, feature] (see `results.image_axes`); an axis head
    follows layer if `by_head`. Attributes: `answer`, `measured` ("first
    token" of the model's own answer, or "whole answer") and `confidence`, the probability of the model's own next token.
    Raises `InputError` and `SpanError` for what does not fit.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> found = attention_contribution(model, model.prepare("Who made the star?"), "the star")
    >>> found["constraint_to_last"].dims, found["constraint_to_last"]["label"].values.tolist()
    (('layer', 'source'), ['the', 'star'])
    """
    prompt = supported_inputs("attention_contribution", model, inputs)
    one_of(measure, get_args(Measure), "measure")
    token = None if answer is None else single_token(model, prompt.token_map, answer)
    constraints = find_constraints(prompt.token_map, constraint)
    with provenance("attention_contribution", model, prompt, n_forward=1, measure=measure) as made:
        targets = [constraints[-1][-1], prompt.token_map["last"][0]]
        held, logits = _held(model, prompt, targets)
        token = int(logits.argmax()) if token is None else token
        sizes = _sizes(model, held, token, measure, by_head=by_head)
        attrs = made.attrs(
            answer=decode_text(model, [token]),
            measured=FIRST if answer is None else WHOLE,
            confidence=float(probability(int(logits.argmax()))(logits)),
            constraint_positions=[where.tolist() for where in constraints],
        )
        return _labelled(model, prompt, constraints, sizes, measure).assign_attrs(attrs)


def error_auroc(scores: Sequence[float | int] | np.ndarray, correct: Sequence[bool] | np.ndarray) -> float:
    """How well a low score tells wrong answers from right ones: P(score of a right one > score of a wrong one).

    0.5 is chance; ties count half. Raises `InputError` unless there are right and wrong answers.

    >>> error_auroc([0.9, 0.8, 0.3, 0.8], [True, True, False, False])
    0.875
    """
    right = np.asarray(correct, dtype=bool)
    n_right, n_wrong = int(right.sum()), int((~right).sum())
    if len(scores) != len(right) or not n_right or not n_wrong:
        raise InputError(
            f"There are {len(scores)} scores of {n_right} right and {n_wrong} wrong answers; expected one score for each "
            "answer, and at least one answer of either kind."
        )
    return float(roc_auc(np.asarray(scores, dtype=float)[None], right[None])[0])


def _held(
    model: HookedLLaVA, prompt: Inputs, targets: list[int]
) -> tuple[dict[str, Tensor], Float[Tensor, " d_vocab"]]:
    """Patterns from the targets, values of every position, the final norm's scale at the last, and the logits there."""
    table = model.hooks_table
    store: dict[str, Tensor] = {}
    hooks: list[Any] = [
        (table.resolve("pattern"), caching_hook(store, model, torch.tensor([targets]))),
        (table.resolve("v"), caching_hook(store, model)),
    ]
    final = model.run_with_hooks(prompt, fwd_hooks=hooks, stop_at_layer=model.cfg.n_layers)
    assert final is not None
    last = torch.tensor([targets[1:]])
    store["ln_final.hook_scale"] = model.ln_final.scale_of(rows_at(final, last))
    return {name: tensor[0] for name, tensor in store.items()}, logits_at(model, final, last)[0, 0]


def _sizes(
    model: HookedLLaVA, held: dict[str, Tensor], token: int, measure: Measure, *, by_head: bool
) -> Float[Tensor, "layer *head target key"]:
    """The size of what is written at the two targets from every position."""
    direction = None
    if measure == "logit":
        scale = held["ln_final.hook_scale"][0].float()
        direction = model.tokens_to_residual_directions(token).float() / scale
    rows = []
    for layer in range(model.cfg.n_layers):
        pattern, value = (held[model.hooks_table.name(name, layer)] for name in ("pattern", "v"))
        if direction is not None:
            along = head_outputs_along(model, layer, pattern, value, direction)
            rows.append(along if by_head else along.sum(0))
        elif by_head:  # one head at a time: [head target key d_model] is large
            heads = range(model.cfg.n_heads)
            each = [head_outputs(model, layer, pattern, value, heads=[head]).norm(dim=-1) for head in heads]
            rows.append(torch.cat(each))
        else:
            rows.append(summed_head_outputs(model, layer, pattern, value).norm(dim=-1))
    return torch.stack(rows)


def _labelled(
    model: HookedLLaVA,
    prompt: Inputs,
    constraints: list[Positions],
    sizes: Float[Tensor, "layer *head target key"],
    measure: Measure,
) -> xr.Dataset:
    token_map = prompt.token_map
    dims = ("layer", "head")[: sizes.ndim - 2]
    coords: dict[str, Any] = {dim: range(n) for dim, n in zip(dims, sizes.shape, strict=False)}
    sources = [p for where in constraints for p in where]
    units = {"units": "logits" if measure == "logit" else "norm of the head outputs"}
    found: dict[str, Any] = {
        "constraint_to_last": ((*dims, "source"), to_numpy(sizes[..., 1, :])[..., sources], units),
    }
    if token_map.n_images:
        axes = ImageAxes.of(prompt)
        at_images = take(sizes[..., 0, :], axes.positions(token_map))  # (layer, *head, image, place)
        by_place = axes.labelled(to_numpy(at_images), (*dims, "image"), attrs=units)
        # the coordinate `label` is that of the sources
        found["image_to_constraint"] = by_place.rename({"label": "feature_label"} if "label" in by_place.coords else {})
    labels = [token_map.labels[p] for p in sources]
    return xr.Dataset(found, coords=coords | {"source": sources, "label": ("source", labels)})
