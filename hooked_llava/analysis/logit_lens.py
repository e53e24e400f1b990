"""What would the model say if it stopped here?

Logit lens (nostalgebraist 2020): the residual stream between two blocks is read with the final norm and the unembedding, which
were trained on the final residual stream only: in early layers the words show what the vectors resemble, not what the model
believes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.errors import InputError, a_type
from hooked_llava.machine.devices import to_device
from hooked_llava.prompt.where import PositionsLike, resolve_positions
from hooked_llava.readout.answer_tokens import one_answer, only_token
from hooked_llava.readout.lens import Lens, top_tokens
from hooked_llava.readout.lens import lens as read_by
from hooked_llava.readout.tuned_lens import TunedLens
from hooked_llava.readout.vocabulary import check_k
from hooked_llava.results.arrays import position_coords, resid_coords, stack, word_variables
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.prompt.prepare import InputsLike
    from hooked_llava.prompt.token_map import TokenMap


def logit_lens(
    model: HookedLLaVA,
    inputs: InputsLike,
    *,
    positions: PositionsLike = "last",
    norm: Lens | Literal["tuned"] = "final",
    answers: Sequence[str | int] | None = None,
    k: int = 5,
    hook: str | tuple[Any, ...] | None = None,
    lens: TunedLens | None = None,
) -> xr.Dataset:
    """Words in the residual stream by layer: `token`, `token_id`, `probability`, each [layer, position, rank].

    Layer l is the residual stream entering block l, and layer n_layers the final one, where norm="final" gives the model's own
    probabilities. With `answers` (words or ids) also `answer_probability` [layer, position, answer].

    Args:
        model: the model.
        inputs: one prompt, anything `model.as_inputs` takes; several give a first axis prompt.
        positions: span name, number, slice or list; image positions too.
        norm: "final" applies the final norm to the residual stream, "frozen" the scale that the final one has at the same
            position (so that a component's reading is its part of the logits; a LayerNorm's bias is in readings of the
            whole residual stream only), "none" reads it raw (Zhang et al.
            2411.18620), "tuned" as "final" after the translator of `lens`.
        answers: tokens whose probability is wanted in every layer: ids, or words that are one token after the prompt.
        k: number of words kept.
        hook: short name of another hook to read, in all its layers: "attn_out", "mlp_out", "result" (an axis head
            follows position), "hook_image_embed" at image positions.
        lens: for "tuned", a lens that `train_tuned_lens` made (Belrose et al. 2023).

    Raises `InputError` for "tuned" without a lens that fits the model, for unknown tokens, a k that the vocabulary does not
    have, a position outside the prompt (for image hooks, outside the images), and a hook that holds no vectors of the
    residual stream.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> read = logit_lens(model, model.prepare("Who made the star?"), answers=["red"])
    >>> read.sizes["layer"] == model.cfg.n_layers + 1
    True
    """
    check_k(model, k)
    _check_lens(model, norm, lens, hook)
    prompts = model.as_inputs(inputs)

    def followed(token_map: TokenMap) -> list[tuple[str, int]]:
        found = [one_answer(model, token_map, answer) for answer in answers or ()]
        return [(one.text, only_token(model, one)) for one in found]

    each = prompts.each(followed, prompts.token_maps)  # all are checked before anything is run
    results = prompts.each(lambda one, own: _one_prompt(model, one, positions, norm, own, k, hook, lens), prompts, each)
    return results[0] if len(results) == 1 else stack(results, "prompt")


def _one_prompt(
    model: HookedLLaVA,
    prompt: Inputs,
    positions: PositionsLike,
    norm: Lens | Literal["tuned"],
    answers: list[tuple[str, int]],
    k: int,
    hook: str | tuple[Any, ...] | None,
    tuned: TunedLens | None,
) -> xr.Dataset:
    index = resolve_positions(positions, prompt)[0]
    names = _names(model, prompt, hook)
    extra: dict[str, Any] = {} if hook is None else {"hook": hook}
    with provenance("logit_lens", model, prompt, n_forward=1, norm=norm, positions=positions, **extra) as made:
        reading: Lens = "final" if norm == "tuned" else norm
        vectors, scale = _vectors(model, prompt, index, names, reading)  # (layer, position, [head], d_model)
        if tuned is not None:
            vectors = torch.stack([tuned.translate(own, layer) for layer, own in enumerate(vectors)])
        whole = hook is None or model.hooks_table[names[0]].site.startswith("hook_resid_")
        how: dict[str, Any] = {"norm": reading, "scale": scale, "bias": whole}
        probability, ids = top_tokens(model, vectors, k, **how)
        dims = ("layer", "position", "head")[: vectors.ndim - 1]
        result = xr.Dataset(
            word_variables(model, probability, ids, (*dims, "rank"), "probability"),
            coords={**_layers(model, names, hook), **position_coords(prompt.token_map, index.tolist())},
        )
        if answers:
            followed = to_device([token for _, token in answers], vectors.device)
            found = torch.stack([read_by(model, layer, **how).float().softmax(-1)[..., followed] for layer in vectors])
            result["answer_probability"] = ((*dims, "answer"), found.cpu().numpy())
            result = result.assign_coords(answer=[text for text, _ in answers])
        if hook is not None and model.hooks_table[names[0]].layer is None:
            result = result.isel(layer=0, drop=True)
        return result.assign_attrs(made.attrs())


def _check_lens(model: HookedLLaVA, norm: str, lens: TunedLens | None, hook: str | tuple[Any, ...] | None) -> None:
    """Raise `InputError` unless a tuned lens is given where it is used, which is in the residual stream, and fits the model."""
    if (norm == "tuned") != (lens is not None):
        given = "no lens" if lens is None else f"lens={lens!r}"
        raise InputError(f"norm={norm!r} and {given}; a lens that train_tuned_lens made goes with norm='tuned'.")
    if lens is not None:
        if not isinstance(lens, TunedLens):
            raise InputError(f"lens is {a_type(lens)}; expected a TunedLens, of train_tuned_lens or TunedLens.load.")
        lens.check(model)
        if hook is not None:
            raise InputError(f"norm='tuned' reads what enters the layers; got hook={hook!r}. Leave hook= out.")


def _names(model: HookedLLaVA, prompt: Inputs, hook: str | tuple[Any, ...] | None) -> list[str]:
    """Full names of what is read, layer by layer."""
    table = model.hooks_table
    if hook is None:
        return [*table.resolve("resid_pre"), table.name("resid_post", -1)]
    names = table.resolve(hook, with_image=prompt.pixel_values is not None)
    first = table[names[0]]
    in_stream = first.tower == "language" or first.name == "projector.hook_out"
    if not in_stream or first.axes[-1] != "d_model" or len({table[name].spec for name in names}) != 1:
        raise InputError(
            f"hook={hook!r} is not one kind of vector of the language model's residual stream; expected for "
            "example 'attn_out', 'mlp_out', 'result' or 'hook_image_embed'."
        )
    return names


def _layers(model: HookedLLaVA, names: list[str], hook: str | tuple[Any, ...] | None) -> dict[str, Any]:
    """Coordinates of the axis layer: streams have names, another hook's layers their numbers."""
    if hook is None:
        return resid_coords(len(names) - 1)
    return {"layer": [model.hooks_table[name].layer or 0 for name in names]}


