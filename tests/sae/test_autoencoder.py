"""A sparse autoencoder's arithmetic, against the formula written out, and attached to a model."""

from __future__ import annotations

import pytest
import torch

from hooked_llava.errors import ConfigError, InputError
from hooked_llava.sae.autoencoder import Features, SAEConfig, SparseAutoencoder

KINDS = ("topk", "batch_topk", "jump_relu", "matryoshka", "relu")


def make_sae(
    kind: str = "topk", *, d_in: int = 6, d_sae: int = 20, k: int | None = 4, seed: int = 0, **more
) -> SparseAutoencoder:
    """Random weights, biases and thresholds, none of them zero."""
    sae = SparseAutoencoder(SAEConfig(d_in=d_in, d_sae=d_sae, kind=kind, k=k, **more)).reset(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for bias in (sae.encoder.bias, sae.b_dec):
            bias.copy_(0.3 * torch.randn(bias.shape, generator=generator))
        if sae.threshold is not None:
            sae.threshold.copy_(0.5 * torch.rand(sae.threshold.shape, generator=generator))
    return sae.requires_grad_(False)


def activations(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def slowly(sae: SparseAutoencoder, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All features and the reconstruction of one vector, feature by feature."""
    acts = torch.tensor(
        [max(float(w @ (x - sae.b_dec) + b), 0.0) for w, b in zip(sae.encoder.weight, sae.encoder.bias, strict=True)]
    )
    if sae.cfg.kind == "topk":
        for weakest in acts.argsort()[: len(acts) - sae.cfg.k].tolist():
            acts[weakest] = 0.0
    elif sae.threshold is not None:
        acts = torch.tensor([float(a) if a > t else 0.0 for a, t in zip(acts, sae.threshold, strict=True)])
    return acts, sae.b_dec + sum(a * row for a, row in zip(acts, sae.W_dec, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_features_and_reconstruction_are_the_formulas(kind):
    sae, x = make_sae(kind), activations(5, 3, 6)
    features = sae.encode(x)
    dense, decoded = sae.dense(features), sae.decode(features)
    for place in ((0, 0), (4, 2), (2, 1)):
        expected, reconstruction = slowly(sae, x[place])
        torch.testing.assert_close(dense[place], expected)
        torch.testing.assert_close(decoded[place], reconstruction)
    torch.testing.assert_close(sae(x), decoded)


def test_no_features_decode_to_the_bias():
    sae = make_sae("relu")
    empty = Features(torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.long))
    torch.testing.assert_close(sae.decode(empty), sae.b_dec.expand(2, -1))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"k.*k=32"):
        SAEConfig(d_in=4, d_sae=8)
    with pytest.raises(InputError, match=r"k=9.*1 to 8"):
        SAEConfig(d_in=4, d_sae=8, k=9)
    with pytest.raises(ConfigError, match=r"groups=\(4, 2\).*d_sae=8"):
        SAEConfig(d_in=4, d_sae=8, k=2, groups=(4, 2))
    with pytest.raises(InputError, match=r"width 5.*d_in=6"):
        make_sae().encode(activations(2, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_no_vectors_decode_to_no_vectors(kind):
    sae = make_sae(kind)
    assert sae(torch.ones(0, 6)).shape == (0, 6)
    torch.testing.assert_close(sae(torch.ones(6)), sae(torch.ones(1, 6))[0])


def test_groups_are_refused_where_they_would_do_nothing():
    with pytest.raises(ConfigError, match=r"groups=\(5, 20\).*topk"):
        make_sae("topk", groups=(5, 20))
