"""Which components write the answer's logit? (direct logit attribution: Elhage et al. 2021)

The final stream is the sum of what the embedding, the heads and the MLPs added, and the final norm divides it by one
number. So a logit is a sum of one term for each component: its output, divided by that scale, times the norm's weight
and the token's unembedding. What a component does by way of later ones is not in its term.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import xarray as xr
from fancy_einsum import einsum
from jaxtyping import Float
from torch import Tensor

from hooked_llava.caching import resolve_positions
from hooked_llava.errors import InputError
from hooked_llava.readout import token_id, words
from hooked_llava.results import analysis

if TYPE_CHECKING:
    from hooked_llava.cache import LLaVACache
    from hooked_llava.inputs import Inputs
    from hooked_llava.model import HookedLLaVA


def logit_attribution(
    model: HookedLLaVA,
    inputs: Any,
    answer: str | int | None = None,
    baseline: str | int | None = None,
    *,
    by: Literal["component", "head"] = "component",
    position: int | str = "last",
) -> xr.DataArray:
    """Direct contribution, in logits, of every component to the answer's logit (less the baseline's, if given).

    Args:
        model: the model.
        inputs: one prompt, anything `model.as_inputs` takes.
        answer: token that is scored; the model's own next token by default.
        baseline: token whose logit is subtracted.
        by: "component" gives [component] (embed, 0_attn, 0_mlp, ...), which sums to the logit;
            "head" gives [layer, head], which sums to the attention's part of it, less output biases.
        position: where the logit is read.

    The attributes hold `answer`, `baseline` and the total `logit`. Raises `InputError` for several prompts or positions,
    or a word that is not one token.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> parts = logit_attribution(model, model.prepare("Who made the star?"), "red")
    >>> bool(abs(parts.sum() - parts.logit) < 1e-3)
    True
    """
    prompt = model.as_inputs(inputs)
    if len(prompt) != 1:
        raise InputError(f"logit_attribution takes one prompt, got {len(prompt)}; call it once for each.")
    if by not in ("component", "head"):
        raise InputError(f"by={by!r}; expected 'component' or 'head'.")
    where = resolve_positions(position, prompt)[0].tolist()
    if len(where) != 1:
        raise InputError(f"position={position!r} means {len(where)} positions; a logit is read at one.")
    with analysis(model, prompt, n_forward=1, position=where[0]) as made:
        cache = _cache(model, prompt, where, by)
        final = cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"][0, 0]  # (d_model)
        logits = model.unembed(model.ln_final.fused(final)).float()  # (d_vocab)
        answer_id = int(logits.argmax()) if answer is None else token_id(model, answer)
        baseline_id = None if baseline is None else token_id(model, baseline)
        direction = _direction(model, answer_id, baseline_id) / cache["ln_final.hook_scale"][0, 0]  # (d_model)
        total = logits[answer_id] - (0.0 if baseline_id is None else logits[baseline_id])
        attrs = {"logit": float(total), "answer": _word(model, answer_id), "baseline": _word(model, baseline_id)}
        result = _by_component(model, cache, direction) if by == "component" else _by_head(model, cache, direction)
        return result.assign_attrs(made.attrs(**attrs))


def _cache(model: HookedLLaVA, prompt: Inputs, where: list[int], by: str) -> LLaVACache:
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    parts = ["hook_embed", "attn_out", "mlp_out"] if by == "component" else ["z"]
    names = [*parts, last, "ln_final.hook_scale"]
    return model.run_with_cache(prompt, names_filter=names, positions=where)[1]  # type: ignore[return-value]


def _direction(model: HookedLLaVA, answer: int, baseline: int | None) -> Float[Tensor, " d_model"]:
    direction = model.tokens_to_residual_directions(answer).float()
    return direction if baseline is None else direction - model.tokens_to_residual_directions(baseline).float()


def _by_component(model: HookedLLaVA, cache: LLaVACache, direction: Float[Tensor, " d_model"]) -> xr.DataArray:
    outputs, labels = cache.decompose_resid(return_labels=True)  # (component, batch, pos, d_model)
    values = outputs[:, 0, 0].float() @ direction
    labels = [label.removesuffix("_out") for label in labels]
    return xr.DataArray(values.cpu().numpy(), dims="component", coords={"component": labels}, name="logit")


def _by_head(model: HookedLLaVA, cache: LLaVACache, direction: Float[Tensor, " d_model"]) -> xr.DataArray:
    rows = [
        einsum("h d, h d m, m -> h", cache["z", layer][0, 0].float(), model.blocks[layer].attn.W_O.float(), direction)
        for layer in range(model.cfg.n_layers)
    ]
    coords = {"layer": range(model.cfg.n_layers), "head": range(model.cfg.n_heads)}
    return xr.DataArray(torch.stack(rows).cpu().numpy(), dims=("layer", "head"), coords=coords, name="logit")


def _word(model: HookedLLaVA, token: int | None) -> str:
    return "" if token is None else str(words(model, torch.tensor(token)))
