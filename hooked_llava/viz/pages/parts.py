"""What several pages show: the model, the prompt token by token, its images, and what the model says to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.spans import image_parts
from hooked_llava.prompt.token_map import TokenMap
from hooked_llava.readout.answer_tokens import without_end
from hooked_llava.viz.figures.model_view import model_view
from hooked_llava.viz.pages.embed import visible

_SPANS = ("last", "question", "image", "system", "rest")


def answered(model: HookedLLaVA, prompt: Inputs, max_new_tokens: int) -> tuple[str, int]:
    """What the model says, greedily decoded, and in how many tokens, each a forward pass."""
    tokens = answered_tokens(model, prompt, max_new_tokens)
    return answer_text(model, tokens), tokens.shape[1]


def answered_tokens(model: HookedLLaVA, prompt: Inputs, max_new_tokens: int) -> Int[Tensor, "1 token"]:
    """The same as tokens, with what ends it."""
    return model.generate(prompt, max_new_tokens=max_new_tokens, return_type="tokens")


def answer_text(model: HookedLLaVA, tokens: Int[Tensor, "1 token"]) -> str:
    """Generated tokens [1, n] as text, without what ends or fills them; without a tokenizer their ids."""
    ids = without_end(model, tokens[0].tolist())
    if model.processor is None:
        return " ".join(f"#{token}" for token in ids)
    return model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def about_model(model: HookedLLaVA) -> dict[str, Any]:
    """The model's name and size, as every template may show them."""
    return {
        "model_name": model.cfg.model_name or "the model",
        "n_layers": model.cfg.n_layers,
        "n_heads": model.cfg.n_heads,
    }


def prompt_tokens(token_map: TokenMap) -> list[dict[str, str]]:
    """The prompt's tokens with the span of each; an image's positions are one entry (one for each grid), padding is left out."""
    spans = token_map.spans
    parts = {part.start: (name, part) for name, part in image_parts(token_map.image_starts, token_map.layouts)}
    entries, position = [], token_map.real.start
    while position < token_map.real.stop:
        span = next((name for name in _SPANS if position in spans.get(name, ())), "rest")
        if span == "image":
            name, part = parts[position]
            entries.append({"text": f"{name}, {len(part)} positions", "span": span})
            position = part.stop
            continue
        entries.append({"text": visible(token_map.labels[position]), "span": span})
        position += 1
    return entries


def shown_images(model: HookedLLaVA, inputs: Inputs) -> list[Image.Image]:
    """A prompt's images as they were given or, where that is not known, as the model sees them.

    Of an image that is cut into tiles the first tile, which shows all of it, in the original's size.
    """
    if inputs.images is not None:
        return list(inputs.images)
    processor = getattr(model.processor, "image_processor", None)
    views = (model_view(inputs, processor, image=image) for image in range(inputs.n_images))
    shown = [Image.fromarray((255 * view).round().astype(np.uint8)) for view in views]
    sizes = [layout.original_size if len(layout.grids) > 1 else None for layout in inputs.layouts]
    return [view if size is None else view.resize((size[1], size[0])) for view, size in zip(shown, sizes, strict=True)]


def canvas(inputs: Inputs, images: list[Image.Image], image: int) -> Inputs | Image.Image:
    """What an image's patches are drawn on: the prompt, which knows where they lie, or what is shown of the image."""
    if inputs.images is None and len(inputs.layouts[image].grids) > 1:
        return replace(inputs, images=tuple(images))
    return images[image] if inputs.images is None else inputs


def records(table: xr.Dataset) -> list[dict[str, Any]]:
    """A table's rows, each by the names of its columns, coordinates included."""
    return table.to_dataframe().reset_index().to_dict("records")


def panel_columns(n_layers: int) -> int:
    """How many panels, one for each layer, stand side by side."""
    return 4 if n_layers <= 16 else 6


def rounded(value: float | xr.DataArray, digits: int) -> str:
    """A number with a real minus sign, and none before a zero.

    >>> rounded(-0.004, 2), rounded(-1.26, 1) == "\u22121.3"
    ('0.00', True)
    """
    return f"{float(value):z.{digits}f}".replace("-", "\u2212")
