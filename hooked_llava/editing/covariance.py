"""What keys of a layer usually look like: their second moment, summed up prompt by prompt and kept in a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.checks import as_indices, whole_number
from hooked_llava.editing import weight_records
from hooked_llava.editing.request import check_editable
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import in_batches
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.weights_id import WeightsId, check_same_weights, samples
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.prompt.where import resolve_positions
from hooked_llava.storage import read_tensors, write_tensors

_FORMAT = "hooked_llava.key_covariance.v2"
_SAMPLED = "hooked_llava.key_covariance.v1"  # version 0.1: some numbers of each weight in place of hashes


@dataclass(eq=False)
class KeyCovariance:
    """C = mean of k k^T over the positions of many prompts, of one layer's keys (`mlp.hook_post`).

    Attributes:
        layer (int): Whose keys.
        moment (Float[Tensor, "d_mlp d_mlp"]): Their mean outer product, in float64.
        n_keys (int): How many positions were taken.
        damping (float): What is added to the diagonal, in parts of its mean, so that directions never seen do not cost
            nothing.
        positions (str): The span that the positions were taken from.
        weights (WeightsId | Float[Tensor, " sample"] | None): The unedited weights of the model whose keys they are
            (samples of them, from a file of 0.1); None if not known.
        _checked (Float[Tensor, " sample"] | None): Samples of the weights that were found to be those: hashing
            all weights for each of many edits would be slow.
    """

    layer: int
    moment: Float[Tensor, "d_mlp d_mlp"]
    n_keys: int
    damping: float = 1e-3
    positions: str = "text"
    weights: WeightsId | Float[Tensor, " sample"] | None = None
    _checked: Float[Tensor, " sample"] | None = field(default=None, init=False, repr=False)

    def check_model(self, model: HookedLLaVA) -> None:
        """Raises `InputError` if the keys are another model's."""
        n_layers, n_neurons = model.cfg.n_layers, model.config.language.d_mlp
        if self.layer >= n_layers or len(self.moment) != n_neurons:
            raise InputError(
                f"The covariance is of layer {self.layer} with {len(self.moment)} neurons; this model has layers "
                f"0..{n_layers - 1} with {n_neurons}. Make it with this model."
            )
        if self.weights is None:
            return
        originals = weight_records.originals(model)
        sampled = samples(originals)
        if self._checked is None or not torch.equal(sampled, self._checked):
            check_same_weights(originals, self.weights, model_name=model.config.model_name, what="covariance")
            self._checked = sampled

    def correct(self, keys: Float[Tensor, "key d_mlp"]) -> Float[Tensor, "key d_mlp"]:
        """C^-1 k for each key: its direction less what all keys have in common."""
        return torch.cholesky_solve(keys.double().T.to(self.moment.device), self._factor).T.to(keys.device)

    @cached_property
    def _factor(self) -> Tensor:
        size = self.moment.diagonal().mean()
        ridge = self.damping * size * torch.eye(len(self.moment), dtype=self.moment.dtype, device=self.moment.device)
        factor, failed = torch.linalg.cholesky_ex(self.moment + ridge)
        if bool(failed) or not bool(size > 0):
            raise InputError(
                f"The covariance of {self.n_keys} keys is singular with damping={self.damping:g}; take more prompts or "
                "raise damping."
            )
        return factor

    def save(self, path: str | os.PathLike[str], model: HookedLLaVA) -> None:
        """Write it to one safetensors file, with what the unedited model is; raises `InputError` for another model."""
        self.check_model(model)
        made_with = json.dumps(WeightsId.of(weight_records.originals(model)).as_json())
        about = {"layer": self.layer, "n_keys": self.n_keys, "positions": self.positions, "made_with": made_with}
        write_tensors(path, {"moment": self.moment}, {name: str(value) for name, value in about.items()}, _FORMAT)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: HookedLLaVA, *, damping: float = 1e-3) -> KeyCovariance:
        """Read one; raises `CheckpointError` for another file, and `InputError` for another model."""
        unreadable = "is missing, truncated or no safetensors file"
        tensors, about = read_tensors(path, [_FORMAT, _SAMPLED], writer="KeyCovariance.save", unreadable=unreadable)
        sampled = about["format"] == _SAMPLED
        kept = tensors["identity"] if sampled else WeightsId.from_json(json.loads(about["made_with"]))
        moment = tensors["moment"].to(model.cfg.device)
        found = cls(int(about["layer"]), moment, int(about["n_keys"]), damping, about["positions"], kept)
        found.check_model(model)
        return found


