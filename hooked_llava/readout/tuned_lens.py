"""A tuned lens: for each layer an affine map from its residual stream to the final one, before norm and unembedding read it.

Belrose et al. 2023 (arXiv 2303.08112). `hooked_llava.analysis.train_tuned_lens` trains one. A folder holds `config.json` with the
fields of the tuned-lens package and `params.safetensors` with the tensors of its `params.pt`, which is a pickle and is not read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_llava.checks import as_index
from hooked_llava.errors import CheckpointError, InputError
from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.storage import read_json, read_safetensors, write_json, write_safetensors

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

CONFIG, WEIGHTS = "config.json", "params.safetensors"
_PICKLE = "params.pt"
_KIND = "linear_tuned_lens"


def translated(
    vectors: Float[Tensor, "*shape d_model"],
    weight: Float[Tensor, "d_model d_model"],
    bias: Float[Tensor, " d_model"] | None,
) -> Float[Tensor, "*shape d_model"]:
    """h + A h + b, in the vectors' dtype and computed in float32 at least.

    >>> translated(torch.ones(2), torch.eye(2), torch.tensor([1.0, 0.0])).tolist()
    [3.0, 2.0]
    """
    wide = at_least_float32(vectors)
    added = wide @ weight.to(wide.dtype).T
    out = wide + (added if bias is None else added + bias.to(wide.dtype))
    return out.to(vectors.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class TunedLens:
    """An affine translator for each layer: logits = unembed(ln_final(h + A h + b)) for what enters layer l.

    A is what is added to the identity, as in the tuned-lens package: zeros read like the logit lens. What leaves the last layer
    is not translated.

    >>> from hooked_llava import HookedLLaVA
    >>> TunedLens.identity(HookedLLaVA.from_pretrained("tiny-shapes")).weight.shape
    torch.Size([6, 128, 128])

    Attributes:
        weight (Float[Tensor, "layer d_model d_model"]): A of each layer.
        bias (Float[Tensor, "layer d_model"]): b of each layer.
        model_name (str | None): The model that it was trained on.
        training (Mapping[str, Any]): How it was trained, in plain values.
    """

    weight: Float[Tensor, "layer d_model d_model"]
    bias: Float[Tensor, "layer d_model"]
    model_name: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"TunedLens(n_layers={len(self.bias)}, d_model={self.bias.shape[1]}, model_name={self.model_name!r})"

    @classmethod
    def identity(cls, model: HookedLLaVA) -> TunedLens:
        """One that changes nothing: where training starts."""
        shape = (model.cfg.n_layers, model.cfg.d_model)
        weight = at_least_float32(torch.zeros(*shape, shape[1], dtype=model.cfg.dtype, device=model.cfg.device))
        return cls(weight, weight[:, 0].clone(), model.config.model_name)

    def check(self, model: HookedLLaVA) -> None:
        """Raise `InputError` for a model of another depth or width."""
        found, wanted = tuple(self.bias.shape), (model.cfg.n_layers, model.cfg.d_model)
        if found != wanted:
            raise InputError(
                f"lens has {found[0]} layers of width {found[1]} (trained on {self.model_name!r}); this model has {wanted[0]} of "
                f"width {wanted[1]}. Give a lens of this model, as train_tuned_lens makes it."
            )

    def translate(self, vectors: Float[Tensor, "*shape d_model"], layer: int) -> Float[Tensor, "*shape d_model"]:
        """What enters a layer as the final residual stream; layer n_layers is that already. Raises `InputError` for no layer.

        >>> lens = TunedLens(torch.zeros(1, 2, 2), torch.ones(1, 2))
        >>> [lens.translate(torch.zeros(2), layer).tolist() for layer in (0, 1)]
        [[1.0, 1.0], [0.0, 0.0]]
        """
        layer = as_index(layer, len(self.bias) + 1, "layer")
        if layer == len(self.bias):
            return vectors
        return translated(vectors, self.weight[layer].to(vectors.device), self.bias[layer].to(vectors.device))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it to a folder, which is made if it is not there; no file stays half-written.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     TunedLens(torch.zeros(1, 2, 2), torch.ones(1, 2), "mine").save(folder)
        ...     TunedLens.load(folder)
        TunedLens(n_layers=1, d_model=2, model_name='mine')
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        n_layers, d_model = self.bias.shape
        named = {f"{layer}.weight": weight for layer, weight in enumerate(self.weight.unbind())}
        named |= {f"{layer}.bias": bias for layer, bias in enumerate(self.bias.unbind())}
        fields = {
            "base_model_name_or_path": self.model_name,
            "d_model": d_model,
            "num_hidden_layers": n_layers,
            "bias": True,
            "lens_type": _KIND,
            "training": dict(self.training),
        }
        write_safetensors(folder / WEIGHTS, {name: tensor.clone() for name, tensor in named.items()})
        write_json(folder / CONFIG, fields)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: torch.device | str | None = None) -> TunedLens:
        """Read a folder that `save` wrote, or one of the tuned-lens package whose parameters were written as safetensors.

        Raises `CheckpointError` for files that are not there or are damaged, and for another kind of lens.
        """
        folder = Path(folder).expanduser()
        if (folder / _PICKLE).is_file() and not (folder / WEIGHTS).is_file():
            raise CheckpointError(
                f"{folder} holds {_PICKLE}, a pickle, which is never read; expected {WEIGHTS}. Convert it once where you trust "
                f"it: safetensors.torch.save_file(torch.load('{_PICKLE}', weights_only=True), '{WEIGHTS}')."
            )
        fields, tensors = read_json(folder / CONFIG), read_safetensors(folder / WEIGHTS)
        if (kind := fields.get("lens_type", _KIND)) != _KIND:
            raise CheckpointError(f"{folder} holds a lens of kind {kind!r}; expected {_KIND!r}.")
        n_layers, d_model = (fields.get(name, 0) for name in ("num_hidden_layers", "d_model"))
        weights = [tensors.get(f"{layer}.weight") for layer in range(n_layers)]
        biases = [tensors.get(f"{layer}.bias", torch.zeros(d_model)) for layer in range(n_layers)]
        wrong = [
            layer
            for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True))
            if weight is None or weight.shape != (d_model, d_model) or bias.shape != (d_model,)
        ]
        if wrong or not n_layers:
            raise CheckpointError(
                f"{folder / WEIGHTS} lacks translators of {d_model} x {d_model} for the layers {wrong} of {n_layers} that "
                f"{CONFIG} names. Write or download it again."
            )
        weight = torch.stack([w for w in weights if w is not None]).to(device)
        return cls(
            weight, torch.stack(biases).to(device), fields.get("base_model_name_or_path"), fields.get("training") or {}
        )
