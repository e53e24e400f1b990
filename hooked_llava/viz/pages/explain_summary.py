"""What was found about an answer, in sentences; the analyses measure it."""

from __future__ import annotations

from typing import Any

import xarray as xr

from hooked_llava.analysis.answer_without import decisive_removal, leads_from
from hooked_llava.analysis.head_scores import top_heads
from hooked_llava.viz.figures.maps import names_along
from hooked_llava.viz.pages.embed import visible
from hooked_llava.viz.style import format_small

_N_PARTS = 2  # of the logit, named
_N_HEADS = 4  # named, of those that were removed


def summary_of(results: dict[str, Any]) -> tuple[str, ...]:
    """How sure the answer is, from where on it leads, what writes it, and what changes it when removed.

    `results` are those of `explain`.
    """
    said, components = results["without"], results["components"]
    answer = _quoted(said.attrs["target"])
    own = said.isel(run=0)
    sentences = [
        _how_sure(answer, results["next_tokens"], own),
        _where_it_leads(answer, results["lens"], int(said.attrs["target_id"])),
        _what_writes_it(answer, components),
        _without_heads(answer, said, results["head_scores"]),
        _without_patches(answer, said) if "patches" in results else "",
    ]
    return tuple(sentence for sentence in sentences if sentence)


def _how_sure(answer: str, tokens: xr.Dataset, own: xr.Dataset) -> str:
    one = tokens.isel(prompt=0)
    words, p = [_quoted(token) for token in one.token.values], one.probability.values
    first = f"The most probable first token is {words[0]} with a probability of {float(p[0]):.3f}"
    if words[0] != answer:
        return f"{first}; {answer}, which this page follows, has {format_small(float(own.probability))}."
    return f"{first}." if len(words) < 2 else f"{first}; the next is {words[1]} with {format_small(float(p[1]))}."


def _where_it_leads(answer: str, lens: xr.Dataset, token: int) -> str:
    place = leads_from(lens, token)
    if place is None:
        return f"In the logit lens {answer} is not the most probable word at the end."
    names = names_along(lens, "layer")
    if place == len(names) - 1:
        return f"In the logit lens {answer} becomes the most probable word only after the last layer."
    return f"In the logit lens {answer} is the most probable word from layer {names[place]} on."


def _what_writes_it(answer: str, components: xr.DataArray) -> str:
    order = components.argsort().values[::-1][:_N_PARTS]
    parts = [f"{_part(str(components.component.values[i]))} ({float(components[i]):+.1f})" for i in order]
    baseline = components.attrs["baseline"]
    of = f"logit of {answer}" + (f" minus that of {_quoted(baseline)}" if baseline else "")
    written = " and ".join(parts)
    return f"{written[0].upper()}{written[1:]} add most to the {of}, which is {float(components.attrs['logit']):.1f}."


def _part(component: str) -> str:
    layer, _, kind = component.partition("_")
    names = {"attn": "the attention", "mlp": "the MLP"}
    return f"{names[kind]} of layer {layer}" if layer.isdecimal() and kind in names else f"the {component}"


def _without_heads(answer: str, said: xr.Dataset, scores: xr.DataArray) -> str:
    found = decisive_removal(said, "heads")
    last = said.isel(run=said.removed.values.tolist().index("heads") + int((said.removed == "heads").sum()) - 1)
    one = last if found is None else found
    n = int(one.n_removed)
    named = [f"{layer}.{head}" for layer, head in top_heads(scores, min(n, _N_HEADS))]
    which = f" ({', '.join(named)}{', ...' if n > len(named) else ''}, as layer.head)"
    heads = f"the head with the largest score{which}" if n == 1 else f"the {n} heads with the largest scores{which}"
    return f"Without {heads} at the last position {_says(answer, one, found is not None)}"


def _without_patches(answer: str, said: xr.Dataset) -> str:
    found = decisive_removal(said, "patches")
    if found is None:
        one = said.isel(run=-1)
        return f"Without the image {_says(answer, one, False)} The answer does not need it."
    n, of = int(found.n_removed), int(found.n_ranked)
    patches = "the first patch" if n == 1 else f"the first {n} patches"
    return f"Without {patches} of the patch map, of {of}, {_says(answer, found, True)}"


def _says(answer: str, one: xr.Dataset, changed: bool) -> str:
    says = f"the first token is {'' if changed else 'still '}{_quoted(one.token.values)}"
    return f"{says}; {answer} has {format_small(float(one.probability))}."


def _quoted(token: object) -> str:
    return f"“{visible(str(token))}”"
