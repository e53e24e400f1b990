"""Sweeps of interventions in three forms: as data for Replay, as plain hooks, and in TransformerLens's own tools."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformer_lens import patching

from benchmarks._models import hf_config, make_bridge, random_hf_model, random_prompt
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.replay import Intervention, Replay

TEXT = 20  # positions at the end of the prompt
WINDOW = 5  # layers
TOKENS = (7, 9)  # whose logits' difference is the metric


@dataclass(frozen=True)
class Run:
    """One experiment."""

    data: list[Intervention]
    plain: list[tuple[str, Callable[[Tensor, Any], Tensor]]]
    """The same as functions on hooks of a full forward pass."""


@dataclass(frozen=True)
class Sweep:
    """Runs, and what of TransformerLens does them."""

    runs: list[Run]
    tool: Any = None
    """One of `transformer_lens.patching`, or None where it has none."""
    cells: list[dict[str, int]] = field(default_factory=list)
    """For each run the tool's own index."""


@dataclass(frozen=True)
class Setting:
    """A model with random weights and two prompts of the same words about different images."""

    hf_model: Any
    model: HookedLLaVA
    clean: dict[str, Tensor]
    corrupted: dict[str, Tensor]

    @classmethod
    def of(cls, config: Any, n_positions: int) -> Setting:
        hf_model = random_hf_model(config)
        clean = random_prompt(config, n_positions)
        other = torch.randn(clean["pixel_values"].shape, generator=torch.Generator().manual_seed(2))
        return cls(hf_model, HookedLLaVA.from_hf(hf_model), clean, {**clean, "pixel_values": other})

    @functools.cached_property
    def source(self) -> Any:
        """What is patched in: activations of the clean run."""
        return self.model.run_with_cache(self.clean, names_filter=["resid_pre", "z"])[1]

    @functools.cached_property
    def inputs(self) -> Inputs:
        """The corrupted prompt, prepared."""
        return self.model.as_inputs(self.corrupted)

    @property
    def forward(self) -> Callable[[], object]:
        """What everything is measured against: one plain forward of Hugging Face's model."""
        return functools.partial(self.hf_model, **self.corrupted)


def metric(logits: Tensor) -> Tensor:
    """Difference of two logits at the answer's position."""
    return logits[..., TOKENS[0]] - logits[..., TOKENS[1]]


def resid_pre(setting: Setting, positions: Sequence[int]) -> Sweep:
    """The residual stream entering every layer, one position at a time."""
    places = [(layer, position) for layer in range(setting.model.cfg.n_layers) for position in positions]
    runs = [_patch(setting, f"blocks.{layer}.hook_resid_pre", [position]) for layer, position in places]
    cells = [{"layer": layer, "pos": position} for layer, position in places]
    return Sweep(runs, patching.get_act_patch_resid_pre, cells)


