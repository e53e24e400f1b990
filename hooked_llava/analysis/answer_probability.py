"""At which layer does the answer appear, and in which form?

Zhang et al. (arXiv 2411.18620) read the residual stream of the last position after every layer through the unembedding and follow
four words: the answer in lower case and capitalised, and the false option in both. In LLaVA the lower-case word rises
first and the capitalised one, which the model says, overtakes it later: meaning first, then form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from hooked_llava.errors import InputError
from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.model.requirements import supported_inputs
from hooked_llava.readout.answer import FIRST, unwrap_single
from hooked_llava.readout.answer_tokens import first_tokens, per_prompt
from hooked_llava.readout.lens import lens
from hooked_llava.readout.resid import resid_by_layer
from hooked_llava.readout.vocabulary import token_names
from hooked_llava.results.arrays import resid_coords, to_numpy
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.prepare import InputsLike
    from hooked_llava.prompt.token_map import TokenMap

FORMS = ("lower", "capitalised", "false lower", "false capitalised")
"""The answer in lower case and capitalised, and the false option likewise."""
_READINGS = ("none", "final")


def answer_probability(
    model: HookedLLaVA,
    inputs: InputsLike,
    answer: str | Sequence[str] | None = None,
    false_option: str | Sequence[str] | None = None,
) -> xr.DataArray:
    """Probability of the answer's first token by layer, for its two forms and those of the false option.

    Layer l is the residual stream of the last position entering block l, and layer n_layers the final one. The axis `norm` says
    how it is read: "none" softmax(x W_U) as in the paper, "final" softmax(ln_final(x) W_U). (The paper's last point is
    "final", since Hugging Face's last hidden state is normalised already; the rest of its curve is "none". The jump
    between them is one of reading, not of the model.)

    Args:
        model: the model, with a tokenizer.
        inputs: anything `model.as_inputs` takes; a batch gives a first axis prompt.
        answer: one word for all prompts or one for each; the model's own first token by default. Of several tokens (as it
            is cut after this prompt) the first counts.
        false_option: the other option, likewise; "" or None where there is none.

    Returns [norm, layer, form], NaN for forms that a prompt does not have or the tokenizer does not know. Attributes:
    `answer`, `answer_tokens`, the token that is followed of each form, and `measured`, "first token". Raises `InputError` for
    a model without tokenizer and for another number of words than prompts.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> answer_probability(model, model.prepare("Who made the star?"), "red").dims
    ('norm', 'layer', 'form')
    """
    prompts = supported_inputs("answer_probability", model, inputs)
    answers = None if answer is None else per_prompt(answer, len(prompts), "answer")
    options = per_prompt(false_option or "", len(prompts), "false_option")
    with provenance("answer_probability", model, prompts, n_forward=1) as made:
        resid = resid_by_layer(model, prompts, prompts.last[:, None])[:, :, 0]  # (layer, prompt, d_model)
        logits = lens(model, at_least_float32(resid), norm="none"), at_least_float32(lens(model, resid))
        readings = [each.softmax(-1) for each in logits]
        own: list[int | None] = [None] * len(prompts) if answers else readings[1][-1].argmax(-1).tolist()
        answers = answers or [str(model.to_string([token])) for token in own if token is not None]
        tokens = [
            _forms(model, prompt, word, token) + _forms(model, prompt, option)
            for prompt, word, option, token in zip(prompts.token_maps, answers, options, own, strict=True)
        ]
        found = np.full((len(prompts), len(_READINGS), len(resid), len(FORMS)), np.nan)
        for row, forms in enumerate(tokens):
            for column, token in enumerate(forms):
                if token is not None:
                    found[row, :, :, column] = np.stack([to_numpy(reading[:, row, token]) for reading in readings])
        coords = {"norm": list(_READINGS), **resid_coords(len(resid) - 1), "form": list(FORMS)}
        result = xr.DataArray(found, coords, dims=("prompt", "norm", "layer", "form"), name="probability")
        names = [["" if token is None else token_names(model, [token])[0] for token in forms] for forms in tokens]
        attrs = {"answer": unwrap_single(answers), "answer_tokens": unwrap_single(names), "measured": FIRST}
        result = result.assign_attrs(made.attrs(**attrs))
        return result.isel(prompt=0) if len(prompts) == 1 else result.assign_coords(prompt=range(len(prompts)))


def with_released_norm(probability: xr.DataArray) -> xr.DataArray:
    """The same with a further reading norm="released": "none" below and "final" at the last point, as the paper's code has it.

    Takes what `answer_probability` gives, or its means, with an axis layer (or resid). The jump at the last point is an artefact
    of reading: Hugging Face's last hidden state has passed the final norm, and those before have not. Raises `InputError` for
    a result without both readings, or without its last layer.

    >>> readings = xr.DataArray([[0.1, 0.2], [0.3, 0.4]], {"norm": ["none", "final"]}, dims=("norm", "layer"))
    >>> with_released_norm(readings).sel(norm="released").values.tolist()
    [0.1, 0.4]
    """
    along = "resid" if "resid" in probability.dims else "layer"
    given = [str(name) for name in probability["norm"].values] if "norm" in probability.dims else []
    if along not in probability.dims or not set(_READINGS) <= set(given):
        raise InputError(
            f"The released reading joins 'none' and 'final' by layer; got the readings {given} and the axes "
            f"{', '.join(map(str, probability.dims))}. Give what answer_probability returns."
        )
    if "released" in given:
        return probability
    if "layer_name" in probability.coords and str(probability["layer_name"].values[-1]) != "final":
        raise InputError("The last layer of this result is not the final one, whose reading the released code joins.")
    raw, final = (probability.sel(norm=name) for name in _READINGS)
    how: dict[str, Any] = {"coords": "minimal", "compat": "override", "join": "exact"}
    joined = xr.concat(
        [raw.drop_vars("norm").isel({along: slice(None, -1)}), final.drop_vars("norm").isel({along: [-1]})],
        along,
        **how,
    )
    released = joined.expand_dims(norm=["released"]).transpose(*probability.dims)
    return xr.concat([probability, released], "norm", **how)


def probability_summary(probability: xr.DataArray) -> xr.Dataset:
    """Where each variant of the answer appears, as numbers.

    Args:
        probability: what `answer_probability` gives, with any further axes, or `by_kind` of a study (its means are taken).

    Returns, without the axis layer (or resid), by form: `peak`, the largest probability; `peak_layer`; `half_layer`, the
    first layer at which at least half of the peak is reached; `final`, at the last layer. And without the axis form
    `overtakes`: the layer from which on the capitalised answer stays above the one in lower case, NaN where it is not
    above it at the end (or where there is only one of them). Raises `InputError` for a result without layers and forms.

    >>> curves = [[0.0, 0.0], [0.4, 0.1], [0.2, 0.3], [0.0, 0.8]]
    >>> found = probability_summary(xr.DataArray(curves, {"form": ["lower", "capitalised"]}, dims=("layer", "form")))
    >>> found.peak_layer.values.tolist(), found.half_layer.values.tolist(), float(found.overtakes)
    ([1.0, 3.0], [1.0, 3.0], 2.0)
    """
    along = "resid" if "resid" in probability.dims else "layer"
    if not {along, "form"} <= set(probability.dims):
        given = ", ".join(map(str, probability.dims))
        raise InputError(
            f"probability_summary needs the axes layer and form of answer_probability; this result has {given}."
        )
    curves = probability.sel(statistic="mean", drop=True) if "statistic" in probability.dims else probability
    curves = curves.drop_vars("layer_name", errors="ignore").astype(float)
    layers = curves[along] if along in curves.coords else xr.DataArray(np.arange(curves.sizes[along]), dims=along)
    peak = curves.max(along)
    reached = (curves >= peak / 2) & peak.notnull()
    behind = ~(curves.sel(form="capitalised", drop=True) > curves.sel(form="lower", drop=True))
    above_since = layers.where(behind).max(along).fillna(layers[0] - 1) + 1
    return xr.Dataset(
        {
            "peak": peak,
            "peak_layer": layers.where(curves == peak).min(along),
            "half_layer": layers.where(reached).min(along),
            "final": curves.isel({along: -1}, drop=True),
            "overtakes": above_since.where(above_since <= layers[-1]),
        },
        attrs=probability.attrs,
    )


def _forms(model: HookedLLaVA, prompt: TokenMap, word: str, own: int | None = None) -> list[int | None]:
    """First tokens of a word in lower case and with a capital, after the prompt; None for what the tokenizer does not know.

    The model's own token counts as it is where it spells no word: a mark before a digit has neither case.
    """
    if own is not None and not word.strip():
        return [own, own]
    return first_tokens(model, prompt, [word.strip().lower(), word.strip().lower().capitalize()])
