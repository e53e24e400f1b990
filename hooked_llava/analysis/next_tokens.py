"""What does the model say next, and how sure is it?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import xarray as xr

from hooked_llava.readout.resid import next_token_logits
from hooked_llava.readout.vocabulary import check_k, decode_tokens
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA


def next_tokens(model: HookedLLaVA, inputs: Any, *, k: int = 10) -> xr.Dataset:
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
        dims = ("prompt", "rank")
        return xr.Dataset(
            {
                "token": (dims, decode_tokens(model, ids)),
                "token_id": (dims, ids.cpu().numpy()),
                "probability": (dims, probability.cpu().numpy()),
            },
            coords={"rank": range(k)},
            attrs=made.attrs(),
        )
