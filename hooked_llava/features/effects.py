"""What a feature does: the words that its decoder direction stands for, and what setting it changes in answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, SupportsFloat

import numpy as np
import torch

from hooked_llava.checks import Indices, as_indices
from hooked_llava.errors import InputError
from hooked_llava.model.attached_sae import Autoencoder
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.prompt.question import question_text
from hooked_llava.prompt.where import Where
from hooked_llava.readout.lens import top_tokens
from hooked_llava.readout.vocabulary import decode_tokens
from hooked_llava.results.arrays import to_numpy
from hooked_llava.results.provenance import provenance
from hooked_llava.steering.directions import random_direction
from hooked_llava.steering.steering import Steering, steer

if TYPE_CHECKING:
    import xarray as xr

CONTROL = "random_direction"
"""What steering by a feature is compared with."""


@torch.no_grad()
def written_words(model: HookedLLaVA, sae: Autoencoder, features: Indices, k: int = 5) -> xr.Dataset:
    """The words that features write: each decoder direction through the logit lens, as if it were the whole residual stream.

    Args:
        model: the model whose final norm and unembedding are used.
        sae: the autoencoder, of a hook in or into the residual stream.
        features: which.
        k: how many words each.

    Returns `word` and `probability` [feature, rank]. At an early hook later layers decide what becomes of a direction, and the
    words may say little. Raises `InputError` for features out of range, a width that is not the residual stream's, and a k that
    the vocabulary does not have.

    >>> from hooked_llava.sae.files import load_sae
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> found = written_words(model, load_sae("tiny-shapes"), [7, 9], k=3)
    >>> dict(found.sizes), sorted(found)
    ({'feature': 2, 'rank': 3}, ['probability', 'word'])
    """
    import xarray as xr

    n, width = sae.W_dec.shape
    numbers = as_indices(features, n, "features")
    if width != model.cfg.d_model:
        raise InputError(f"sae writes vectors of {width}, and the residual stream has d_model={model.cfg.d_model}.")
    rows = sae.W_dec[torch.tensor(numbers, device=sae.W_dec.device)].to(model.W_U.device, model.W_U.dtype)
    probabilities, ids = top_tokens(model, rows, k)
    found = {
        "word": (("feature", "rank"), decode_tokens(model, ids)),
        "probability": (("feature", "rank"), to_numpy(probabilities)),
    }
    return xr.Dataset(found, {"feature": numbers}, {"analysis": "written_words", "model": model.cfg.model_name})


@torch.no_grad()
def steered_answers(
    model: HookedLLaVA,
    sae: Autoencoder,
    values: Mapping[int, SupportsFloat],
    inputs: InputsLike,
    *,
    positions: Where = "image",
    max_new_tokens: int = 12,
    seed: int = 0,
    **how: Any,
) -> xr.Dataset:
    """The answers to some questions with each of several features set, one at a time, beside a random direction.

    Args:
        model: the model.
        sae: the autoencoder.
        values: {feature: value}; each is set alone, as `steer` sets it. `store.largest` is a natural value.
        inputs: the questions.
        positions: where the feature is set.
        max_new_tokens: length of an answer at most.
        seed: of the random directions.
        how: further options of `steer`, such as mode.

    Returns the texts `unsteered` [question], and `steered` and `random_direction` [feature, question]; the last adds a random
    direction with the norm of what the feature's value writes. `value` [feature] is the value. Raises `InputError` as `steer`.

    >>> from hooked_llava.sae.files import load_sae
    >>> from hooked_llava.toy.images import image_path
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> prompt = model.prepare("What color is the star?", images=image_path("demo"))
    >>> found = steered_answers(model, load_sae("tiny-shapes"), {106: 1.2}, prompt)
    >>> found.unsteered.item(), found.steered.item()
    ('Orange', 'Red')
    """
    import xarray as xr

    asked = model.as_inputs(inputs)
    if not values:
        raise InputError("values={} sets no feature; expected {feature: value}.")
    numbers = as_indices(list(values), len(sae.W_dec), "feature")
    questions = [question_text(asked[i]) for i in range(len(asked))]
    about = {"positions": positions, "seed": seed, "max_new_tokens": max_new_tokens, **how}

    def answers(*steering: Steering) -> list[str]:
        said = model.generate(asked, max_new_tokens=max_new_tokens, steering=steering)
        return [said.strip()] if isinstance(said, str) else [one.strip() for one in said]

    with provenance("steered_answers", model, asked, n_forward=0, **about) as made:
        texts: dict[str, list[list[str]]] = {"steered": [], CONTROL: []}
        for number, value in zip(numbers, values.values(), strict=True):
            by_feature = steer(model, {number: value}, sae=sae, positions=positions, **how)
            drawn = random_direction(by_feature.written, seed=seed + number)
            at_random = steer(model, drawn, hook=by_feature.hook, positions=positions, mode="add")
            texts["steered"].append(answers(by_feature))
            texts[CONTROL].append(answers(at_random))
        found: dict[str, Any] = {name: (("feature", "question"), rows) for name, rows in texts.items()}
        found["unsteered"] = "question", answers()
        found["value"] = "feature", np.array([float(value) for value in values.values()])
        coords = {"feature": numbers, "question": questions}
        return xr.Dataset(found, coords, made.attrs())
