"""Greedy generation after a prompt with an image: `python -m benchmarks.generation`.

Everybody generates the same tokens from the same weights (asserted); no end token ends a row early. The prefill is a
generation of one token; decoding is the rest: each repetition's seconds less the median prefill's. Batches have rows of
different lengths, padded on the left.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks._measure import (
    BASELINE,
    BRIDGE,
    HF_EAGER,
    OURS,
    Work,
    alternate,
    arguments,
    ratio_table,
    start,
    summarise,
    write,
)
from benchmarks._models import (
    POSITIONS,
    hf_config,
    make_bridge,
    random_hf_model,
    random_prompt,
    sizes,
    with_attention,
)
from hooked_llava.model.llava import HookedLLaVA

_PAD_STEP = 3  # row i of a batch is i times this many tokens shorter

Generate = Callable[[int], Tensor]
"""A function of the number of tokens that returns the new ones [batch new_tokens]."""


def hf(model: Any, inputs: dict[str, Tensor], n_tokens: int) -> Tensor:
    tokens = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False)
    return tokens[:, inputs["input_ids"].shape[1] :]


def ours(model: HookedLLaVA, prompt: Any, n_tokens: int) -> Tensor:
    return model.generate(prompt, n_tokens, stop_at_eos=False, return_type="tokens")


def bridge(model: Any, inputs: dict[str, Tensor], n_tokens: int) -> Tensor:
    rest = {name: tensor for name, tensor in inputs.items() if name != "input_ids"}
    options = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    tokens = model.generate(inputs["input_ids"], max_new_tokens=n_tokens, **options, **rest)
    return tokens[:, inputs["input_ids"].shape[1] :]


def models(geometry: str) -> dict[str, Any]:
    """The contestants, each with its own copy of the weights."""
    sdpa = random_hf_model(hf_config(geometry))
    return {
        BASELINE: sdpa,
        HF_EAGER: with_attention(sdpa, "eager"),
        OURS: HookedLLaVA.from_hf(copy.deepcopy(sdpa)),
        BRIDGE: make_bridge(copy.deepcopy(sdpa)),
    }


def generators(models: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Generate]:
    prompt = models[OURS].as_inputs(inputs)
    return {
        BASELINE: functools.partial(hf, models[BASELINE], inputs),
        HF_EAGER: functools.partial(hf, models[HF_EAGER], inputs),
        OURS: functools.partial(ours, models[OURS], prompt),
        BRIDGE: functools.partial(bridge, models[BRIDGE], inputs),
    }


def agreement(generators: dict[str, Generate], n_tokens: int) -> dict[str, bool]:
    """Who generates Hugging Face's tokens; raises AssertionError if hooked_llava does not."""
    expected = generators[BASELINE](n_tokens)
    assert expected.shape[1] == n_tokens, f"Hugging Face stopped after {expected.shape[1]} of {n_tokens} tokens"
    agrees = {name: torch.equal(generate(n_tokens), expected) for name, generate in generators.items()}
    assert agrees[OURS], "hooked_llava and Hugging Face generate different tokens"
    return agrees


def measure(generators: dict[str, Generate], n_tokens: int, repetitions: int) -> dict[str, dict[str, Any]]:
    """Part -> contestant -> medians and ratios."""

    def seconds(n: int) -> dict[str, list[float]]:
        works: dict[str, Work] = {name: functools.partial(generate, n) for name, generate in generators.items()}
        return alternate(works, repetitions)

    whole, prefill = seconds(n_tokens), seconds(1)
    decode = {name: [of - statistics.median(prefill[name]) for of in whole[name]] for name in generators}
    return {
        f"{n_tokens} tokens": summarise(whole),
        "prefill and first token": summarise(prefill),
        f"the {n_tokens - 1} tokens after": summarise(decode),
    }


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, geometries=("medium", "tiny-shapes"))
    parser.add_argument("--tokens", type=int, default=32, help="new tokens (default 32)")
    options = start(parser, argv)
    n_tokens = min(options.tokens, 6) if options.quick else options.tokens
    measured = {}
    for geometry in options.geometry:
        config, made = hf_config(geometry), models(geometry)
        measured[geometry] = {"sizes": sizes(config, POSITIONS[geometry]), "batches": {}}
        for batch in (1, 4):
            inputs = random_prompt(config, POSITIONS[geometry], batch=batch, pad=_PAD_STEP)
            generate = generators(made, inputs)
            agrees = agreement(generate, n_tokens)
            rows = measure(generate, n_tokens, options.repetitions)
            measured[geometry]["batches"][str(batch)] = {"same_tokens": agrees, "rows": rows}
            print(f"\n{ratio_table(rows, list(generate), f'{geometry}, batch {batch}')}")
            differ = [name for name, same in agrees.items() if not same]
            print(f"\nSame tokens: {'all' if not differ else 'all but ' + ', '.join(differ)}")
    print(f"\nwritten to {write('generation', options, n_tokens=n_tokens, geometries=measured)}")


if __name__ == "__main__":
    main()