@torch.no_grad()
def key_covariance(
    model: HookedLLaVA,
    prompts: Iterable[InputsLike],
    layer: int,
    *,
    positions: str = "text",
    damping: float = 1e-3,
    path: str | os.PathLike[str] | None = None,
) -> KeyCovariance:
    """The second moment of a layer's keys over prompts, one batch after the other; only the sum is held.

    Args:
        model: the model.
        prompts: batches of prompts, each anything `model.as_inputs` takes; a generator is drawn from once.
        layer: whose MLP.
        positions: the span whose positions count: "text", "image", "last", ...
        damping: what `correct` adds to the diagonal, in parts of its mean.
        path: a file to keep it in; if it is there it is read instead, and `prompts` are not run.

    Raises `InputError` for a quantized model, a layer out of range, no prompts, or a file of another model, layer or span.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> key_covariance(model, [model.prepare("Who made the star?")], layer=3, positions="question").n_keys
    5
    """
    check_editable(model)
    layer = as_indices(whole_number(layer, "layer"), model.cfg.n_layers, "layers")[0]
    if path is not None and Path(path).is_file():
        found = KeyCovariance.load(path, model, damping=damping)
        if (found.layer, found.positions) != (layer, positions):
            raise InputError(
                f"{path} is of layer {found.layer} and positions={found.positions!r}, not of layer {layer} and "
                f"positions={positions!r}; give another path."
            )
        return found
    (made,) = key_covariances(model, prompts, [layer], positions=positions, damping=damping)
    if path is not None:
        made.save(path, model)
    return made


@torch.no_grad()
def key_covariances(
    model: HookedLLaVA,
    prompts: Iterable[InputsLike],
    layers: Sequence[int],
    *,
    positions: str = "text",
    damping: float = 1e-3,
) -> list[KeyCovariance]:
    """The second moments of several layers' keys, each prompt run once; other arguments as of `key_covariance`.

    Raises `InputError` for no layers, one out of range, and no prompts.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> [one.layer for one in key_covariances(model, [model.prepare("Who made the star?")], layers=[2, 3])]
    [2, 3]
    """
    chosen = as_indices(layers, model.cfg.n_layers, "layers")
    names = {layer: model.hooks_table.name("mlp.post", layer) for layer in chosen}
    totals, n = dict[int, Tensor](), 0

    def keys_of(inputs: Inputs) -> dict[int, Tensor]:
        how: dict[str, Any] = {"names_filter": list(names.values()), "stop_at_layer": max(chosen) + 1}
        _, cache = model.run_with_cache(inputs, **how)
        return {layer: cache[name] for layer, name in names.items()}

    for inputs, found in in_batches(map(model.as_inputs, prompts), keys_of):
        for row, one in enumerate(inputs):
            where = resolve_positions(positions, one)[0]
            for layer in chosen:
                keys = found[layer][row, where].double()
                totals[layer] = totals.get(layer, 0) + keys.T @ keys
            n += len(where)
    if not totals:
        raise InputError("There are no prompts to take keys from; give at least one.")
    weights = WeightsId.of(weight_records.originals(model))
    return [KeyCovariance(layer, totals[layer] / n, n, damping, positions, weights) for layer in chosen]
