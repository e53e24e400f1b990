"""The same work in each contestant's own way: forward, reading, writing, caching."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks._measure import Work
from hooked_llava.model.llava import HookedLLaVA

ROWS = (
    "forward, no hooks",
    "one reading hook on resid_post",
    "one writing hook on resid_post",
    "cache resid_post of all layers",
    "cache patterns of all layers",
    "cache everything",
)
"""What is measured; each function below returns one call a row, None where a contestant has no way to do it."""


def read(tensor: Tensor, hook: object) -> None:
    """Look at an activation."""
    tensor.shape  # noqa: B018


def zero_last(tensor: Tensor, hook: object) -> Tensor:
    """Change an activation at the last position."""
    tensor[:, -1] = 0
    return tensor


def hf_works(model: Any, inputs: dict[str, Tensor], *, eager: bool) -> list[Work | None]:
    layer = model.model.language_model.layers[model.config.text_config.num_hidden_layers // 2]

    def hooked(hook: Callable[..., Any]) -> object:
        handle = layer.register_forward_hook(hook)
        try:
            return model(**inputs)
        finally:
            handle.remove()

    patterns = functools.partial(model, **inputs, output_attentions=True)
    everything = functools.partial(model, **inputs, output_attentions=True, output_hidden_states=True)
    return [
        functools.partial(model, **inputs),
        functools.partial(hooked, lambda module, args, output: read(output, module)),
        functools.partial(hooked, lambda module, args, output: zero_last(output.clone(), module)),
        functools.partial(model, **inputs, output_hidden_states=True),
        patterns if eager else None,
        everything if eager else None,
    ]


def our_works(model: HookedLLaVA, inputs: dict[str, Tensor]) -> list[Work | None]:
    prompt = model.as_inputs(inputs)
    name = f"blocks.{model.cfg.n_layers // 2}.hook_resid_post"
    return [
        lambda: model(prompt),
        lambda: model.run_with_hooks(prompt, fwd_hooks=[(name, read)]),
        lambda: model.run_with_hooks(prompt, fwd_hooks=[(name, zero_last)]),
        lambda: model.run_with_cache(prompt, names_filter="resid_post"),
        lambda: model.run_with_cache(prompt, names_filter="pattern"),
        lambda: model.run_with_cache(prompt),
    ]


def bridge_works(bridge: Any, inputs: dict[str, Tensor]) -> list[Work | None]:
    ids, rest = inputs["input_ids"], {name: t for name, t in inputs.items() if name != "input_ids"}
    name = f"blocks.{bridge.cfg.n_layers // 2}.hook_resid_post"

    def cache(ending: str) -> object:
        wanted = lambda name: name.startswith("blocks.") and name.endswith(ending)  # noqa: E731
        return bridge.run_with_cache(ids, names_filter=wanted, **rest)

    return [
        lambda: bridge(ids, **rest),
        lambda: bridge.run_with_hooks(ids, fwd_hooks=[(name, read)], **rest),
        lambda: bridge.run_with_hooks(ids, fwd_hooks=[(name, zero_last)], **rest),
        lambda: cache("hook_resid_post"),
        lambda: cache("attn.hook_pattern"),
        lambda: bridge.run_with_cache(ids, **rest),
    ]


def nnsight_works(hf_model: Any, inputs: dict[str, Tensor]) -> list[Work | None]:
    # An optional package. Its trace reads the source of the with blocks; results leave them in a dict.
    from nnsight import NNsight  # pyright: ignore[reportMissingImports]

    model = NNsight(hf_model)
    layers = model.model.language_model.layers
    middle = len(layers) // 2

    def forward() -> object:
        kept: dict[str, object] = {}
        with model.trace(**inputs):
            kept["output"] = model.output.save()
        return kept

    def reading() -> object:
        kept: dict[str, object] = {}
        with model.trace(**inputs):
            read(layers[middle].output, None)
            kept["output"] = model.output.save()
        return kept

    def writing() -> object:
        kept: dict[str, object] = {}
        with model.trace(**inputs):
            layers[middle].output[:, -1] = 0
            kept["output"] = model.output.save()
        return kept

    def resid_post() -> object:
        kept: dict[object, object] = {}
        with model.trace(**inputs):
            for i, layer in enumerate(layers):
                kept[i] = layer.output.save()
            kept["output"] = model.output.save()
        return kept

    def everything() -> object:
        kept: dict[object, object] = {}
        with model.trace(**inputs):
            for i, layer in enumerate(layers):
                for part in (layer.self_attn, layer.mlp, layer):  # in the order in which they run
                    kept[i, part] = part.output.save()
            kept["output"] = model.output.save()
        return kept

    return [forward, reading, writing, resid_post, None, everything]
