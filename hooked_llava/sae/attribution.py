"""Which features, at which tokens, argue for an answer (Zhang et al., arXiv 2411.14982, section 3.4)?

A feature f that is active at token t with z writes z W_dec[f] into the activation. To first order d, how much the model prefers
the answer, changes by z (dd/dx_t . W_dec[f]) through it, so that one forward and one backward pass give every feature at every
token. What is not a feature stays, also what the autoencoder leaves unexplained.

Sign: positive argues for the answer, d with the feature less d without it. The paper's I(i, j) is the effect of switching off,
which has the opposite sign.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import torch
import xarray as xr

from hooked_llava.architecture.hooks import Hook
from hooked_llava.checks import one_of, whole_number, whole_numbers
from hooked_llava.errors import InputError
from hooked_llava.model.attached_sae import AttachedSAE, Autoencoder, place_of_sae
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.requirements import supported_inputs
from hooked_llava.options.attribution_methods import ATTRIBUTION_METHODS, AttributionMethod, Pooling
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.readout.answer_tokens import AnswerLike
from hooked_llava.results.image_axes import ImageAxes, take
from hooked_llava.results.provenance import provenance
from hooked_llava.sae.attribution_runs import AttributionRuns, sides_of

_MEASURED = 100
"""Features at tokens that are measured exactly by default."""


def feature_attribution(
    model: HookedLLaVA,
    sae: Autoencoder,
    inputs: InputsLike,
    answer: AnswerLike | None = None,
    baseline: AnswerLike | None = None,
    *,
    hook: str | tuple[str, int] | None = None,
    method: AttributionMethod = "gradient",
    top: int | None = None,
    reference: InputsLike | None = None,
    steps: int = 16,
    any_model: bool = False,
) -> xr.Dataset:
    """How much each feature at each token of a prompt argues for an answer, in nats.

    Args:
        model: the model.
        sae: an autoencoder of a hook in the language tower.
        inputs: one prompt.
        answer: text (of one or several tokens), a token id, or ids; by default the model's own next token.
        baseline: another answer. With it d = log P(answer) - log P(baseline), of single tokens the difference of their
            logits; without it d = log P(answer).
        hook: any name of the hook; by default the one that the autoencoder was trained on.
        method: one of the names in `hooked_llava.options.attribution_methods.ATTRIBUTION_METHODS`.
        top: how many entries are kept, the largest by size; all by default. For "exact", how many are measured: 100.
        reference: a prompt of the same length, whose features are what "off" means; by default 0.
        steps: points of the path for "integrated".
        any_model: take an autoencoder that was trained on a model of another name.

    Returns an entry for each feature that is active at a token of the prompt, from the largest attribution by size to the
    smallest: `attribution`, `activation`, and with "integrated" and "exact" also `gradient`, with the coordinates `position`,
    `label`, `sae_feature` and `in_image`. Attributes: `preference`, which is d, and `rank_correlation` of the attribution
    with the gradient's. Raises `InputError` for several prompts, other hooks, and as `read_answer`.

    >>> from hooked_llava.sae import SAEConfig, SparseAutoencoder
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=256, k=8, hook="blocks.2.hook_resid_post")).reset(seed=0)
    >>> feature_attribution(model, sae, model.prepare("Who made the star?"), "Red", "Blue", top=20).sizes["entry"]
    20
    """
    one_of(method, ATTRIBUTION_METHODS, "method")
    prompt = supported_inputs("feature_attribution", model, inputs).padded_left()
    name = place_of_sae(sae, hook, model.hooks_table, None if any_model else model.config.model_name)
    at = _checked_hook(model, name)
    whole_number(steps, "steps", least=1)
    top = _MEASURED if top is None and method == "exact" else top
    if top is not None:
        whole_number(top, "top", least=1, expected="at least 1, or None")
    off = None if reference is None else _reference(model, reference, prompt)
    how = {"hook": name, "method": method, "reference": None if off is None else off.prompts}
    with provenance("feature_attribution", model, prompt, n_forward=0, **how) as made:
        sides, n_forward = sides_of(model, prompt, answer, baseline)
        attribution = AttributionRuns(model, sae, at, prompt, sides, off, n_forward)
        entries, values = attribution.measured(method, steps, top)
        return attribution.labelled(entries, values, made.attrs(**attribution.about()))


def _reference(model: HookedLLaVA, reference: InputsLike, prompt: Inputs) -> Inputs:
    off = model.as_inputs(reference).single("reference=")
    if off.shape != prompt.shape:
        raise InputError(f"reference has {off.shape[1]} positions and the prompt {prompt.shape[1]}; expected as many.")
    return off


def pooled(attribution: xr.Dataset, by: Pooling = "mean") -> xr.Dataset:
    """Each feature's attribution over the image's and over the text's tokens, `image` and `text` [sae_feature].

    A token where a feature is not active counts 0. Features are ordered by the two together, from the largest by size. `by` is
    "mean", "max" or "sum". Of an attribution that was cut by `top`, only what is left is pooled.

    >>> dims = {"attribution": ("entry", [2.0, -1.0]), "sae_feature": ("entry", [7, 7]), "in_image": ("entry", [True, True])}
    >>> found = pooled(xr.Dataset(dims, attrs={"n_image": 4, "n_text": 3}).set_coords(["sae_feature", "in_image"]))
    >>> found.image.values.tolist(), found.text.values.tolist()
    ([0.25], [0.0])
    """
    one_of(by, get_args(Pooling), "by")
    features, index = np.unique(attribution.sae_feature.values, return_inverse=True)
    found = {}
    for group, wanted in (("image", True), ("text", False)):
        inside = attribution.in_image.values == wanted
        own, values, n = index[inside], attribution.attribution.values[inside], attribution.attrs[f"n_{group}"]
        totals = np.bincount(own, values, len(features))
        if by == "mean":
            totals = totals / max(1, n)
        elif by == "max":
            totals = np.full(len(features), -np.inf)
            np.maximum.at(totals, own, values)
            inactive = np.bincount(own, minlength=len(features)) < max(1, n)
            totals[inactive] = np.maximum(totals[inactive], 0.0)
        found[group] = ("sae_feature", totals)
    result = xr.Dataset(found, coords={"sae_feature": features}, attrs=attribution.attrs | {"pooled_by": by})
    order = np.argsort(-abs(result.image.values + result.text.values), kind="stable")
    return result.isel(sae_feature=order)


def feature_maps(
    inputs: Inputs, attribution: xr.Dataset, features: Sequence[int] | np.ndarray | int = 6
) -> xr.DataArray:
    """Attributions of some features by place in the prompt's images, [sae_feature, image, patch_row, patch_col].

    For images of several grids [sae_feature, image, feature], see `results.image_axes`. `features` are numbers of features, or
    how many: those with the largest sum over the image by size. Raises `InputError` without an image.

    >>> from hooked_llava.sae import SAEConfig, SparseAutoencoder
    >>> from hooked_llava.toy.images import image_path
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> inputs = model.prepare("What color is the star?", images=image_path("demo"))
    >>> sae = SparseAutoencoder(SAEConfig(d_in=128, d_sae=256, k=8, hook="hook_embed")).reset(seed=0)
    >>> feature_maps(inputs, feature_attribution(model, sae, inputs, "Orange"), 2).shape
    (2, 1, 8, 8)
    """
    inputs = inputs.single("feature_maps")
    axes = ImageAxes.of(inputs)
    if isinstance(features, (Sequence, np.ndarray)):
        chosen = [whole_number(one, "features", least=0) for one in whole_numbers(features, "features")]
    else:
        whole_number(features, "features", least=1)
        of_image = pooled(attribution, "sum").image
        chosen = of_image.sae_feature.values[np.argsort(-abs(of_image.values), kind="stable")][:features].tolist()
    if not chosen:
        raise InputError("No feature to draw: features=[], or none is active at a token of the prompt.")
    by_position = np.zeros((len(chosen), inputs.shape[1]))
    for row, feature in enumerate(chosen):
        own = attribution.sae_feature.values == feature
        np.add.at(by_position[row], attribution.position.values[own], attribution.attribution.values[own])
    maps = take(torch.from_numpy(by_position), axes.positions(inputs.token_map).flatten())
    values = maps.reshape(len(chosen), inputs.n_images, -1).numpy()
    coords = {"sae_feature": chosen}
    return axes.labelled(
        values, ("sae_feature", "image"), coords=coords, name="feature_attribution", attrs=attribution.attrs
    )


def _checked_hook(model: HookedLLaVA, name: str) -> Hook:
    at = model.hooks_table[name]
    if at.on_image_side or at.position_axis != 1 or not -1 <= at.stage < model.cfg.n_layers:
        raise InputError(
            f"feature_attribution works on vectors in the language tower's blocks, not on {name!r}; for what comes from the "
            "image use an autoencoder of hook_embed."
        )
    then = model.hook_dict[name].then
    if isinstance(then, AttachedSAE) and not then.keep_error:
        raise InputError(
            f"hook={name!r} has an autoencoder attached that replaces the activation (keep_error=False), so what its features "
            "write is encoded again; leave its block first, or attach it with its error."
        )
    return at
