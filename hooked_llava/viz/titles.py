"""What a figure is called, and the line below it that says what it shows: made from the result's attributes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import xarray as xr

from hooked_llava.experiments.edges import edge_change
from hooked_llava.options.directions import DIRECTIONS
from hooked_llava.options.patch_maps import PATCH_MAPS
from hooked_llava.viz.kinds import kind_of
from hooked_llava.viz.style import MUTED, Plot, grow_below

_SAY_LITTLE = ("", "value", "probability")
_OF_LAYERS = ("attention_knockout", "causal_trace", "output_knockout")  # whose windows are of layers
_LONGEST = 60  # letters of a prompt or a token
_PER_INCH = 17.0  # letters of the note


def title_of(result: xr.DataArray | xr.Dataset) -> str:
    """What a result is called: the hook and which way was patched, the logit that was divided, the analysis, or its name.

    >>> title_of(xr.DataArray([1.0], dims="x", attrs={"hook": "resid_pre", "direction": "noise"}))
    'resid_pre, corrupted into the clean run'
    >>> title_of(xr.DataArray([1.0], dims="x", name="head_score", attrs={"target": "Red"}))
    "Head score for 'Red'"
    """
    attrs, name = result.attrs, str(getattr(result, "name", None) or "")
    answer, baseline = attrs.get("answer"), attrs.get("baseline")
    if name == "logit" and answer:
        return f"Direct contribution to the logit of {_word(answer)}" + (
            f" minus that of {_word(baseline)}" if baseline else ""
        )
    if attrs.get("direction") in DIRECTIONS:
        return f"{_patched(result, name)}, {DIRECTIONS[attrs['direction']].title}"
    called = kind_of(result).title if name in _SAY_LITTLE else None
    if _weighted(attrs):
        called = f"Attention {edge_change(attrs['factor'])}"
    if attrs.get("analysis") in ("answer_maps", "patch_importance") and name in PATCH_MAPS:
        called = PATCH_MAPS[name].title
    title = called or (name or "value").replace("_", " ").capitalize()
    target = attrs.get("target")
    return f"{title} for {_word(target)}" if isinstance(target, str) and target else title


def shown_title(result: xr.DataArray | xr.Dataset, title: str | None) -> str:
    """The title that was given, or the result's own where its attributes say what it is."""
    if title is not None:
        return title
    return title_of(result) if "analysis" in result.attrs else ""


def note_of(attrs: Mapping[str, Any]) -> str:
    """What else a figure must say: the metric with its tokens, prompts, positions, heads, the model.

    >>> about = {"metric": "logit_difference", "answer": "Red", "baseline": "Blue", "prompt": "What is it?", "model": "tiny"}
    >>> note_of(about)
    "logit difference, 'Red' minus 'Blue' · “What is it?” · tiny"
    """
    parts = [_metric(attrs), *_prompts(attrs)]
    chosen = {name: attrs[name] for name in ("positions", "heads") if attrs.get(name) not in (None, "each", [], {})}
    parts += [text for name, value in chosen.items() if len(text := f"{name} {_plain(value)}") <= _LONGEST]
    window = attrs.get("window")
    if attrs.get("analysis") in _OF_LAYERS and window not in (None, 1):
        parts.append("all layers at once" if window == "all" else f"windows of {window} layers")
    if _weighted(attrs):
        parts.append(f"edges {edge_change(attrs['factor'])}")
    parts.append(str(attrs.get("corruption") or ""))
    if attrs.get("model"):
        parts.append(str(attrs["model"]))
    return " · ".join(part for part in parts if part)


def add_note(figure: Plot, attrs: Mapping[str, Any], title: str | None = None) -> None:
    """The note below a figure; none for a figure without a title (""), whose surroundings say what it is."""
    note = note_of(attrs) if "analysis" in attrs and title != "" else ""
    if not note:
        return
    lines = textwrap.wrap(note, int(_PER_INCH * figure.get_size_inches()[0]))
    grow_below(figure, 0.14 * len(lines) + 0.12)
    text = "\n".join(lines).replace("$", r"\$")
    look: dict[str, Any] = {"fontsize": 7, "color": MUTED, "linespacing": 1.3, "in_layout": False}
    figure.supxlabel(text, x=0.01, y=0.04 / figure.get_size_inches()[1], ha="left", va="bottom", **look)


def _weighted(attrs: Mapping[str, Any]) -> bool:
    """Whether edges were given another weight, and not blocked."""
    return attrs.get("analysis") == "attention_knockout" and bool(attrs.get("factor"))


def _patched(result: xr.DataArray | xr.Dataset, name: str) -> str:
    """What was patched: the hook as it is written, or senders."""
    attrs = result.attrs
    if "hook" in attrs:
        hook = attrs["hook"]
        return str(hook) if isinstance(hook, str) else " ".join(map(str, hook))
    what = attrs.get("senders") or kind_of(result).title or name or "value"
    return str(what).replace("_", " ").capitalize()


def _metric(attrs: Mapping[str, Any]) -> str:
    """The metric, and what it is of."""
    metric = str(attrs.get("metric") or "").replace("_", " ")
    answer, baseline = attrs.get("answer"), attrs.get("baseline")
    if isinstance(answer, list):
        answer, baseline = "", ""
    of = f"{_word(answer)}" + (f" minus {_word(baseline)}" if baseline else "") if answer else ""
    of = of and (of if metric else f"answer {of}")
    first = " (its first token)" if of and attrs.get("measured") == "first token" and attrs.get("answer_tokens") else ""
    return ", ".join(part for part in (metric, of + first) if part)


def _prompts(attrs: Mapping[str, Any]) -> list[str]:
    """The prompt, and of a pair what differs: the other prompt, or the image."""
    prompt, other = attrs.get("prompt"), attrs.get("corrupted_prompt")
    if not isinstance(prompt, str):
        return [f"{len(prompt)} prompts"] if prompt else []
    shown = [f"“{_short(prompt)}”"]
    if isinstance(other, str) and other != prompt:
        shown = [f"{shown[0]} against “{_short(other)}”"]
    elif other is not None and attrs.get("images") != attrs.get("corrupted_images"):
        shown = [f"{shown[0]} about two images"]
    return shown


def _short(prompt: str) -> str:
    words = " ".join(prompt.replace("<image>", " ").split())
    return words if len(words) <= _LONGEST else words[: _LONGEST - 1] + "…"


def _plain(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(".".join(map(str, v)) if isinstance(v, (list, tuple)) else str(v) for v in value)
    return str(value)


def _word(word: object) -> str:
    text = str(word)
    return repr(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")
