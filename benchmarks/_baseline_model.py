"""Cases of the model itself: hooks, logits, caches, gradients, generation, weights."""

# Cases pass what does not fit too, and know which of several types they get.
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOptionalSubscript=false

from __future__ import annotations

from typing import Any

import torch

from benchmarks._baseline_cases import Made, on, once
from benchmarks._baseline_subjects import ALL, QUICK, SOME, Subject, named, subject

_SMALL = [*named(("direct", "grouped", "biases", "several_layers_full")), "grouped-bfloat16"]


@on(
    named(("seed1", "direct", "grouped", "several_layers_full"), ["float32"]),
    quick=["grouped-float32"],
)
def hooks(s: Subject) -> Made:
    """Names in their order, which of them a filter means, and in which order they fire."""
    model, fired = s.model, {}
    every = model.hooks_table.resolve(lambda name: True)
    for name, prompt in (("image", s.one), ("text", s.text)):
        fired[name] = order = []
        names = model.hooks_table.resolve(lambda name: True, with_image=prompt.pixel_values is not None)
        with model.hooks([(names, lambda x, hook, order=order: order.append(hook.name))]):
            model(prompt)
    filters = (None, "pattern", "blocks.*.hook_resid_post", ("resid_pre", 1), ["z", "vision.*.hook_mlp_out"])
    chosen = [model.hooks_table.resolve(names) for names in filters]
    return {"hook_dict": list(model.hook_dict), "every": every, "fired": fired, "filters": chosen}


@on(named(("seed1", "grouped"), ["float32"]), quick=["grouped-float32"])
def parameters(s: Subject) -> Made:
    """Names, shapes and the views that TransformerLens knows."""
    model = s.model
    views = ("W_E", "W_U", "W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out", "b_U", "b_Q", "b_K", "b_V", "b_O")
    sums = {name: getattr(model, name).double().sum(-1) for name in views}
    products = {"OV": model.OV.AB[0, 0], "QK": model.QK.AB[0, 0]} if s.name.startswith("grouped") else {}
    bias = [model.accumulated_bias(layer) for layer in range(model.cfg.n_layers + 1)]
    return {
        "state": [f"{name} {list(p.shape)}" for name, p in model.state_dict().items()],
        "config": repr(model.config),
        "views": sums | products,
        "bias": bias,
        "directions": model.tokens_to_residual_directions(s.answers[0]),
    }


@on(ALL, quick=QUICK)
def logits(s: Subject) -> Made:
    """Of every kind of prompt; a padded row's are those of the prompt alone."""
    prompts = {"one": s.one, "left": s.batch(), "right": s.batch(padding_side="right"), "text": s.text}
    found = {name: s.model(prompt)[:, -4:] for name, prompt in prompts.items()}
    found |= {f"loss {name}": s.model(prompt, return_type="loss") for name, prompt in prompts.items()}
    found["stream"] = s.model(s.one, stop_at_layer=2)[0, -3:]
    found["entered"] = s.model(s.model(s.one, stop_at_layer=2), start_at_layer=2)[0, -1]
    return found


@on([*named(("direct", "grouped", "several_layers_full")), "seed0-float64"], quick=QUICK)
def two_images(s: Subject) -> Made:
    prompt = s.two_images
    return {
        "prompt": str(prompt),
        "logits": s.model(prompt)[:, -2:],
        "said": s.model.generate(prompt, max_new_tokens=3),
    }


@on(_SMALL, quick=["grouped-float64"])
def every_activation(s: Subject) -> Made:
    """The large ones too, of a padded batch."""
    _, cache = s.model.run_with_cache(s.batch(), names_filter=lambda name: True)
    return {"cache": dict(cache.items())}


@on(named(("seed0", "seed1", "seed2")))
def last_activations(s: Subject) -> Made:
    """Of the last position and the image side's first layers, which keeps the recording small."""
    _, cache = s.model.run_with_cache(s.one, names_filter=lambda name: not name.startswith("vision"), positions="last")
    _, seen = s.model.run_with_cache(s.one, names_filter=["vision.hook_out", "vision.blocks.1.hook_resid_mid"])
    return {"cache": dict(cache.items()), "vision": {name: x[..., ::8] for name, x in seen.items()}}


@on(named(("seed1", "direct", "grouped")), quick=["grouped-float64"])
def cache_methods(s: Subject) -> Made:
    """What `ActivationCache` and the image-side views do with a cache."""
    model = s.model
    _, cache = model.run_with_cache(s.one)
    resid, labels = cache.decompose_resid(layer=-1, return_labels=True)
    heads = cache.stack_head_results(layer=-1, pos_slice=-1)
    stacked = cache.apply_ln_to_stack(resid, layer=-1)
    token = model.to_single_token(s.answers[0])
    return {
        "names": list(cache),
        "labels": labels,
        "parts": resid[:, 0, -1],
        "accumulated": cache.accumulated_resid(layer=-1, incl_mid=True)[:, 0, -1],
        "heads": heads,
        "normed": stacked[:, 0, -1],
        "attributions": cache.logit_attrs(resid, tokens=token)[:, 0, -1],
        "image": cache.image["resid_pre", 1][0, ::4],
        "text": cache.text["resid_pre", 1][0],
        "vision": cache.vision["resid_post", 0][0, ::4],
        "size": model.cache_size(s.one),
        "sizes": {name: list(x.shape) for name, x in cache.items()},
    }


