"""Can one see that an answer is made up?

Yu & Ananiadou (arXiv 2411.10950) look at whether the patches that matter lie on the object that is asked about, to tell
"looked at the wrong place" from "looked there and read it wrongly". Here that look is a number, beside the two that need
no map: the answer's probability and the entropy of the distribution it comes from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from hooked_llava.errors import InputError
from hooked_llava.model.requirements import supported_inputs
from hooked_llava.readout.resid import next_token_logits
from hooked_llava.results.image_axes import ImageAxes
from hooked_llava.results.map_quality import auroc, shares
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

SIGNS = {"confidence": -1, "entropy": 1, "mass_on_objects": -1, "map_entropy": 1, "map_peak": -1}
"""Each sign, and 1 where more of it should mean a wrong answer, -1 where less should."""


def answer_signs(model: HookedLLaVA, inputs: Any, maps: Any, coverage: Any) -> xr.Dataset:
    """What might tell a wrong answer from a right one, each [prompt].

    `confidence` is the probability of the model's own next token and `entropy` that of the next token, in nats.
    `mass_on_objects` is the share of the map's positive part that lies on objects; `map_peak` the map's largest value, in
    its own unit; `map_entropy` the entropy in nats of the map as shares.

    Args:
        model: the model.
        inputs: prompts with one image each.
        maps: [prompt, (image,) patch_row, patch_col], for images of several grids [prompt, (image,) feature], such as
            `patch_importance` gives; for one prompt without the axis prompt. What is NaN is left out.
        coverage: the share of each patch that objects cover (all of the image's, or those that are asked about), of the
            same shape.

    Raises `InputError` for shapes that do not fit.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> import torch
    >>> inputs = model.prepare("What color is the star?", images=torch.zeros(3, 64, 64))
    >>> sorted(answer_signs(model, inputs, np.eye(8)[None], np.ones((1, 8, 8))))
    ['confidence', 'entropy', 'map_entropy', 'map_peak', 'mass_on_objects']
    """
    prompts = supported_inputs("answer_signs", model, inputs)
    shape = ImageAxes.of(prompts).shape
    both = [np.asarray(getattr(v, "values", v), dtype=np.float64).reshape(-1, *shape) for v in (maps, coverage)]
    if any(len(array) != len(prompts) for array in both):
        raise InputError(
            f"{len(prompts)} prompts, {len(both[0])} maps and {len(both[1])} coverages; give one of each per prompt."
        )
    values, covered = both
    values = np.where(np.isnan(covered), np.nan, values)
    places = tuple(range(1, values.ndim))
    with provenance("answer_signs", model, prompts, n_forward=1) as made:
        log_p = next_token_logits(model, prompts).double().log_softmax(-1)
        positive = np.nan_to_num(np.clip(values, 0, None))
        total = positive.sum(places)
        on = (positive * np.nan_to_num(np.clip(covered, 0, 1))).sum(places) / np.where(total > 0, total, 1)
        part = np.nan_to_num(shares(values, n_axes=len(places)))
        found = {
            "confidence": log_p.exp().amax(-1).cpu().numpy(),
            "entropy": -(log_p.exp() * log_p).sum(-1).cpu().numpy(),
            "mass_on_objects": np.where(total > 0, on, 0.0),
            "map_entropy": -(part * np.log(np.where(part > 0, part, 1))).sum(places),
            "map_peak": np.nanmax(values, places),
        }
        return xr.Dataset({name: ("prompt", array) for name, array in found.items()}, attrs=made.attrs())


def predict_wrong(signs: xr.Dataset, wrong: Any) -> xr.DataArray:
    """AUROC of every sign as a predictor of a wrong answer, [sign]: 1 if it tells them all, 0.5 if it tells nothing.

    Each is turned so that its expected direction counts as right: low confidence, high entropy, little mass on objects, a
    spread map, a low peak. Attributes `n` and `n_wrong`. NaN where all answers are right, or all wrong. Raises
    `InputError` for another number of answers than prompts.

    >>> signs = xr.Dataset({"confidence": ("prompt", [0.99, 0.4]), "entropy": ("prompt", [0.1, 0.05])})
    >>> predict_wrong(signs, [False, True]).to_series().to_dict()
    {'confidence': 1.0, 'entropy': 0.0}
    """
    is_wrong = np.asarray(wrong, dtype=bool)
    if is_wrong.shape != (signs.sizes["prompt"],):
        raise InputError(
            f"wrong= has the shape {is_wrong.shape}; expected one for each of {signs.sizes['prompt']} prompts."
        )
    names = [name for name in SIGNS if name in signs]
    return xr.DataArray(
        [auroc(SIGNS[name] * signs[name].values, is_wrong) for name in names],
        dims="sign",
        coords={"sign": names},
        name="auroc",
        attrs={**signs.attrs, "n": len(is_wrong), "n_wrong": int(is_wrong.sum())},
    )
