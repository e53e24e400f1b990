"""What does the model say next, and how sure is it?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xarray as xr

from hooked_llava.readout.resid import next_token_logits
from hooked_llava.readout.vocabulary import check_k
from hooked_llava.results.arrays import word_variables
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.prepare import InputsLike


def next_tokens(model: HookedLLaVA, inputs: InputsLike, *, k: int = 10) -> xr.Dataset:
    """The k most probable next tokens after each prompt: `token`, `token_id` and `probability`, each [prompt, rank].

    Raises `InputError` for a k that the vocabulary does not have.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> next_tokens(model, model.prepare("Who made the star?"), k=3).sizes["rank"]
    3
    """
    check_k(model, k)
    prompt = model.as_inputs(inputs)
    with provenance("next_tokens", model, prompt, n_forward=1) as made:
        probability, ids = next_token_logits(model, prompt).float().softmax(-1).topk(k, dim=-1)
        return xr.Dataset(
            word_variables(model, probability, ids, ("prompt", "rank"), "probability"),
            coords={"rank": range(k)},
            attrs=made.attrs(),
        )
