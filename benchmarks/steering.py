"""What steered generation costs, and attribution to features: `python -m benchmarks.steering`.

Generation is steered along a direction at every position and token: in transformers by a plain forward hook on a decoder layer,
here by `generate(steering=...)`. Both give the same tokens (asserted). Attribution is of all features of an autoencoder at all
tokens, after half of the blocks; a ratio of 3 is as long as three forward passes.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks._measure import (
    BASELINE,
    OURS,
    Summary,
    alternate,
    arguments,
    markdown,
    ratio_table,
    start,
    summarise,
    write,
)
from benchmarks._models import POSITIONS, hf_config, random_hf_model, random_prompt, sizes
from benchmarks.generation import hf, ours
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.sae.attribution import feature_attribution
from hooked_llava.sae.autoencoder import SAEConfig, SparseAutoencoder
from hooked_llava.steering.steering import Steering, steer

_EXPANSION, _K = 8, 32
FORWARD, GRADIENT = "one forward pass", "attribution by gradient"


def hf_steered(model: Any, inputs: dict[str, Tensor], layer: int, direction: Tensor, n_tokens: int) -> Tensor:
    """The way without a library: a function on a decoder layer that adds the direction."""

    def add(module: Any, args: Any, output: Any) -> Any:
        return (output[0] + direction, *output[1:]) if isinstance(output, tuple) else output + direction

    handle = model.model.language_model.layers[layer].register_forward_hook(add)
    try:
        return hf(model, inputs, n_tokens)
    finally:
        handle.remove()


def ours_steered(model: HookedLLaVA, prompt: Any, steering: Steering, n_tokens: int) -> Tensor:
    return model.generate(prompt, n_tokens, stop_at_eos=False, return_type="tokens", steering=steering)


def generation(geometry: str, n_tokens: int, repetitions: int) -> dict[str, dict[str, Summary]]:
    """Seconds of generation, steered and not, of both."""
    config = hf_config(geometry)
    theirs = random_hf_model(config)
    model = HookedLLaVA.from_hf(copy.deepcopy(theirs))
    inputs = random_prompt(config, POSITIONS[geometry])
    prompt, layer = model.as_inputs(inputs), model.cfg.n_layers // 2 - 1
    direction = 0.1 * torch.randn(model.cfg.d_model)
    steering = steer(model, direction, hook=("resid_post", layer))
    works = {
        "steered": {
            BASELINE: functools.partial(hf_steered, theirs, inputs, layer, direction),
            OURS: functools.partial(ours_steered, model, prompt, steering),
        },
        "not steered": {
            BASELINE: functools.partial(hf, theirs, inputs),
            OURS: functools.partial(ours, model, prompt),
        },
    }
    for name, contestants in works.items():
        tokens = [work(n_tokens) for work in contestants.values()]
        assert torch.equal(*tokens), f"hooked_llava and Hugging Face generate different tokens, {name}"
    timed = {
        f"{name}/{who}": functools.partial(work, n_tokens) for name, own in works.items() for who, work in own.items()
    }
    seconds = alternate(timed, repetitions)
    return {
        f"{n_tokens} tokens, {name}": summarise({who: seconds[f"{name}/{who}"] for who in own})
        for name, own in works.items()
    }


def attribution(geometry: str, repetitions: int) -> dict[str, Summary]:
    """Seconds of an attribution of all features at all tokens, beside a forward pass."""
    model = HookedLLaVA.from_hf(random_hf_model(hf_config(geometry)))
    prompt = model.as_inputs(random_prompt(hf_config(geometry), POSITIONS[geometry]))
    d, hook = model.cfg.d_model, f"blocks.{model.cfg.n_layers // 2 - 1}.hook_resid_post"
    cfg = SAEConfig(d_in=d, d_sae=_EXPANSION * d, k=min(_K, d), hook=hook)
    sae = SparseAutoencoder(cfg).reset(0).requires_grad_(False)
    works = {
        FORWARD: functools.partial(model, prompt),
        GRADIENT: functools.partial(feature_attribution, model, sae, prompt, 7, 8),
    }
    return summarise(alternate(works, repetitions), FORWARD)


def tables(found: dict[str, Any], geometry: str) -> list[str]:
    """What the documentation shows of one geometry."""
    rows = found["attribution"]
    cells = {name: [f"{row['median_s']:.3g} s", f"{row['ratio']:.2f}"] for name, row in rows.items()}
    return [
        ratio_table(found["rows"], [BASELINE, OURS], f"generation, {geometry}"),
        markdown(["seconds", "forward passes"], cells, f"features, {geometry}"),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens (default 32)")
    options = start(parser, argv)
    n_tokens, measured = (min(options.tokens, 6) if options.quick else options.tokens), {}
    for geometry in options.geometry:
        measured[geometry] = {
            "sizes": sizes(hf_config(geometry), POSITIONS[geometry]),
            "rows": generation(geometry, n_tokens, options.repetitions),
            "attribution": attribution(geometry, options.repetitions),
        }
        print("\n" + "\n\n".join(tables(measured[geometry], geometry)))
    print(f"\nwritten to {write('steering', options, n_tokens=n_tokens, geometries=measured)}")


if __name__ == "__main__":
    main()
