"""How a result came about: the attributes that every analysis gives its labelled arrays."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

import hooked_llava
from hooked_llava.model.weights_id import weights_stamp

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs

_LETTERS = 12  # of a hash


@dataclass
class Provenance:
    """What a result's attributes say: which analysis of what, how, by which version, and at what cost.

    Attributes:
        about (dict[str, Any]): The attributes known beforehand.
        n_forward (int | float | None): None where runs are not counted.
    """

    about: dict[str, Any]
    n_forward: int | float | None
    _started: float = field(default_factory=time.perf_counter)

    @classmethod
    def of(
        cls,
        analysis: str,
        model: HookedLLaVA,
        inputs: Inputs | str,
        *,
        corrupted: Inputs | None = None,
        n_forward: int | float | None = None,
        **method: Any,
    ) -> Provenance:
        """As `provenance` has it, of prompts or of words that stand for them."""
        made = {
            "analysis": analysis,
            "model": model.config.model_name,
            "weights": weights_stamp(model),
            "dtype": str(model.cfg.dtype).removeprefix("torch."),
            "version": hooked_llava.__version__,
        }
        asked = {"prompt": inputs} if isinstance(inputs, str) else _asked(inputs)
        if corrupted is not None:
            asked |= {f"corrupted_{name}": value for name, value in _asked(corrupted).items()}
        return cls(made | asked | {name: described(value) for name, value in method.items()}, n_forward)

    def attrs(self, **more: Any) -> dict[str, Any]:
        """Attributes for an array, with the seconds since the analysis began."""
        seconds = round(time.perf_counter() - self._started, 4)
        counted = {} if self.n_forward is None else {"n_forward": self.n_forward}
        return self.about | counted | {"seconds": seconds} | more


@contextmanager
def provenance(
    analysis: str,
    model: HookedLLaVA,
    inputs: Inputs,
    *,
    corrupted: Inputs | None = None,
    n_forward: int | float,
    **method: Any,
) -> Iterator[Provenance]:
    """Run an analysis without gradients, and keep what its result must say about it.

    The attributes are `analysis` (the function's name), `model`, `weights` (a stamp of them as they are now), `dtype`,
    `version` (of this library), `prompt`, `images` (hashes), of a pair also `corrupted_prompt` and `corrupted_images`,
    and all of `method`: hook, layers, positions, heads, metric, direction, whatever the analysis was told.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> with provenance("my_analysis", model, model.prepare("Who made the star?"), n_forward=1, layers=slice(2)) as made:
    ...     {name: made.attrs()[name] for name in ("analysis", "model", "images", "layers")}
    {'analysis': 'my_analysis', 'model': 'tiny-shapes', 'images': [], 'layers': 'slice(None, 2, None)'}
    """
    with torch.no_grad():
        yield Provenance.of(analysis, model, inputs, corrupted=corrupted, n_forward=n_forward, **method)


def forward_passes(attrs: Mapping[str, Any]) -> float:
    """What a result cost in forward passes: the whole ones, and the work of the runs that are re-run in part.

    >>> forward_passes({"n_forward": 1, "work": 2.5, "runs": 12})
    3.5
    """
    return attrs.get("n_forward", 0) + attrs.get("work", 0.0)


def described(value: Any) -> Any:
    """An argument as plain values that a file can hold; what is none is told in words.

    >>> described(range(3)), described(torch.tensor([4, 5])), described([(1, 2)]), described(slice(1, 3))
    ([0, 1, 2], [4, 5], [[1, 2]], 'slice(1, 3, None)')
    """
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): described(entry) for key, entry in value.items()}
    if isinstance(value, Iterable):
        return [described(entry) for entry in value]
    return str(value)


def image_hashes(inputs: Inputs) -> list[str]:
    """A short hash of each image: of its size and pixels as they were given, or of what the model sees if that is all.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> zeros = torch.zeros(3, 64, 64)
    >>> first, second = image_hashes(model.prepare("Which two?", images=[zeros, zeros]))
    >>> first == second
    True
    """
    if inputs.images is not None:
        return [image_hash(image) for image in inputs.images]
    if inputs.pixel_values is None:
        return []
    pixels = inputs.pixel_values.detach().float().cpu().numpy()
    images = [pixels[rows.start] if len(rows) == 1 else pixels[rows.start : rows.stop] for rows in inputs.tiles]
    return [_hash(f"pixel_values {one.shape}".encode() + one.tobytes()) for one in images]


def image_hash(image: Image.Image) -> str:
    """A short hash of one image: of its mode, size and pixels.

    >>> first, second = (Image.new("RGB", (4, 4), color) for color in ("red", "blue"))
    >>> image_hash(first) == image_hash(first.copy()) != image_hash(second)
    True
    """
    return _hash(f"{image.mode} {image.size}".encode() + image.tobytes())


def _asked(inputs: Inputs) -> dict[str, Any]:
    prompt = " | ".join(inputs.prompts) if inputs.prompts is not None else f"{tuple(inputs.shape)} token ids"
    return {"prompt": prompt, "images": image_hashes(inputs)}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_LETTERS]
