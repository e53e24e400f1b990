"""Is it the same model? Parity with Hugging Face, activation by activation, as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.hooks import Hook
from hooked_llava.architecture.layouts import layout_of, layout_without_original
from hooked_llava.architecture.llava import llava_kind
from hooked_llava.architecture.tensors import model_config
from hooked_llava.errors import ConfigError
from hooked_llava.model.hooked_module import HookedModule
from hooked_llava.model.summary import format_columns
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike

TOLERANCE = 1e-4
"""Largest difference in float32, as a part of the activation's largest number, that counts as the same."""
_ROUNDINGS = 8  # in half precision two correct orders of summation differ by a few roundings
_TEXT_TOKENS = (3, 12)  # before and after the image, in the prompt that is made up when none is given


@dataclass(frozen=True)
class ParityRow:
    """One activation, ours against theirs.

    Attributes:
        hook (str): Our hook name.
        difference (float): Largest absolute difference at real positions.
        scale (float): Largest absolute number in Hugging Face's activation.
        tolerance (float): Ratio up to which the two count as the same.
    """

    hook: str
    difference: float
    scale: float
    tolerance: float

    @property
    def ratio(self) -> float:
        """Difference as a part of the scale."""
        return self.difference / self.scale if self.scale else float(self.difference != 0)

    @property
    def ok(self) -> bool:
        """Whether the two are the same; False for NaN."""
        return self.ratio <= self.tolerance


@dataclass(frozen=True)
class ParityTable:
    """What `verify` found: one row per activation, in the order of the forward pass.

    >>> table = ParityTable((ParityRow("hook_logits", difference=2e-6, scale=4.0, tolerance=1e-4),))
    >>> print(table)
    activation   difference  scale  ratio    same
    hook_logits  2.0e-06     4      5.0e-07  yes
    1 of 1 activations are the same (ratio at most 1.0e-04).

    Attributes:
        rows (tuple[ParityRow, ...]): One activation each.
    """

    rows: tuple[ParityRow, ...]

    @property
    def ok(self) -> bool:
        """Whether every activation is the same."""
        return all(row.ok for row in self.rows)

    @property
    def worst(self) -> ParityRow:
        """The row with the largest ratio; a NaN is worse than any number."""
        return max(self.rows, key=lambda row: float("inf") if row.ratio != row.ratio else row.ratio)

    def __str__(self) -> str:
        cells = [("activation", "difference", "scale", "ratio", "same")]
        cells += [
            (row.hook, f"{row.difference:.1e}", f"{row.scale:.3g}", f"{row.ratio:.1e}", "yes" if row.ok else "NO")
            for row in self.rows
        ]
        same, tolerance = sum(row.ok for row in self.rows), max(row.tolerance for row in self.rows)
        found = f"{same} of {len(self.rows)} activations are the same (ratio at most {tolerance:.1e})."
        return "\n".join([*format_columns(cells), found])

    __repr__ = __str__


def verify(
    model: HookedModule,
    hf_model: PreTrainedModel,
    inputs: InputsLike | None = None,
    *,
    tolerance: float | None = None,
    seed: int = 0,
) -> ParityTable:
    """Compare both models' activations on the same inputs: every residual stream, the projector, the logits.

    Without inputs, a random image among random tokens. The tolerance is by default 1e-4 of an activation's largest
    number in float32, and a few roundings in half precision, also where weights are in 8 or 4 bits. Padding is left out.
    Raises `ConfigError` if the two models are of different sizes.

    >>> from transformers import LlavaForConditionalGeneration
    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.loading import resolve
    >>> hf_model = LlavaForConditionalGeneration.from_pretrained(resolve("tiny-shapes"), dtype=torch.float32)
    >>> verify(HookedLLaVA.from_hf(hf_model), hf_model).ok
    True
    """
    _check_same_config(model.config, model_config(hf_model.config, dict(hf_model.named_parameters())))
    inputs = model.as_inputs(_random_prompt(model.config, seed) if inputs is None else inputs)
    theirs = _hf_activations(hf_model, inputs, _hf_modules(hf_model, model.config, inputs))
    with torch.no_grad():
        _, ours = model.run_with_cache(inputs, names_filter=list(theirs))
    if tolerance is None:
        dtypes = {weight.dtype for weight in (*model.parameters(), *hf_model.parameters())}
        # Packed weights are multiplied in 8 bits, or on some CPUs in bfloat16, whatever the others are.
        precisions = [torch.finfo(dtype if dtype.is_floating_point else torch.bfloat16).eps for dtype in dtypes]
        tolerance = max(TOLERANCE, _ROUNDINGS * max(precisions))
    table = model.hooks_table
    return ParityTable(
        tuple(_compare(table[name], ours[name], activation, inputs, tolerance) for name, activation in theirs.items())
    )


