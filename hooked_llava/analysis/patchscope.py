"""What does an activation mean to another prompt, or to another model?

Patchscopes (Ghandeharioun et al. 2024, arXiv 2401.06102, section 3): the residual stream h at (layer l, position i) of a source
prompt, mapped by f, replaces that at (layer l*, position i*) of a target prompt, and a model goes on from there: it is asked
in words, not by its unembedding, what a vector holds; and by a prompt about an image, what a patch looks like to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_llava.checks import as_index, as_indices, whole_number
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import in_batches, to_device
from hooked_llava.model.requirements import require, supported_inputs
from hooked_llava.options.patchscopes import IDENTITY
from hooked_llava.prompt.where import PositionsLike, resolve_positions
from hooked_llava.readout.resid import resid_by_layer, resid_names
from hooked_llava.readout.vocabulary import check_k, decode_text
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.replay import Replay
from hooked_llava.results.arrays import position_coords, resid_coords, to_numpy, word_variables
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.components.hook_point import HookPoint
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.prompt.prepare import InputsLike

Mapping = Callable[[Tensor], Tensor] | tuple[Tensor, Tensor]
"""From the source's residual stream to the target's: a function of [n, d_model], or (weight [d_target, d_source], bias)."""
_AT_ONCE = 32  # rows that generate together


def patchscope(
    model: HookedLLaVA,
    inputs: InputsLike,
    *,
    positions: PositionsLike = "last",
    layers: int | Sequence[int] | None = None,
    target: InputsLike | None = None,
    target_layer: int | None = None,
    target_position: PositionsLike | None = None,
    target_model: HookedLLaVA | None = None,
    mapping: Mapping | None = None,
    max_new_tokens: int = 5,
    k: int = 5,
    batch_size: int = _AT_ONCE,
) -> xr.Dataset:
    """What a target prompt says of each layer and position of a source prompt, whose residual stream is put into it.

    Args:
        model: the model that reads the source.
        inputs: the source, one prompt, anything `model.as_inputs` takes.
        positions: of the source, image positions too: a span, a number, a slice or a list.
        layers: of the source, counted as in `logit_lens`: l is what enters block l, n_layers what leaves the last, which is left
            out by default.
        target: one prompt of the target model; by default the paper's identity prompt, `IDENTITY`.
        target_layer: the layer that the vector enters; by default each its own.
        target_position: one position of the target, "last" by default; in the identity prompt its question mark.
        target_model: another model that reads the vectors; by default the same.
        mapping: what the vectors go through before, such as an `nn.Linear`, or (weight [d_target, d_source], bias [d_target]).
        max_new_tokens: how far each run goes on in words; at 1 nothing but the sweep is run.
        k: number of first tokens kept.
        batch_size: runs that generate at once.

    Returns `text` [layer, position], what is generated; `token`, `token_id` and `probability` [layer, position, rank], the most
    probable first tokens; and `unpatched`, the same tokens' probability in the target as it is, whose text is the attribute
    `unpatched_text`. First tokens cost one forward pass of the source, one of the target, and what the sweep can reach (attribute
    `work`, in passes of the target); texts of several tokens also a pass over the target each (attribute `generated`). Raises
    `InputError` for sizes that do not fit, places from which nothing is read, and words that the tokenizer does not know.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> star, ring = (model.prepare(f"Who made the {shape}?") for shape in ("star", "ring"))
    >>> word, there = star.token_map.find("star"), ring.token_map.find("ring")
    >>> read = patchscope(model, star, positions=word, layers=[0, 5], target=ring, target_position=there)
    >>> read["text"].values[:, 0].tolist(), read.unpatched_text
    (['Clara', 'Alice'], 'Alice')
    """
    reader = model if target_model is None else target_model
    n_words = _Numbers(k, max_new_tokens, batch_size).checked(reader)
    source = supported_inputs("patchscope", model, inputs)
    index = resolve_positions(positions, source)
    chosen = list(range(model.cfg.n_layers)) if layers is None else as_indices(layers, model.cfg.n_layers + 1, "layers")
    place = _Place.of(reader, target, target_layer, target_position, chosen)
    about = {"positions": positions, "layers": chosen, **place.about(reader)}
    with provenance("patchscope", model, source, n_forward=2, **about) as made:
        resid = resid_by_layer(model, source, index)[:, 0]
        vectors = _converter(model, reader, mapping)(torch.cat([resid[layer] for layer in chosen]))  # (run, d_model)
        result = _read(reader, place, vectors, chosen, n_words)
        named = xr.Dataset(coords=resid_coords(model.cfg.n_layers)).sel(layer=chosen).coords
        result = result.assign_coords(named).assign_coords(position_coords(source.token_map, index[0].tolist()))
        return result.assign_attrs(made.attrs(**result.attrs))


@dataclass(frozen=True)
class _Numbers:
    """How many words are read, and at once.

    Attributes:
        k (int): First tokens.
        new (int): Tokens of a text.
        rows (int): Runs that generate at once.
    """

    k: int
    new: int
    rows: int

    def checked(self, reader: HookedLLaVA) -> _Numbers:
        """The same; raises `InputError` for what is none."""
        check_k(reader, self.k)
        for name, n in (("max_new_tokens", self.new), ("batch_size", self.rows)):
            whole_number(n, name, least=1)
        return self


def _read(
    reader: HookedLLaVA, place: _Place, vectors: Float[Tensor, "run d_model"], chosen: Sequence[int], n: _Numbers
) -> xr.Dataset:
    """Texts and first tokens by layer and position, and what they cost; runs are in the order of (layer, position)."""
    shape = len(chosen), len(vectors) // len(chosen)
    entering = [place.layer(layer) for layer in chosen for _ in range(shape[1])]
    found, work = _first_tokens(reader, place, vectors, entering, n.k)
    texts, before = _texts(reader, place, vectors, entering, found, n)
    first, ids, unpatched = (part.unflatten(0, shape) for part in found)
    dims = ("layer", "position")
    return xr.Dataset(
        {
            "text": (dims, np.array(texts, dtype=object).reshape(shape).astype(str)),
            **word_variables(reader, first, ids, (*dims, "rank"), "probability"),
            "unpatched": ((*dims, "rank"), to_numpy(unpatched)),
        },
        coords={"layer": list(chosen)},
        attrs={
            "unpatched_text": before,
            "work": work,
            "runs": len(texts),
            "generated": len(texts) + 1 if n.new > 1 else 0,
        },
    )


@dataclass(frozen=True)
class _Place:
    """Where vectors are put: a position of a target prompt, and a layer of its own or that of the source.

    Attributes:
        prompt (Inputs): The target, one prompt, not padded on the right.
        position (int): Its position.
        at (int | None): The layer that a vector enters; None: the one it comes from.
    """

    prompt: Inputs
    position: int
    at: int | None

    @classmethod
    def of(
        cls,
        reader: HookedLLaVA,
        target: InputsLike | None,
        layer: SupportsIndex | None,
        position: PositionsLike | None,
        chosen: Sequence[int],
    ) -> _Place:
        """The place that is meant; raises `InputError` for one from which the answer reads nothing."""
        prompt = _identity(reader) if target is None else reader.as_inputs(target)
        prompt = prompt.single("patchscope, as target=").padded_left()
        if position is None:
            position = prompt.token_map.find("?").tolist() if target is None else "last"
        where = resolve_positions(position, prompt)[0].tolist()
        if len(where) != 1:
            raise InputError(f"target_position={position!r} names {len(where)} positions of the target; expected one.")
        n_layers = reader.cfg.n_layers
        at = None if layer is None else as_index(layer, n_layers + 1, "target_layer")
        highest = max(chosen) if at is None else at
        if highest > n_layers or (highest == n_layers and where[0] != prompt.token_map["last"][0]):
            raise InputError(
                f"A vector that enters layer {highest} of the target's {n_layers} at position {where[0]} is read by nothing: "
                f"give layers= or target_layer= below {n_layers}, or target_position='last'."
            )
        return cls(prompt, where[0], at)

    def about(self, reader: HookedLLaVA) -> dict[str, Any]:
        """What a result says of it."""
        said = {"target_prompt": " | ".join(self.prompt.prompts or ()), "target_model": reader.config.model_name}
        return said | {"target_layer": self.at, "target_position": self.position}

    def layer(self, own: int) -> int:
        """The layer that a vector from layer `own` enters."""
        return own if self.at is None else self.at


def _identity(reader: HookedLLaVA) -> Inputs:
    """The paper's target prompt; raises `InputError` where the tokenizer does not know its words."""
    require(["identity_prompt"], "patchscope(target=None)", reader)
    return reader.prepare(IDENTITY, template=None)


