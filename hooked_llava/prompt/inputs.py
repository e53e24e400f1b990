"""A batch of prompts and images as the model takes it: ids, mask, pixels, and the map of what stands where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from hooked_llava.architecture.image_axis import Number
from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.architecture.layouts import FINE
from hooked_llava.checks import Indices, as_indices
from hooked_llava.errors import InputError, counted, naming_prompt
from hooked_llava.machine.devices import to_device
from hooked_llava.prompt.assembly import Assembly
from hooked_llava.prompt.positions import Positions
from hooked_llava.prompt.requirements import one_prompt
from hooked_llava.prompt.token_map import TokenMap

_ROWS_SHOWN = 8
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Inputs:
    """A batch of prompts with their images, checked and ready to run; `prepare` and `as_inputs` make them.

    `print(inputs)` shows the tokens with images collapsed and the spans under them. Where TransformerLens expects
    tokens, this stands in: it has their `shape`, `ndim`, `device`, length, batch slicing and `to`.

    >>> inputs = Inputs(
    ...     input_ids=torch.tensor([[1, 5, 7]]),
    ...     attention_mask=torch.ones(1, 3, dtype=torch.bool),
    ...     pixel_values=None,
    ...     images_per_prompt=(0,),
    ...     token_maps=(TokenMap(token_ids=(1, 5, 7), real=range(3)),),
    ... )
    >>> inputs.shape, inputs.n_images, inputs.token_map["last"]
    (torch.Size([1, 3]), 0, Positions(2))

    Attributes:
        input_ids (Int[Tensor, "batch pos"]): Token ids, padding included; every image takes as many image tokens as it
            has features.
        attention_mask (Bool[Tensor, "batch pos"]): True at real tokens, False at padding.
        pixel_values (Float[Tensor, "tile channel height width"] | None): Normalised pixels of the tiles of all images,
            image after image, prompt after prompt; in LLaVA-1.5 an image is one tile. None for text only.
        images_per_prompt (tuple[int, ...]): How many of the images belong to each prompt.
        token_maps (tuple[TokenMap, ...]): For each prompt, what stands where.
        position_ids (Int[Tensor, "batch pos"] | None): Positions for the rotary embedding; None for counting real
            tokens from 0.
        prompts (tuple[str, ...] | None): The texts, with one image token per image, if they are known.
        images (tuple[Image.Image, ...] | None): The original images as the model's image processor got them (RGB,
            upright, on white), if they are known.
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]
    pixel_values: Float[Tensor, "tile channel height width"] | None
    images_per_prompt: tuple[int, ...]
    token_maps: tuple[TokenMap, ...]
    position_ids: Int[Tensor, "batch pos"] | None = None
    prompts: tuple[str, ...] | None = None
    images: tuple[Image.Image, ...] | None = None

    @property
    def shape(self) -> torch.Size:
        """(batch, position): the shape of the token ids."""
        return self.input_ids.shape

    @property
    def ndim(self) -> int:
        """2, as token ids have."""
        return self.input_ids.ndim

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.input_ids.device

    @property
    def n_images(self) -> int:
        """Number of images in all prompts."""
        return sum(self.images_per_prompt)

    @property
    def layouts(self) -> tuple[ImageLayout, ...]:
        """How each image of all prompts becomes positions."""
        return tuple(layout for token_map in self.token_maps for layout in token_map.layouts)

    @cached_property
    def tiles(self) -> tuple[range, ...]:
        """For each image its tiles, as rows of `pixel_values`."""
        ends = [*accumulate((layout.n_tiles for layout in self.layouts), initial=0)]
        return tuple(range(first, stop) for first, stop in pairwise(ends))

    @property
    def image_fields(self) -> dict[str, Tensor]:
        """What a Hugging Face processor returns for the images: pixel_values; image_sizes and batch_num_images if known."""
        if self.pixel_values is None:
            return {}
        sizes = [layout.original_size for layout in self.layouts]
        if None in sizes:
            return {"pixel_values": self.pixel_values}
        # As OneVision's processor counts: images of which only the base grid is there were several in their prompt.
        whole = [FINE in m.layouts[0].names for m in self.token_maps if m.n_images]
        counts = [n for n in self.images_per_prompt if n]
        each = [one for n, cut in zip(counts, whole, strict=True) for one in ([1] * n if cut else [n])]
        return {
            "pixel_values": self.pixel_values,
            "image_sizes": torch.tensor(sizes),
            "batch_num_images": torch.tensor(each),
        }

    @property
    def token_map(self) -> TokenMap:
        """What stands where in the only prompt; raises `InputError` for a batch of several."""
        if len(self) != 1:
            raise InputError(
                f"There are {len(self)} prompts, each with its own token map: use inputs.token_maps[i], "
                "or inputs[i].token_map."
            )
        return self.token_maps[0]

    @property
    def padding_mask(self) -> Bool[Tensor, "batch pos"] | None:
        """The attention mask where something is padded; None where nothing is. The token maps say which, without a look."""
        padded = any(len(token_map.real) != self.shape[1] for token_map in self.token_maps)
        return self.attention_mask if padded else None

    @cached_property
    def image_mask(self) -> Bool[Tensor, "batch pos"]:
        """True at the positions that image embeddings take."""
        with torch.inference_mode(False):  # it is kept, for runs with gradients too
            mask = torch.zeros(self.shape, dtype=torch.bool)
            for row, token_map in enumerate(self.token_maps):
                for image in token_map.image_ranges:
                    mask[row, image.start : image.stop] = True
            return to_device(mask, self.device)

    @cached_property
    def assembly(self) -> Assembly:
        """How the patches of the tiles become the features of the images, where a model cuts images into tiles."""
        with torch.inference_mode(False):
            return Assembly.of(self.layouts).to(self.device)

    @cached_property
    def last(self) -> Int[Tensor, " batch"]:
        """The last position of each prompt, from which its answer's first token is predicted; on the CPU."""
        return torch.tensor([token_map["last"][0] for token_map in self.token_maps])

    def with_spans(self, **spans: str | Iterable[Any]) -> Inputs:
        """A copy whose token maps have further named spans: words that occur in every prompt, or one entry per prompt.

        An entry is words or positions; for a single prompt positions (ints) may also be given as they are. Raises
        `SpanError` as `TokenMap.with_spans`, and `InputError` if the number of entries is not the number of prompts.
        """
        token_maps = self.token_maps
        for name, where in spans.items():
            entries = self._per_prompt(name, where)
            token_maps = tuple(
                self.each(lambda m, entry, name=name: m.with_spans(**{name: entry}), token_maps, entries)
            )
        return replace(self, token_maps=token_maps)

    def with_boxes(self, *, coverage: Number = 0, **boxes: Sequence[Any]) -> Inputs:
        """A copy with further spans made of the patches under boxes (x0, y0, x1, y1) on the first image, in its pixels.

        For one prompt a list of boxes, whose patches are joined; for several a list of such lists, where an empty one
        leaves that prompt without the span. `coverage` is the share of a patch that a box must cover; 0 takes every patch
        that it touches. Raises `SpanError` as `TokenMap.box_to_patches`, and `InputError` for another number of lists.
        """
        token_maps = self.token_maps
        for name, given in boxes.items():
            per_prompt = [given] if len(self) == 1 else list(given)
            if len(per_prompt) != len(self):
                raise InputError(
                    f"The boxes of {name!r} are {counted(len(per_prompt), 'list')} for {counted(len(self), 'prompt')}; "
                    "expected a list of boxes (x0, y0, x1, y1) for each."
                )
            token_maps = tuple(
                self.each(lambda m, own, name=name: _with_boxes(m, name, own, coverage), token_maps, per_prompt)
            )
        return replace(self, token_maps=token_maps)

    def single(self, caller: str) -> Inputs:
        """These inputs, if they are one prompt; raises `InputError` otherwise, for a function that takes one."""
        if several := one_prompt(len(self)):
            raise InputError(f"{caller} {several}")
        return self

    def naming(self, row: int) -> AbstractContextManager[None]:
        """Errors of this library that the block raises say which prompt of several they are about."""
        return naming_prompt(row, self._words_of(row)) if len(self) > 1 else nullcontext()

    def each(self, function: Callable[..., _T], *columns: Iterable[Any]) -> list[_T]:
        """The function called for every prompt with that prompt's entry of each column; its errors name the prompt."""
        found = []
        for row, entries in enumerate(zip(*columns, strict=True)):
            with self.naming(row):
                found.append(function(*entries))
        return found

    def _words_of(self, row: int) -> str | None:
        """The question, or else the prompt, as far as it is known."""
        words = self.token_maps[row].words
        if words is None or words.prompt is None:
            return None
        return words.prompt[slice(*words.parts.get("question", (None, None)))]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Inputs:
        """All tensors on the device, and the pixels in the dtype: itself if they are, otherwise a copy."""
        place = self.device if device is None else device
        ids, positions = to_device(self.input_ids, place), self.position_ids
        pixels = None if self.pixel_values is None else to_device(self.pixel_values, place, dtype)
        if ids is self.input_ids and pixels is self.pixel_values:
            return self
        return replace(
            self,
            input_ids=ids,
            attention_mask=to_device(self.attention_mask, place),
            pixel_values=pixels,
            position_ids=None if positions is None else to_device(positions, place),
        )

    def cpu(self) -> Inputs:
        """All tensors on the CPU."""
        return self.to("cpu")

    def repeat(self, *sizes: int) -> Int[Tensor, "..."]:
        """The token ids repeated along each axis, as of a tensor, for TransformerLens's head detector."""
        return self.input_ids.repeat(*sizes)

    def padded_left(self) -> Inputs:
        """The same with each prompt's padding on its left, so that all end where decoding goes on: itself if it is."""
        shifts = [self.shape[1] - token_map.real.stop for token_map in self.token_maps]
        if not any(shifts):
            return self

        def rolled(rows: Tensor) -> Tensor:
            return torch.stack([row.roll(by) for row, by in zip(rows, shifts, strict=True)])

        return replace(
            self,
            input_ids=rolled(self.input_ids),
            attention_mask=rolled(self.attention_mask),
            position_ids=None if self.position_ids is None else rolled(self.position_ids),
            token_maps=tuple(m.shifted(by) for m, by in zip(self.token_maps, shifts, strict=True)),
        )

    def copies(self, n: int) -> Inputs:
        """The one prompt n times, as a batch; raises `InputError` for several prompts.

        >>> from hooked_llava import HookedLLaVA
        >>> HookedLLaVA.from_pretrained("tiny-shapes").prepare("Who made the star?").copies(3).shape
        torch.Size([3, 11])
        """
        self.single("copies")
        return self._take([0] * n)

    def __len__(self) -> int:
        return len(self.input_ids)

    def __iter__(self) -> Iterator[Inputs]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, index: Indices | slice) -> Inputs:
        """Prompts as a batch with their own images: one, a slice, or several in any order; raises `InputError` out of range."""
        if isinstance(index, slice):
            rows = range(len(self))[index]
            if not rows:
                raise InputError(f"The slice {index.start}:{index.stop} holds none of the {len(self)} prompts.")
            return self._take(rows)
        if isinstance(index, tuple):
            raise InputError(f"Inputs are sliced by prompt only, not by {index!r}; take positions from the tensors.")
        last = len(self) - 1
        missing = "There is no prompt {}; expected 0 to {}.".format
        return self._take(as_indices(index, last + 1, "prompts", outside=lambda wrong: missing(wrong[0], last)))

    def __repr__(self) -> str:
        return f"Inputs(batch={len(self)}, positions={self.shape[1]}, images_per_prompt={self.images_per_prompt})"

    def __str__(self) -> str:
        blocks = [self.summary()]
        for row, token_map in enumerate(self.token_maps[:_ROWS_SHOWN]):
            blocks.append((f"prompt {row}\n" if len(self) > 1 else "") + str(token_map))
        if len(self) > _ROWS_SHOWN:
            blocks.append(f"and {len(self) - _ROWS_SHOWN} more prompts: print(inputs[{_ROWS_SHOWN}:])")
        return "\n\n".join(blocks)

    def summary(self) -> str:
        """How many prompts, positions and images, in a line.

        >>> from hooked_llava import HookedLLaVA
        >>> HookedLLaVA.from_pretrained("tiny-shapes").prepare("Who made the star?").summary()
        '1 prompt, 11 positions, no image, on cpu'
        """
        parts = [counted(len(self), "prompt"), counted(self.shape[1], "position")]
        if self.pixel_values is None:
            parts.append("no image")
        else:
            dtype = str(self.pixel_values.dtype).removeprefix("torch.")
            shapes = {str(layout): None for layout in self.layouts}
            parts.append(f"{counted(self.n_images, 'image')} of {' or '.join(shapes)} patches ({dtype})")
        return f"{', '.join(parts)}, on {self.device}"

    def _per_prompt(self, name: str, where: str | Iterable[Any]) -> list[Any]:
        entries = [where] * len(self) if isinstance(where, str) else list(where)
        if not any(isinstance(entry, Iterable) and getattr(entry, "ndim", 1) for entry in entries):
            entries = [entries]
        if len(entries) != len(self):
            raise InputError(
                f"The span {name!r} has {counted(len(entries), 'entry', 'entries')} for {counted(len(self), 'prompt')}; "
                "expected words, or one entry per prompt."
            )
        return entries

    def _take(self, rows: Sequence[int]) -> Inputs:
        index = to_device(list(rows), self.device)
        ends = [sum(self.images_per_prompt[: row + 1]) for row in range(len(self))]
        kept = [image for row in rows for image in range(ends[row] - self.images_per_prompt[row], ends[row])]
        tiles = [tile for image in kept for tile in self.tiles[image]]
        pixels = None
        if self.pixel_values is not None and kept:
            pixels = self.pixel_values.index_select(0, to_device(tiles, self.pixel_values.device))
        return Inputs(
            input_ids=self.input_ids[index],
            attention_mask=self.attention_mask[index],
            pixel_values=pixels,
            images_per_prompt=tuple(self.images_per_prompt[row] for row in rows),
            token_maps=tuple(self.token_maps[row] for row in rows),
            position_ids=None if self.position_ids is None else self.position_ids[index],
            prompts=None if self.prompts is None else tuple(self.prompts[row] for row in rows),
            images=None if self.images is None else tuple(self.images[image] for image in kept),
        )


def _with_boxes(token_map: TokenMap, name: str, boxes: Sequence[Any], coverage: Number) -> TokenMap:
    found = Positions()
    for box in boxes:
        found |= token_map.box_to_patches(box, coverage=coverage)
    return token_map.with_spans(**{name: found}) if found else token_map
