"""A sparse autoencoder: an activation as a sum of few directions out of many (Gao et al. 2406.04093; Zhang et al. 2411.14982)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_llava.checks import one_of, whole_number
from hooked_llava.errors import ConfigError, InputError

Kind: TypeAlias = Literal["topk", "batch_topk", "jump_relu", "matryoshka", "relu"]
"""How features are chosen: the k largest of each vector, or all above a threshold."""
WITH_THRESHOLD: tuple[Kind, ...] = ("batch_topk", "jump_relu", "matryoshka")
"""Kinds that keep a feature where it is above its threshold. BatchTopK and Matryoshka learn theirs while they are trained."""


class Features(NamedTuple):
    """The active features of vectors, without the zeros.

    Attributes:
        values (Float[Tensor, "... active"]): How strongly each feature is active; 0 fills up vectors with fewer.
        indices (Int[Tensor, "... active"]): Which features they are.
    """

    values: Float[Tensor, "... active"]
    indices: Int[Tensor, "... active"]


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """Sizes and kind of a sparse autoencoder, and where its activations come from.

    Attributes:
        d_in (int): Width of the activations.
        d_sae (int): Number of features.
        kind (Kind): How features are chosen.
        k (int | None): Features per vector: exactly so many for "topk", on average for "batch_topk" and "matryoshka".
        hook (str | None): The hook whose activations it was trained on, by its full name.
        model_name (str | None): The model whose activations it was trained on.
        groups (tuple[int, ...]): Widths of the nested autoencoders of "matryoshka", the last of them d_sae.
        training (Mapping[str, Any]): How `train_sae` made it, in plain values, and FVU, L0 and dead share of the last step;
            empty where nothing is known.
    """

    d_in: int
    d_sae: int
    kind: Kind = "topk"
    k: int | None = None
    hook: str | None = None
    model_name: str | None = None
    groups: tuple[int, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        one_of(self.kind, get_args(Kind), "kind", error=ConfigError)
        whole_number(self.d_in, "d_in", least=1)
        whole_number(self.d_sae, "d_sae", least=1)
        if self.k is not None:
            whole_number(self.k, "k", least=1, most=self.d_sae)
        elif self.kind == "topk":
            raise ConfigError('kind="topk" without k; expected how many features each vector keeps, such as k=32.')
        if self.groups and (list(self.groups) != sorted(set(self.groups)) or self.groups[-1] != self.d_sae):
            raise ConfigError(f"groups={self.groups}; expected growing widths that end with d_sae={self.d_sae}.")
        if self.groups and self.kind != "matryoshka":
            raise ConfigError(
                f"groups={self.groups} with kind={self.kind!r}; only 'matryoshka' has groups. Leave them out."
            )


class SparseAutoencoder(nn.Module):
    """features = choose(ReLU(encoder (x - b_dec) + b_enc)); reconstruction = features W_dec + b_dec.

    The decoder's bias is subtracted before encoding, as in sparsify's files and Zhang et al. (2411.14982, section 3).

    >>> sae = SparseAutoencoder(SAEConfig(d_in=4, d_sae=16, k=2)).reset(seed=0)
    >>> features = sae.encode(torch.ones(3, 4))
    >>> features.values.shape, sae.decode(features).shape
    (torch.Size([3, 2]), torch.Size([3, 4]))
    """

    threshold: Float[Tensor, " d_sae"] | None

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder = nn.Linear(cfg.d_in, cfg.d_sae)
        self.W_dec = nn.Parameter(torch.empty(cfg.d_sae, cfg.d_in))
        self.b_dec = nn.Parameter(torch.empty(cfg.d_in))
        threshold = torch.empty(cfg.d_sae) if cfg.kind in WITH_THRESHOLD else None
        self.register_buffer("threshold", threshold)

    @torch.no_grad()
    def reset(self, seed: int) -> SparseAutoencoder:
        """Start values for training: random unit directions, the encoder their transpose, biases and thresholds 0.

        >>> sae = SparseAutoencoder(SAEConfig(d_in=4, d_sae=16, k=2)).reset(seed=0)
        >>> bool(sae.W_dec.norm(dim=1).allclose(torch.ones(16)))
        True
        """
        generator = torch.Generator().manual_seed(seed)
        directions = F.normalize(torch.randn(self.W_dec.shape, generator=generator), dim=1)
        self.W_dec.copy_(directions)
        self.encoder.weight.copy_(directions)
        for start in (self.encoder.bias, self.b_dec, self.threshold):
            if start is not None:
                start.zero_()
        return self

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:
        """Encoder weights, a view (TransformerLens's orientation)."""
        return self.encoder.weight.T

    @property
    def b_enc(self) -> Float[Tensor, " d_sae"]:
        """Encoder bias."""
        return self.encoder.bias

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Every feature's activation before the choice: ReLU(encoder (x - b_dec) + b_enc)."""
        if x.shape[-1] != self.cfg.d_in:
            raise InputError(f"x has width {x.shape[-1]}; this autoencoder takes activations of d_in={self.cfg.d_in}.")
        return self.encoder(x.to(self.b_dec.dtype) - self.b_dec).relu()

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Features:
        """The active features of each vector; raises `InputError` for vectors of another width."""
        return self.choose(self.pre_acts(x))

    def choose(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Features:
        """The features that stay active out of all that could be."""
        if self.cfg.kind == "topk":
            assert self.cfg.k is not None
            return Features(*pre_acts.topk(self.cfg.k, dim=-1, sorted=False))
        acts = pre_acts if self.threshold is None else pre_acts * (pre_acts > self.threshold)
        most = int((acts > 0).sum(-1).max()) if acts.numel() else 0
        return Features(*acts.topk(most, dim=-1, sorted=False))

    def decode(self, features: Features) -> Float[Tensor, "*batch d_in"]:
        """The reconstruction, from the active features alone."""
        values, indices = features
        if not values.shape[-1]:
            return self.b_dec.expand(*values.shape[:-1], -1).clone()
        flat = F.embedding_bag(
            indices.flatten(0, -2) if indices.ndim > 1 else indices[None],
            self.W_dec,
            per_sample_weights=(values.flatten(0, -2) if values.ndim > 1 else values[None]).to(self.W_dec.dtype),
            mode="sum",
        )
        return flat.reshape(*values.shape[:-1], self.cfg.d_in) + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """The reconstruction of each vector."""
        return self.decode(self.encode(x))

    def dense(self, features: Features) -> Float[Tensor, "*batch d_sae"]:
        """All features of each vector, zeros included; large where d_sae is.

        >>> sae = SparseAutoencoder(SAEConfig(d_in=4, d_sae=16, k=2)).reset(seed=0)
        >>> sae.dense(sae.encode(torch.ones(3, 4))).count_nonzero(-1).tolist()
        [2, 2, 2]
        """
        values, indices = features
        return values.new_zeros(*values.shape[:-1], self.cfg.d_sae).scatter(-1, indices, values)