def _converter(model: HookedLLaVA, reader: HookedLLaVA, mapping: Mapping | None) -> Callable[[Tensor], Tensor]:
    """From one residual stream to the other; raises `InputError` naming the sizes where they do not fit."""
    own, wanted = model.cfg.d_model, reader.cfg.d_model
    sizes = f"the source's residual stream has d_model={own} and the target's d_model={wanted}"
    if mapping is None:
        if own != wanted:
            raise InputError(f"{sizes.capitalize()}; give mapping=, such as an nn.Linear({own}, {wanted}).")
        return lambda vectors: vectors
    if isinstance(mapping, tuple):
        shapes = [tuple(part.shape) for part in mapping]
        if shapes != [(wanted, own), (wanted,)]:
            raise InputError(f"mapping= has shapes {shapes}; expected [({wanted}, {own}), ({wanted},)]: {sizes}.")
        weight, bias = mapping
        return lambda vectors: (
            vectors @ to_device(weight, vectors.device, vectors.dtype).T
            + to_device(bias, vectors.device, vectors.dtype)
        )
    if not callable(mapping):
        raise InputError(f"mapping={mapping!r}; expected a function of vectors, or (weight, bias).")
    try:
        tried = mapping(torch.zeros(1, own, device=model.cfg.device, dtype=model.cfg.dtype))
    except RuntimeError as error:
        raise InputError(
            f"mapping= does not take vectors of shape (1, {own}): {error}. Expected one that does."
        ) from None
    if tuple(tried.shape) != (1, wanted):
        raise InputError(f"mapping= makes {tuple(tried.shape)} of (1, {own}); expected (1, {wanted}): {sizes}.")
    return mapping