def _vectors(
    model: HookedLLaVA, prompt: Inputs, index: Int[Tensor, " position"], names: list[str], norm: Lens
) -> tuple[Float[Tensor, "layer position *head d_model"], Float[Tensor, "position *one 1"] | None]:
    """What is read, and the final norm's scale for the frozen lens."""
    end = [model.hooks_table.name("resid_post", -1)] if norm == "frozen" else []
    after_blocks = model.hooks_table[names[-1]].stage == model.cfg.n_layers
    options: dict[str, Any] = {} if after_blocks else {"stop_at_layer": model.cfg.n_layers}  # nothing is unembedded
    _, cache = model.run_with_cache(prompt, names_filter=[*names, *end], positions=index.tolist(), **options)
    if model.hooks_table[names[0]].on_image_side:
        vectors = _at_patches(cache[names[0]], prompt, index)[None]
    else:
        vectors = torch.stack([cache[name][0] for name in names])
    if not end:
        return vectors, None
    scale = model.ln_final.scale_of(cache[end[0]][0])  # (position, 1)
    return vectors, scale.reshape(-1, *[1] * (vectors.ndim - 2))


def _at_patches(
    embeds: Float[Tensor, "image feature d_model"], prompt: Inputs, index: Int[Tensor, " position"]
) -> Float[Tensor, "position d_model"]:
    """Image embeddings by the sequence positions that they take."""
    places = {int(position): i for i, position in enumerate(prompt.token_map["image"])}
    if outside := [p for p in index.tolist() if p not in places]:
        raise InputError(
            f"positions={outside} hold no image embedding; give image positions, as positions='image' does."
        )
    return embeds.flatten(0, 1)[[places[p] for p in index.tolist()]]