def _check_same_config(ours: LLaVAConfig, theirs: LLaVAConfig) -> None:
    parts = ("vision", "projector", "language")
    pairs = {part: (vars(getattr(ours, part)), vars(getattr(theirs, part))) for part in parts}
    outer = [field.name for field in fields(ours) if field.name not in (*parts, "model_name")]
    pairs["outer"] = ({name: getattr(ours, name) for name in outer}, {name: getattr(theirs, name) for name in outer})
    for part, (mine, other) in pairs.items():
        if different := [f"{name}={mine[name]!r} and {other[name]!r}" for name in mine if mine[name] != other[name]]:
            raise ConfigError(
                f"The two models differ in the {part} part: {', '.join(different)} (ours and Hugging Face's). "
                "Verify against the model that the weights came from."
            )


def _random_prompt(config: LLaVAConfig, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    vision = config.vision
    special = {config.image_token_id, config.pad_token_id, *config.eos_token_ids}
    words = torch.tensor([token for token in range(config.language.d_vocab) if token not in special])
    before, after = (words[torch.randint(len(words), (n,), generator=generator)] for n in _TEXT_TOKENS)
    height, width = vision.image_size, 2 * vision.image_size + 1  # matters where images are cut into tiles
    tiled = config.tiling is not None
    layout = layout_of(config, None, height=height, width=width) if tiled else layout_without_original(vision)
    image = torch.full((layout.n_features,), config.image_token_id)
    input_ids = torch.cat([before, image, after])[None]
    shape = layout.n_tiles, vision.n_channels, vision.image_size, vision.image_size
    pixels = torch.randn(shape, generator=generator)
    fields = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pixel_values": pixels}
    return {**fields, "image_sizes": torch.tensor([[height, width]])} if tiled else fields


@dataclass(frozen=True)
class _Tap:
    """Where in the Hugging Face model an activation is: what goes into a module or what comes out of it."""

    module: nn.Module
    output: bool = True


def _hf_modules(hf_model: PreTrainedModel, config: LLaVAConfig, inputs: Inputs) -> dict[str, _Tap]:
    """Our hook name -> the same place in the Hugging Face model, in the order of the forward pass."""
    base, taps = hf_model.model, {}
    if inputs.pixel_values is not None:
        tower = getattr(base.vision_tower, "vision_model", base.vision_tower)  # before and since transformers 5.6
        vision_blocks = tower.encoder.layers[: config.vision.n_layers_run]
        taps |= _block_taps("vision.", vision_blocks)
        taps["vision.hook_out"] = _Tap(base.multi_modal_projector, output=False)
        taps["projector.hook_out"] = _Tap(base.multi_modal_projector)
    taps |= _block_taps("", base.language_model.layers)
    taps["hook_logits"] = _Tap(hf_model.lm_head)
    return taps


def _block_taps(prefix: str, blocks: Any) -> dict[str, _Tap]:
    taps = {f"{prefix}blocks.0.hook_resid_pre": _Tap(blocks[0], output=False)} if len(blocks) else {}
    return taps | {f"{prefix}blocks.{i}.hook_resid_post": _Tap(block) for i, block in enumerate(blocks)}


def _hf_activations(hf_model: PreTrainedModel, inputs: Inputs, taps: dict[str, _Tap]) -> dict[str, Tensor]:
    """One forward pass of the Hugging Face model, hooked at the taps.

    Not `output_hidden_states`: there the last state of the language tower is the one after the final norm.
    """
    device, mask = hf_model.device, inputs.attention_mask
    counted = (mask.long().cumsum(-1) - 1).clamp(min=0)  # Hugging Face's forward counts padding too
    fields: dict[str, Any] = {
        "input_ids": inputs.input_ids.to(device),
        "attention_mask": mask.long().to(device),
        "position_ids": (counted if inputs.position_ids is None else inputs.position_ids).to(device),
    }
    if inputs.pixel_values is not None:
        takes = llava_kind(hf_model.config.model_type).image_fields  # its vision tower casts pixels
        fields |= {name: value.to(device) for name, value in inputs.image_fields.items() if name in takes}
    with _hooked(taps) as heard, torch.no_grad():
        hf_model(**fields, use_cache=False)
    return {hook: heard[hook] for hook in taps}


@contextmanager
def _hooked(taps: dict[str, _Tap]) -> Iterator[dict[str, Tensor]]:
    heard: dict[str, Tensor] = {}

    def keeper(hook: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: Any, output: Any = None) -> None:
            value = args if output is None else output  # before a module runs there is no output yet
            heard[hook] = (value[0] if isinstance(value, tuple) else value).detach()

        return keep

    handles = [
        tap.module.register_forward_hook(keeper(hook))
        if tap.output
        else tap.module.register_forward_pre_hook(keeper(hook))
        for hook, tap in taps.items()
    ]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _compare(hook: Hook, ours: Tensor, theirs: Tensor, inputs: Inputs, tolerance: float) -> ParityRow:
    ours, theirs = ours.to(theirs.device).float(), theirs.float()
    if not hook.on_image_side:  # that has no padding
        mask = inputs.attention_mask.to(theirs.device)
        ours, theirs = ours[mask], theirs[mask]
    difference = (ours - theirs.reshape(ours.shape)).abs().max()
    return ParityRow(hook.name, difference.item(), theirs.abs().max().item(), tolerance)