def _first_tokens(
    reader: HookedLLaVA, place: _Place, vectors: Float[Tensor, "run d_model"], entering: Sequence[int], k: int
) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """The most probable first tokens of every run [run, k]: probability, ids, probability unpatched; and the work."""
    names, replay = resid_names(reader), Replay(reader, place.prompt)
    runs = [
        [Intervention(names[layer], positions=[place.position], value=vector)]
        for layer, vector in zip(entering, vectors, strict=True)
    ]
    p, ids = replay.run(runs, _Top(k)).unbind(-1)
    unpatched, ids = replay.logits().double().softmax(-1), ids.long()
    return (p, ids, unpatched[ids]), replay.work.forwards


@dataclass(frozen=True)
class _Top:
    """Probabilities and ids of the k most probable tokens, in one tensor: in float64 ids are exact."""

    k: int

    @property
    def own_axes(self) -> tuple[int, ...]:
        """What is read off each row of logits."""
        return self.k, 2

    def __call__(self, logits: Float[Tensor, "*run d_vocab"]) -> Float[Tensor, "*run k 2"]:
        p, ids = logits.double().softmax(-1).topk(self.k, -1)
        return torch.stack([p, ids.double()], -1)


def _texts(
    reader: HookedLLaVA,
    place: _Place,
    vectors: Float[Tensor, "run d_model"],
    entering: Sequence[int],
    found: tuple[Tensor, Tensor, Tensor],
    n: _Numbers,
) -> tuple[list[str], str]:
    """What every run says, and what the target says as it is."""
    if n.new == 1:
        first = reader.generate(place.prompt, 1, return_type="tokens")
        return [decode_text(reader, [one]) for one in found[1][:, 0].tolist()], decode_text(reader, first[0].tolist())
    every = range(len(entering))
    batches = (every[start : start + n.rows] for start in every[:: n.rows])

    def said(rows: range) -> list[str]:
        return _generated(reader, place, vectors[rows.start : rows.stop], entering[rows.start : rows.stop], n.new)

    texts = [text for _, some in in_batches(batches, said) for text in some]
    (before,) = _generated(reader, place, vectors[:0], [], n.new)
    return texts, before


def _generated(
    reader: HookedLLaVA,
    place: _Place,
    vectors: Float[Tensor, "run d_model"],
    entering: Sequence[int],
    max_new_tokens: int,
) -> list[str]:
    """What runs say that generate at once; of none, what the target says as it is."""
    names, at = resid_names(reader), place.position

    def put(rows: list[int]) -> Callable[[Tensor, HookPoint], Tensor]:
        def into(resid: Float[Tensor, "run pos d_model"], hook: HookPoint) -> Tensor:
            index = to_device(rows, resid.device)
            resid[index, at] = to_device(vectors, resid.device, resid.dtype)[index]
            return resid

        return into

    by_layer = {layer: [i for i, own in enumerate(entering) if own == layer] for layer in dict.fromkeys(entering)}
    hooks: list[Any] = [(names[layer], put(rows)) for layer, rows in by_layer.items()]
    how: dict[str, Any] = {"fwd_hooks": hooks, "hook_phase": "prefill"}
    prompts = place.prompt.copies(max(1, len(entering)))
    if reader.processor is None:
        tokens = reader.generate(prompts, max_new_tokens, return_type="tokens", stop_at_eos=False, **how)
        return [decode_text(reader, row) for row in tokens.tolist()]
    said = reader.generate(prompts, max_new_tokens, **how)
    return [said] if isinstance(said, str) else said
