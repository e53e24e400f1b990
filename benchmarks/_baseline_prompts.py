"""Cases of prompts: templates, tokens, positions, images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks._baseline_cases import Made, on, once
from benchmarks._baseline_names import find_template, geometry_of, llava_layout, make_processor, processor_axes
from benchmarks._baseline_subjects import SOME, Subject, named, subject, with_boxes
from hooked_llava import HookedLLaVA, Inputs

_TEMPLATES = ("llava-1.5", "vicuna-v1", "tiny-shapes", "plain", "chat")


def _shown(inputs: Inputs) -> dict[str, Any]:
    """Everything that is known of prepared prompts."""
    maps = inputs.token_maps
    return {
        "text": str(inputs),
        "prompts": inputs.prompts,
        "ids": inputs.input_ids,
        "mask": inputs.attention_mask,
        "pixels": None if inputs.pixel_values is None else inputs.pixel_values[:, :, ::7, ::7],
        "pixel sum": None if inputs.pixel_values is None else inputs.pixel_values.double().sum((2, 3)),
        "spans": [{name: list(where) for name, where in m.spans.items()} for m in maps],
        "labels": [m.labels for m in maps],
        "last": inputs.last,
        "per prompt": inputs.images_per_prompt,
    }


@on([*SOME, "seed0-float32", "several_layers_full-float64"], quick=["grouped-float64"])
def prepared(s: Subject) -> Made:
    model, image = s.model, s.images[0]
    question = s.question
    return {
        "one": _shown(s.one),
        "left": _shown(s.batch()),
        "right": _shown(s.batch(padding_side="right")),
        "text": _shown(s.text),
        "two images": lambda: _shown(s.two_images),
        "prefix": lambda: _shown(model.prepare(question, image, answer_prefix="The color is")),
        "options": lambda: _shown(model.prepare("Is it red or blue?", image, options=["red", "blue"])),
        "tail": lambda: _shown(model.prepare(question, image, tail="Answer briefly.")),
        "no tail": lambda: _shown(model.prepare(question, image, tail=None)),
        "no template": lambda: _shown(model.prepare("USER: <image>\nWhat is it? ASSISTANT:", image, template=None)),
        "string": lambda: _shown(model.as_inputs("What color is it?")),
        "tensors": lambda: _shown(model.as_inputs({"input_ids": s.one.input_ids, "pixel_values": s.one.pixel_values})),
        "array": lambda: _shown(model.prepare(question, np.asarray(image))),
        "floats": lambda: _shown(model.prepare(question, torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1))),
        "moved": lambda: _shown(s.batch(padding_side="right").padded_left()),
    }


@on(named(("grouped",), ["float64"]), quick=["grouped-float64"])
def templates(s: Subject) -> Made:
    """Texts and spans of every template that is known by name."""
    found: dict[str, Any] = {}
    for name in _TEMPLATES:
        found[name] = lambda name=name: _formatted(name)
    found["prepared"] = lambda: _shown(s.model.prepare(s.question, s.images[0], template="vicuna-v1"))
    return found


def _formatted(name: str) -> list[Any]:
    template = find_template(name)
    made = [template.format("What is it?"), template.format("What is it?", 1), template.format("What is it?", 2)]
    made.append(template.format("What is it?", 1, answer_prefix="It is"))
    made.append(template.with_tail("Answer in a word.").format("What is it?", 1))
    return [repr(template), *([m.text, dict(m.spans)] for m in made)]


@on(SOME, quick=["grouped-float64"])
def token_map(s: Subject) -> Made:
    """Words, patches, boxes and pixels to positions and back."""
    found = with_boxes(s.one).token_map
    rows, columns = found.layout().grids[0].shape
    width, height = s.images[0].size
    mask = np.zeros((height, width), bool)
    mask[height // 4 : height // 2, width // 3 : width * 2 // 3] = True
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    boxes = [(0, 0, width, height), (width / 3, height / 3, width / 2, height / 2), (3, 3, 4, 4)]
    own = found.with_spans(mine=[2, 3], words="color")
    return {
        "words": [found.find(word).tolist() for word in ("color", "the")],
        "within": lambda: found.find(s.constraint, within="question").tolist(),
        "spans": {name: where.tolist() for name, where in own.spans.items()},
        "patch boxes": np.array([found.patch_box(*cell) for cell in cells]),
        "positions": [found.patch_to_position(*cell) for cell in cells],
        "back": [found.position_to_patch(p) for p in found["image"]],
        "boxes": [
            lambda box=box, c=c: found.box_to_patches(box, coverage=c).tolist()
            for box in boxes
            for c in (0, 0.2, 0.5, 1)
        ],
        "outside": [found.outside(box) for box in boxes],
        "mask": lambda: found.mask_to_patches(mask, coverage=0.3).tolist(),
        "pixel": found.pixel_to_patch(width / 2, height / 2),
        "geometry": repr(geometry_of(found.layout())),
        "shifted": lambda: list(s.batch(padding_side="right").padded_left().token_maps[1].real),
    }


@once(quick=True)
def geometry() -> Made:
    """Where pixels go in images of every shape."""
    processor = make_processor(336, 14).image_processor
    padded = make_processor(32, 8, do_center_crop=False, size={"height": 32, "width": 32}).image_processor
    found: dict[str, Any] = {}
    for name, how, size in (("large", processor, 14), ("stretched", padded, 8)):
        for height, width in ((480, 640), (640, 480), (336, 336), (37, 512)):
            found[f"{name} {height} x {width}"] = lambda h=height, w=width, how=how, size=size: _geometry(
                how, h, w, size
            )
    return found


def _geometry(processor: Any, height: int, width: int, patch_size: int) -> dict[str, Any]:
    made = llava_layout(*processor_axes(processor, height=height, width=width, patch_size=patch_size))
    return {
        "repr": repr(geometry_of(made)),
        "visible": np.array(made.visible_box()),
        "corner": np.array(made.cell_box(0, 0)),
        "shares": made.box_shares((width / 4, height / 4, width / 2, height / 3))["base"],
        "outside": made.outside((0, 0, width / 2, height)),
        "pixel": made.pixel_to_cell(width / 2, height / 2),
    }


@once(quick=True)
def images() -> Made:
    """Files, modes and sizes of images, as the model sees them."""
    s = subject("grouped-float64")
    rgb = s.images[0]
    modes = {mode: rgb.convert(mode) for mode in ("L", "1", "P", "RGBA", "CMYK", "LA", "YCbCr", "HSV")}
    modes["RGBA"].putalpha(128)
    modes["I;16"] = Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257)
    found: dict[str, Any] = {mode: lambda i=image: _seen(s.model, i) for mode, image in modes.items()}
    for ending in ("png", "jpg", "webp", "bmp"):
        rgb.save(f"image.{ending}")
        found[ending] = lambda ending=ending: _seen(s.model, f"image.{ending}")
    exif = Image.Exif()
    exif[274] = 6
    rgb.save("turned.jpg", exif=exif)
    found["turned"] = lambda: _seen(s.model, "turned.jpg")
    found["missing"] = lambda: _seen(s.model, "nowhere.png")
    return found


def _seen(model: HookedLLaVA, image: Any) -> list[Any]:
    inputs = model.prepare("What is it?", image)
    assert inputs.pixel_values is not None
    kept = inputs.images or ()
    return [
        inputs.pixel_values[:, :, ::7, ::7],
        [str(i.size) + i.mode for i in kept],
        [np.asarray(i)[::9, ::9] for i in kept],
    ]
