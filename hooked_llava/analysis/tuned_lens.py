"""What does each layer already know of the answer, read in its own coordinates?

The logit lens reads every layer with the final norm and the unembedding, which were trained on the final residual stream. The
tuned lens (Belrose et al. 2023, arXiv 2303.08112) first maps what enters a layer to the final residual stream by an affine
translator, trained so that the words that are read are those that the model will say. It shows what can be predicted from a
layer, not what the model uses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_llava.checks import finite_number, whole_number
from hooked_llava.datasets.forwards import ModelSource, source_of
from hooked_llava.datasets.prompts import Progress
from hooked_llava.readout.lens import Lens, lens, positions_at_once
from hooked_llava.readout.metrics import kl_divergence
from hooked_llava.readout.resid import resid_names
from hooked_llava.readout.tuned_lens import TunedLens, translated
from hooked_llava.replay.progress import progress_bar
from hooked_llava.results.arrays import resid_coords, to_numpy
from hooked_llava.results.provenance import Provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

_UNTUNED: tuple[Lens, ...] = ("none", "final")


def train_tuned_lens(
    model: HookedLLaVA,
    data: Any,
    *,
    tokens: str = "text",
    steps: int = 250,
    lr: float = 1e-3,
    weight_decay: float = 1e-3,
    prompts_per_forward: int = 8,
    seed: int = 0,
    images: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **options: Any,
) -> TunedLens:
    """A translator for each layer, trained to read from it what the model will say: KL(final || lens) of 2303.08112.

    Each step is one forward pass over `prompts_per_forward` prompts, for all layers at once. Translators start as the identity;
    the model's weights stay as they are. Adam with a linearly falling rate, and a decay of the weights towards the identity.

    Args:
        model: the model.
        data: prompts, as `hooked_llava.sae.activation_stream` takes them: rows of a table (`StudyRow`), a DataFrame, pairs
            (image, question), or `Inputs`; read again until all steps are done, in an order that the seed decides.
        tokens: span whose positions are read; "all" for every position, patches of images included.
        steps: forward passes.
        lr: learning rate of the first step.
        weight_decay: how fast the translators shrink, as AdamW has it.
        prompts_per_forward: prompts in one step.
        seed: of the order of the prompts.
        images: folder of the images that the data name.
        progress: show a progress bar on anything longer than two seconds.
        options: go to `model.prepare`.

    The lens says in `training` how it was made, with `kl`: the divergence in nats of each layer, averaged over the last
    tenth of the steps. Raises `InputError` for numbers out of range, and for data of no known kind or read only once.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> tuned = train_tuned_lens(model, [(None, "Who made the star?")], steps=20)
    >>> tuned.training["n_forward"], len(tuned.training["kl"]) == model.cfg.n_layers
    (20, True)
    """
    whole_number(steps, "steps", least=1)
    lr, weight_decay = finite_number(lr, "lr", least=0.0), finite_number(weight_decay, "weight_decay", least=0.0)
    source = _source(model, data, tokens, prompts_per_forward, images, options, seed=seed, epochs=None)
    about: dict[str, Any] = {
        "lr": lr,
        "weight_decay": weight_decay,
        "prompts_per_forward": prompts_per_forward,
        "seed": seed,
    }
    made = Provenance.of("train_tuned_lens", model, "", n_forward=steps, tokens=tokens, **about)
    start = TunedLens.identity(model)
    parts = zip(start.weight, start.bias, strict=True)
    layers = [tuple(part.clone().requires_grad_() for part in both) for both in parts]
    kl = _train(model, layers, source, steps, lr, weight_decay, progress=progress)
    training = made.attrs(kl=[round(float(one), 6) for one in kl[-max(1, steps // 10) :].mean(0)])
    training.pop("prompt")
    weight, bias = (torch.stack([part.detach() for part in parts]) for parts in zip(*layers, strict=True))
    return TunedLens(weight, bias, model.config.model_name, training)


def lens_kl(
    model: HookedLLaVA,
    data: Any,
    *,
    lens: TunedLens | None = None,
    tokens: str = "text",
    prompts_per_forward: int = 8,
    images: str | os.PathLike[str] | None = None,
    **options: Any,
) -> xr.DataArray:
    """How far what a lens reads in each layer is from what the model says: KL(final || lens) in nats [norm, layer].

    The mean over all positions of a span in all prompts, in one forward pass for each `prompts_per_forward` prompts. Layer l is
    the residual stream entering block l, n_layers the final one; there norm="final" and "tuned" are the model itself.

    Args:
        model: the model.
        data: as for `train_tuned_lens`; others than those that the lens was trained on.
        lens: a tuned lens, read as norm="tuned" beside "none" and "final" of `logit_lens`.
        tokens: span whose positions are read; "all" for every position.
        prompts_per_forward: prompts in one forward pass.
        images: folder of the images that the data name.
        options: go to `model.prepare`.

    Raises `InputError` for a lens of another model's shape, and for data of no known kind.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> far = lens_kl(model, [(None, "Who made the star?")], lens=TunedLens.identity(model))
    >>> far.dims, bool((far.sel(norm="tuned") == far.sel(norm="final")).all())
    (('norm', 'layer'), True)
    """
    if lens is not None:
        lens.check(model)
    source = _source(model, data, tokens, prompts_per_forward, images, options, seed=0, epochs=1)
    norms = [*_UNTUNED, *(["tuned"] if lens is not None else [])]
    made = Provenance.of("lens_kl", model, "", tokens=tokens)
    total, n_positions, n_forward = 0.0, 0, 0
    with torch.no_grad(), closing(source.chunks(Progress(0, 0), shuffled=False)) as chunks:
        for chunk in chunks:
            resid = [chunk.rows[name] for name in source.hooks]
            total = total + _divergences(model, resid, lens)
            n_positions, n_forward = n_positions + len(resid[0]), n_forward + 1
    values = np.asarray(total)[: len(norms)] / max(n_positions, 1)
    coords = {"norm": norms, **resid_coords(model.cfg.n_layers)}
    about = made.attrs(n_forward=n_forward, n_positions=n_positions, units="nats")
    about.pop("prompt")
    return xr.DataArray(values, coords, dims=("norm", "layer"), name="kl", attrs=about)


def _source(
    model: HookedLLaVA,
    data: Any,
    tokens: str,
    prompts_per_forward: int,
    images: str | os.PathLike[str] | None,
    options: dict[str, Any],
    *,
    seed: int,
    epochs: int | None,
) -> ModelSource:
    """What enters every layer and what leaves the last, of the prompts of the data."""
    how: dict[str, Any] = {"prompts_per_forward": prompts_per_forward, "images": images, "options": options}
    return source_of(model, resid_names(model), data, tokens=tokens, seed=seed, epochs=epochs, **how)


def _train(
    model: HookedLLaVA,
    layers: Sequence[tuple[Tensor, ...]],
    source: ModelSource,
    steps: int,
    lr: float,
    weight_decay: float,
    *,
    progress: bool,
) -> Float[Tensor, "step layer"]:
    """Train weights and biases in place; returns the divergences before each step."""
    optimizer = torch.optim.AdamW([part for both in layers for part in both], lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    measured = []
    with closing(source.chunks(Progress(0, 0))) as chunks, progress_bar(steps, "step", shown=progress) as bar:
        for _, chunk in zip(range(steps), chunks, strict=False):
            optimizer.zero_grad()
            measured.append(_add_gradients(model, layers, [chunk.rows[name] for name in source.hooks]))
            optimizer.step()
            schedule.step()
            bar.update()
    return torch.stack(measured).cpu()


def _pieces(model: HookedLLaVA, resid: Sequence[Float[Tensor, "position d_model"]]) -> Iterator[tuple[Tensor, ...]]:
    """The positions of all layers in pieces whose logits fit into memory."""
    return zip(*(rows.split(positions_at_once(model)) for rows in resid), strict=True)


def _add_gradients(
    model: HookedLLaVA, layers: Sequence[tuple[Tensor, ...]], resid: Sequence[Float[Tensor, "position d_model"]]
) -> Float[Tensor, " layer"]:
    """Add to every translator the gradient of its mean divergence; returns the divergences. The model gets no gradients."""
    found = torch.zeros(len(layers), device=resid[0].device)
    for *vectors, final in _pieces(model, resid):
        divergence, measured = kl_divergence(lens(model, final)), []
        for own, parts in zip(vectors, layers, strict=True):
            with torch.enable_grad():
                kl = divergence(lens(model, translated(own, *parts))).sum() / len(resid[0])
            for part, gradient in zip(parts, torch.autograd.grad(kl, parts), strict=True):
                part.grad = gradient if part.grad is None else part.grad + gradient
            measured.append(kl.detach())
        found += torch.stack(measured)
    return found


def _divergences(
    model: HookedLLaVA, resid: Sequence[Float[Tensor, "position d_model"]], tuned: TunedLens | None
) -> np.ndarray:
    """Divergences [norm, layer] summed over positions; those of "tuned" are 0 without one."""
    found = torch.zeros(len(_UNTUNED) + 1, len(resid), dtype=torch.float64, device=resid[0].device)
    for pieces in _pieces(model, resid):
        divergence = kl_divergence(lens(model, pieces[-1]))
        for layer, vectors in enumerate(pieces):
            read = [lens(model, vectors, norm=norm) for norm in _UNTUNED]
            if tuned is not None:
                read.append(lens(model, tuned.translate(vectors, layer)))
            found[: len(read), layer] += torch.stack([divergence(logits).double().sum() for logits in read])
    return to_numpy(found)
