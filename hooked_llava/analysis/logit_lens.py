"""What would the model say if it stopped here? (logit lens: nostalgebraist 2020)

The stream between two blocks is read with the final norm and the unembedding, which were trained on the final stream
only: in early layers the words show what the vectors resemble, not what the model believes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.caching import Positions, resolve_positions
from hooked_llava.errors import InputError
from hooked_llava.readout import Lens, lens, token_id, top_tokens, words
from hooked_llava.results import analysis

if TYPE_CHECKING:
    from hooked_llava.inputs import Inputs
    from hooked_llava.model import HookedLLaVA


def logit_lens(
    model: HookedLLaVA,
    inputs: Any,
    *,
    positions: Positions = "last",
    norm: Lens = "final",
    answers: Sequence[str | int] | None = None,
    k: int = 5,
) -> xr.Dataset:
    """Words in the residual stream by layer: `token`, `token_id`, `probability`, each [layer, position, rank].

    Layer l is the stream entering block l, and layer n_layers the final one, where norm="final" gives the model's own
    probabilities. With `answers` (words or ids) also `answer_probability` [layer, position, answer].

    Args:
        model: the model.
        inputs: one prompt, anything `model.as_inputs` takes.
        positions: span name, number, slice or list; image positions too.
        norm: "final" applies the final norm to the stream, "none" reads it raw (Zhang et al. 2411.18620).
        answers: tokens whose probability is wanted in every layer.
        k: number of words kept.

    Raises `InputError` for several prompts, unknown tokens, or a position outside the prompt.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> read = logit_lens(model, model.prepare("Who made the star?"), answers=["red"])
    >>> read.sizes["layer"] == model.cfg.n_layers + 1
    True
    """
    prompt = model.as_inputs(inputs)
    if len(prompt) != 1:
        raise InputError(f"logit_lens takes one prompt, got {len(prompt)}; call it once for each.")
    answer_ids = [token_id(model, answer) for answer in answers or ()]
    index = resolve_positions(positions, prompt)[0]
    with analysis(model, prompt, n_forward=1, norm=norm) as made:
        streams = _streams(model, prompt, index)  # (layer, position, d_model)
        probability, ids = top_tokens(model, streams, k, norm=norm)
        dims = ("layer", "position", "rank")
        result = xr.Dataset(
            {
                "token": (dims, words(model, ids)),
                "token_id": (dims, ids.cpu().numpy()),
                "probability": (dims, probability.cpu().numpy()),
            },
            coords={
                "layer": range(len(streams)),
                "position": index.tolist(),
                "label": ("position", [prompt.token_map.labels[i] for i in index.tolist()]),
            },
        )
        if answer_ids:
            result["answer_probability"] = (
                ("layer", "position", "answer"),
                torch.stack([_probabilities(model, stream, answer_ids, norm) for stream in streams]).cpu().numpy(),
            )
            result = result.assign_coords(answer=words(model, torch.tensor(answer_ids)))
        return result.assign_attrs(made.attrs())


def _streams(
    model: HookedLLaVA, prompt: Inputs, index: Int[Tensor, " position"]
) -> Float[Tensor, "layer position d_model"]:
    """The stream entering every block and leaving the last."""
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    _, cache = model.run_with_cache(
        prompt, names_filter=["resid_pre", last], positions=index.tolist(), stop_at_layer=model.cfg.n_layers
    )
    return torch.stack([*(cache["resid_pre", layer][0] for layer in range(model.cfg.n_layers)), cache[last][0]])


def _probabilities(
    model: HookedLLaVA, stream: Float[Tensor, "position d_model"], ids: list[int], norm: Lens
) -> Float[Tensor, "position answer"]:
    return lens(model, stream, norm=norm).float().softmax(-1)[:, ids]
