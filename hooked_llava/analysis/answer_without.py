"""What does the model say without the heads, or the patches, that an analysis puts first?

A ranking says what looks important; taking its first 1, 2, 4, ... away says whether the answer needs them. All removals are
runs of one Replay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from hooked_llava.analysis.maps.occlusion import blank, forwards_of
from hooked_llava.analysis.maps.scores import check_heads
from hooked_llava.model.requirements import supported_inputs
from hooked_llava.readout.answer_tokens import single_token
from hooked_llava.readout.vocabulary import decode_text, decode_tokens
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.replay import Replay
from hooked_llava.results.arrays import to_numpy
from hooked_llava.results.image_axes import ImageAxes
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs

_MOST_HEADS = 16


def answer_without(
    model: HookedLLaVA,
    inputs: Any,
    target: str | int,
    *,
    heads: Sequence[tuple[int, int]] = (),
    patches: xr.DataArray | None = None,
) -> xr.Dataset:
    """What the model says without the first 1, 2, 4, ... of a ranking of heads, and of one of patches.

    Args:
        model: the model.
        inputs: one prompt.
        target: the token that is followed, a word or an id.
        heads: (layer, head) pairs, the most important first; their z becomes 0 at the last position. Up to 16 are removed.
        patches: numbers by patch [image, patch_row, patch_col] (of images of several grids [image, feature]), the most
            important being the largest; what they show becomes the processor's mean color in the image. Up to all of
            them are removed; what is NaN stays.

    Returns a dataset [run]: `probability` of the target, and of the most probable token `token`, `token_id` and
    `token_probability`; coordinates `removed` ("nothing", "heads", "patches"), `n_removed`, and `n_ranked`, of how many.
    The first run removes nothing. Attributes `target` and `target_id`. Raises `InputError` for several prompts and for
    heads that are not there.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> said = answer_without(model, model.prepare("Who made the star?"), "Clara", heads=[(2, 3), (2, 1)])
    >>> said.removed.values.tolist(), said.n_removed.values.tolist()
    (['nothing', 'heads', 'heads'], [0, 1, 2])
    """
    prompt = supported_inputs("answer_without" if patches is None else "answer_without(patches=...)", model, inputs)
    token = single_token(model, prompt.token_map, target)
    ranked = check_heads(heads, model.cfg.n_layers, model.cfg.n_heads) if heads else []
    removals: list[tuple[str, int, int, list[Intervention]]] = [("nothing", 0, 0, [])]
    for n in _sizes(min(len(ranked), _MOST_HEADS)):
        zeros = [Intervention(("z", layer), positions="last", heads=[head], zero=True) for layer, head in ranked[:n]]
        removals.append(("heads", n, len(ranked), zeros))
    order = [] if patches is None else ImageAxes.of(prompt).ranked(patches.transpose("image", ...).values).tolist()
    removals += [("patches", n, len(order), _blanked(model, prompt, order[:n])) for n in _sizes(len(order))]
    about = {"target": decode_text(model, [token]), "target_id": token}
    with provenance("answer_without", model, prompt, n_forward=1, **about) as made:
        replay = Replay(model, prompt)
        p = replay.run([changes for *_, changes in removals]).float().softmax(-1).reshape(len(removals), -1)
        best, ids = p.max(-1)
        made.n_forward = forwards_of(replay)  # its runs included
        names, n_removed, n_ranked, _ = zip(*removals, strict=True)
        return xr.Dataset(
            {
                "probability": ("run", to_numpy(p[:, token])),
                "token": ("run", decode_tokens(model, ids)),
                "token_id": ("run", ids.cpu().numpy()),
                "token_probability": ("run", to_numpy(best)),
            },
            coords={"removed": ("run", list(names)), "n_removed": ("run", list(n_removed))}
            | {"n_ranked": ("run", list(n_ranked))},
            attrs=made.attrs(),
        )


def decisive_removal(said: xr.Dataset, removed: str) -> xr.Dataset | None:
    """The run that removes fewest of "heads" or "patches" and changes what the model says; None if no run does.

    >>> runs = {"token_id": ("run", [7, 7, 3]), "removed": ("run", ["nothing", "heads", "heads"])}
    >>> found = decisive_removal(xr.Dataset(runs | {"n_removed": ("run", [0, 1, 2])}), "heads")
    >>> int(found.n_removed)
    2
    """
    changed = (said.removed == removed) & (said.token_id != said.token_id[0])
    return said.isel(run=int(np.flatnonzero(changed.values)[0])) if changed.any() else None


def leads_from(lens: xr.Dataset, token_id: int) -> int | None:
    """The place along a logit lens from which on a token is the most probable, up to the end; None if it is not at the end.

    >>> lens = xr.Dataset({"token_id": (("layer", "position", "rank"), [[[4]], [[7]], [[7]]])})
    >>> leads_from(lens, 7), leads_from(lens, 4)
    (1, None)
    """
    best = lens.token_id.isel(position=-1, rank=0).values == token_id
    return next((i for i in range(len(best)) if best[i:].all()), None)


def _sizes(n: int) -> list[int]:
    """1, 2, 4, ... and n itself."""
    return sorted({*(2**i for i in range(n.bit_length())), n} - {0})


def _blanked(model: HookedLLaVA, prompt: Inputs, patches: list[list[int]]) -> list[Intervention]:
    """The interventions that take (image, feature) away."""
    images = sorted({image for image, _ in patches})
    each = [blank(model, prompt, [f for i, f in patches if i == image], image=image) for image in images]
    return [change for changes in each for change in changes]
