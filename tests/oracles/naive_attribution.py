"""Attribution the slow and plain way: one full forward pass with a hook function for every feature at every token.

d is written out from log-probabilities, and gradients are finite differences, so that nothing of the code under test is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.oracles.plain import appended


@torch.no_grad()
def preference(
    model: Any, inputs: Any, name: str, change: Any, answer: Sequence[int], baseline: Sequence[int]
) -> float:
    """log P(answer) - log P(baseline), each token read after those before it; `change` edits the prompt's vectors in place."""
    total = 0.0
    for sign, tokens in ((1, answer), (-1, baseline)):
        if not tokens:
            continue
        longer = appended(inputs, torch.tensor([list(tokens)]))

        def hook(tensor: Tensor) -> Tensor:
            out = tensor.clone()
            change(out[0].flatten(1))
            return out

        log_p = model.run_with_hooks(longer, fwd_hooks=[(name, hook)])[0].log_softmax(-1)
        first = inputs.shape[1] - 1
        total += sign * sum(float(log_p[first + i, token]) for i, token in enumerate(tokens))
    return total


@torch.no_grad()
def all_features(sae: Any, x: Tensor) -> Tensor:
    """All features of vectors, one vector at a time."""
    rows = []
    for vector in x:
        acts = (sae.encoder.weight @ (vector - sae.b_dec) + sae.encoder.bias).clamp(min=0)
        acts[acts.argsort()[: len(acts) - sae.cfg.k]] = 0
        rows.append(acts)
    return torch.stack(rows)


def lost_without(
    model: Any, inputs: Any, name: str, sae: Any, place: tuple[int, int], change: float, answer: Any, baseline: Any
) -> float:
    """d less d where `change` of a feature is taken from a token."""
    position, feature = place

    def take(x: Tensor) -> None:
        x[position] -= change * sae.W_dec[feature].to(x)

    full = preference(model, inputs, name, lambda x: None, answer, baseline)
    return full - preference(model, inputs, name, take, answer, baseline)