def z(setting: Setting, positions: Sequence[int]) -> Sweep:
    """Every head's output at these positions together."""
    cfg = setting.model.cfg
    places = [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    runs = [_patch(setting, f"blocks.{layer}.attn.hook_z", positions, head) for layer, head in places]
    if len(positions) > 1:
        cells = [{"layer": layer, "head": head} for layer, head in places]
        return Sweep(runs, patching.get_act_patch_attn_head_out_all_pos, cells)
    cells = [{"layer": layer, "pos": positions[0], "head": head} for layer, head in places]
    return Sweep(runs, patching.get_act_patch_attn_head_out_by_pos, cells)


def blocked(setting: Setting) -> Sweep:
    """No attention from the last position to the image, in a window of layers around each; no tool of TransformerLens's."""
    n_layers, reach = setting.model.cfg.n_layers, WINDOW // 2
    windows = [range(max(0, layer - reach), min(n_layers, layer + reach + 1)) for layer in range(n_layers)]
    image = list(setting.inputs.token_map["image"])

    def block(scores: Tensor, hook: object) -> Tensor:
        scores[:, :, -1, image] = float("-inf")
        return scores

    runs = []
    for window in windows:
        names = [f"blocks.{layer}.attn.hook_attn_scores" for layer in window]
        data = [Intervention(name, block=("image", "last")) for name in names]
        runs.append(Run(data, [(name, block) for name in names]))
    return Sweep(runs)


def _patch(setting: Setting, name: str, positions: Sequence[int], head: int | None = None) -> Run:
    """An activation of the clean run in the corrupted one."""
    where = list(positions)
    value = setting.source[name][0, where] if head is None else setting.source[name][0, where, head][:, None]

    def overwrite(tensor: Tensor, hook: object) -> Tensor:
        index = (0, where) if head is None else (0, where, head)
        tensor[index] = setting.source[name][index]
        return tensor

    heads = None if head is None else [head]
    return Run([Intervention(name, positions=where, heads=heads, value=value)], [(name, overwrite)])


def sample(sweep: Sweep, n: int) -> list[int]:
    """Some of the runs, evenly spread, first and last among them."""
    n_runs = len(sweep.runs)
    return sorted({round(i * (n_runs - 1) / max(1, n - 1)) for i in range(min(n, n_runs))})


def largest_difference(setting: Setting, replay: Replay, sweep: Sweep, chosen: list[int]) -> float:
    """Logits of Replay against full forward passes with plain hooks, relative to the largest logit."""
    quick = replay.run([sweep.runs[i].data for i in chosen], progress=False)
    plain = [setting.model.run_with_hooks(setting.inputs, fwd_hooks=sweep.runs[i].plain) for i in chosen]
    slow = torch.stack([logits[0, -1] for logits in plain if logits is not None])
    return float(((quick - slow).abs().amax(-1) / slow.abs().amax(-1)).max())


class WithImage:
    """TransformerLens's bridge for its patching tools, which hand on token ids only: this passes the image too."""

    training = False

    def __init__(self, setting: Setting) -> None:
        config = setting.hf_model.config
        self.bridge = make_bridge(random_hf_model(config))  # the same seed, so the same weights
        self.ids = setting.corrupted["input_ids"]
        self.rest, clean = (
            {n: t for n, t in f.items() if n != "input_ids"} for f in (setting.corrupted, setting.clean)
        )
        wanted = lambda name: name.endswith(("hook_resid_pre", "hook_z"))  # noqa: E731
        self.cache = self.bridge.run_with_cache(self.ids, names_filter=wanted, **clean)[1]
        patching.tqdm = functools.partial(tqdm, disable=True)

    @property
    def cfg(self) -> Any:
        return self.bridge.cfg

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: list[Any]) -> Tensor:
        return self.bridge.run_with_hooks(tokens, fwd_hooks=fwd_hooks, **self.rest)

    def sweep(self, sweep: Sweep, chosen: list[int]) -> Tensor:
        """The chosen runs through TransformerLens's own tool."""
        keywords = {k: v for k, v in sweep.tool.keywords.items() if k != "index_axis_names"}
        cells = pd.DataFrame([sweep.cells[i] for i in chosen])
        last = lambda logits: metric(logits[0, -1])  # noqa: E731
        return sweep.tool.func(self, self.ids, self.cache, last, index_df=cells, **keywords)


def token_layers_of_a_forward(hf_model: Any, n_positions: int, n_tiles: int = 1) -> float:
    """Multiplications by weights in one Hugging Face forward, in units of one position through one language block."""
    config = hf_model.config
    n_patches = n_tiles * (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    block = sum(p.numel() for p in hf_model.model.language_model.layers[0].parameters() if p.ndim > 1)
    total = 0
    for name, parameter in hf_model.named_parameters():
        if parameter.ndim < 2 or name.endswith(("embed_tokens.weight", "position_embedding.weight")):
            continue
        in_tower = ".encoder." in name
        on_image = n_patches + n_tiles * in_tower if "vision_tower" in name else n_patches
        of_image = "vision_tower" in name or "multi_modal_projector" in name
        total += parameter.numel() * (on_image if of_image else n_positions)
    return total / block


def make_setting(geometry: str, n_positions: int) -> Setting:
    """The setting at one of the geometries."""
    return Setting.of(hf_config(geometry), n_positions)