@on(named(("seed1", "grouped", "biases")), quick=["grouped-float64"])
def gradients(s: Subject) -> Made:
    token = s.model.to_single_token(s.answers[0])
    names = ["resid_pre", "z", "projector.hook_out", "vision.hook_embed", "hook_embed"]
    options: dict[str, Any] = {"incl_bwd": True, "metric": lambda logits: logits[0, -1, token], "names_filter": names}
    _, cache = s.model.run_with_cache(s.one, **options)
    return {name: x.flatten()[::7] for name, x in cache.items() if name.endswith("_grad")}


@on(ALL, quick=QUICK)
def generation(s: Subject) -> Made:
    """Greedy and sampled, and what is drawn."""
    model = s.model
    tokens: dict[str, Any] = {"max_new_tokens": 6, "return_type": "tokens", "stop_at_eos": False}
    sampled = {
        "seeded": {"seed": 3, "do_sample": True, "temperature": 1.5},
        "top_k": {"seed": 3, "do_sample": True, "top_k": 5, "temperature": 3.0},
        "top_p": {"seed": 3, "do_sample": True, "top_p": 0.8, "temperature": 3.0},
    }
    quiet = [("blocks.1.hook_mlp_out", lambda x, hook: x * 0)]
    said, cache = model.generate(
        s.one, max_new_tokens=3, return_cache=True, names_filter="resid_post", stop_at_eos=False
    )
    return {
        "one": model.generate(s.one, max_new_tokens=6),
        "batch": model.generate(s.batch(padding_side="right"), max_new_tokens=6),
        "text": model.generate(s.text, max_new_tokens=6),
        "tokens": model.generate(s.batch(), **tokens),
        **{name: model.generate(s.batch(), **tokens, **options) for name, options in sampled.items()},
        "hooked": model.generate(s.one, fwd_hooks=quiet, hook_phase="prefill", **tokens),
        "stopped": model.generate(s.one, max_new_tokens=6, stop_at_eos=False, stop_strings=s.answers),
        "cache": [said, cache["resid_post", 1][0, -4:]],
    }


@on(named(("seed1", "grouped")), quick=["grouped-float64"])
def writing_hooks(s: Subject) -> Made:
    """Functions that change something, and the cache of a run with them."""
    model = s.model
    hooked = [("blocks.0.attn.hook_z", lambda z, hook: z * 0.5), ("hook_image_embed", lambda x, hook: x.flip(1))]
    plain = model.run_with_hooks(s.one, fwd_hooks=hooked)[0, -1]
    with model.hooks(hooked[:1]):
        _, cache = model.run_with_cache(s.one, names_filter="blocks.1.hook_resid_pre")
    return {"logits": plain, "cache": cache["resid_pre", 1][0, -2:], "after": model(s.one)[0, -1]}


@on(["grouped-float64", "biases-float32", "grouped-bfloat16"])
def parity(s: Subject) -> Made:
    """Against transformers: which activations are compared and that they agree, not by how many roundings."""
    from benchmarks._baseline_names import GEOMETRIES, make_hf_model

    kind, _, dtype = s.name.rpartition("-")
    table = s.model.verify(make_hf_model(0, dtype=getattr(torch, dtype), **{**GEOMETRIES[kind], "image_size": 32}))
    return {"ok": table.ok, "hooks": [row.hook for row in table.rows], "rows": [row.ok for row in table.rows]}


@once(quick=True)
def tokens() -> Made:
    """To tokens and back, in TransformerLens's ways."""
    model = subject("grouped-float64").model
    text = "What color is the star?"
    return {
        "tokens": model.to_tokens([text, "Is it red?"]),
        "right": model.to_tokens([text, "Is it red?"], padding_side="right"),
        "strings": model.to_str_tokens(text),
        "text": model.to_string(model.to_tokens(text)[0]),
        "single": model.to_single_token("red"),
    }


@on(SOME)
def memory(s: Subject) -> Made:
    """The most bytes in tensors at once, over what is there before."""
    from benchmarks._baseline_memory import peak
    from benchmarks._baseline_names import Intervention, Replay

    model, prompt = s.model, s.one
    runs = [
        [Intervention(f"blocks.{layer}.hook_resid_pre", positions=[p], zero=True)]
        for layer in range(model.cfg.n_layers)
        for p in range(prompt.shape[1] - 8, prompt.shape[1])
    ]
    return {
        "forward": peak(lambda: model(prompt)),
        "everything": peak(lambda: model.run_with_cache(prompt)),
        "kept run": peak(lambda: Replay(model, prompt)),
        "sweep": peak(lambda: Replay(model, prompt).run(runs)),
        "generation": peak(lambda: model.generate(prompt, max_new_tokens=4)),
    }
