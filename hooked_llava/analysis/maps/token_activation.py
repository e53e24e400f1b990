"""Token activation maps: what image positions say through the unembedding, less what earlier words say there (TAM)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.machine.devices import to_device
from hooked_llava.readout.answer_cache import AnswerCache
from hooked_llava.readout.lens import logits_of_tokens
from hooked_llava.results.image_axes import ImageAxes

_SIDE = 3  # of the filter's window
_NOTHING = 1e-8  # keeps a sum of no relevance from dividing by 0


@torch.no_grad()
def token_activation_maps(cache: AnswerCache) -> Float[Tensor, "prompt image place"]:
    """The token activation map of every prompt's answer (Li et al., arXiv 2506.23270), summed over its tokens.

    a_w(p) = max(logit of w at p, 0) is the activation of word w at position p. For the answer's token c, read where it is
    predicted, and for every earlier text token j with word w_j, of the question and of the answer so far:

        r_j = a_c(p_j)                    relevance; p_j is j's own position, in the answer where j is predicted
        b   = sum_j r_j a_wj / sum_j r_j  what earlier words put on the image (estimated causal inference)
        m   = max(a_c - s b, 0)           s from least squares of a_c on b

    without tokens j that are c itself. Then the rank Gaussian filter, see `rank_gaussian`. As in the released code, all
    images are taken together, but the first word of the question stands for itself there too, newlines count for nothing,
    and maps stay in logits. Of several variants of a token the largest logit counts.
    """
    resid = cache.beside[cache.model.hooks_table.name("resid_post", -1)]
    axes, n_images = ImageAxes.of(cache.inputs), cache.inputs.images_per_prompt[0]
    maps: list[Tensor] = []
    for i, token_map in enumerate(cache.inputs.token_maps):
        cells = [layout.object_features() for layout in token_map.layouts]
        where = np.concatenate([own + start for own, start in zip(cells, token_map.image_starts, strict=True)])
        borders = np.cumsum([len(own) for own in cells])[:-1]
        of_tokens = [np.split(own, borders) for own in _without_context(cache, i, resid[i], where)]
        for image, layout in enumerate(token_map.layouts):
            denoised = np.sum([_denoised(of_token[image], layout) for of_token in of_tokens], axis=0)
            maps.append(torch.from_numpy(denoised).float())
    return to_device(axes.at_images(maps).unflatten(0, (-1, n_images)), resid.device)


def rank_gaussian(values: Float[np.ndarray, "row col"]) -> Float[np.ndarray, "row col"]:
    """Each value replaced by a mean over the ranks of its 3 x 3 neighborhood, weighted around the median.

    Weights are exp(-k^2 / 2 v^2) of the rank's distance k from the middle one, v the standard deviation over the mean of the
    neighborhood: alike values give nearly the median, unlike ones the mean. Borders are mirrored. 0 where the mean is not
    positive; a neighborhood of equal values keeps its value (the released code divides by zero there).

    >>> rank_gaussian(np.full((2, 2), 3.0)).tolist()
    [[3.0, 3.0], [3.0, 3.0]]
    """
    padded = np.pad(values, _SIDE // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (_SIDE, _SIDE)).reshape(*values.shape, -1)
    ranked, mean = np.sort(windows, axis=-1), windows.mean(-1)
    varying = np.where(
        (mean > 0) & (ranked[..., -1] > ranked[..., 0]), windows.std(-1) / np.where(mean > 0, mean, 1), 0
    )
    distance = np.arange(_SIDE**2) - _SIDE**2 // 2
    kernel = np.exp(-(distance**2) / (2 * np.where(varying > 0, varying, np.inf)[..., None] ** 2))
    smooth = (ranked * kernel).sum(-1) / kernel.sum(-1)
    return np.where(mean > 0, smooth, 0.0)


def _without_context(
    cache: AnswerCache, prompt: int, resid: Float[Tensor, "pos d_model"], where: Int[np.ndarray, " place"]
) -> Iterator[Float[np.ndarray, " place"]]:
    """For each of the answer's tokens its activations at the image, less those of earlier words."""
    token_map = cache.inputs.token_maps[prompt]
    asked = token_map.spans.get("question") or token_map.spans.get("rest", ())
    words = [(p, token_map.token_ids[p]) for p in asked]
    for read, variants in zip(cache.logit_positions[prompt].tolist(), cache.target[prompt].tolist(), strict=True):
        target = [token for token in variants if token >= 0]
        said = range(token_map.own.stop, read + 1) if token_map.n_answer else ()
        before = [*words, *((p - 1, token_map.token_ids[p]) for p in said)]
        before = [(position, word) for position, word in before if word not in target]
        at = resid[to_device([*where.tolist(), *(position for position, _ in before)], resid.device)]
        logits = logits_of_tokens(cache.model, at, [*target, *(word for _, word in before)])
        activations = logits.clamp(min=0).double().cpu().numpy()
        own = activations[:, : len(target)].max(-1)
        image, relevance = own[: len(where)], own[len(where) :]
        context = activations[: len(where), len(target) :] @ (relevance / (relevance.sum() + _NOTHING))
        size = float(context @ context)
        yield np.maximum(image - (float(image @ context) / size if size else 0.0) * context, 0)


def _denoised(cells: Float[np.ndarray, " cell"], layout: ImageLayout) -> Float[np.ndarray, " feature"]:
    """Numbers by cell, filtered grid by grid, as numbers by feature."""
    values = np.full(layout.n_features, np.nan)
    values[layout.object_features()] = cells
    grids = {name: own for name, own in layout.unfold(values).items() if own.size}
    return layout.fold({name: rank_gaussian(own) for name, own in grids.items()})
