"""Every analysis, by a name, and small random models of the family to run them on.

One list: the tests of the family, of devices, of precision, of packed weights and of kept runs all go through it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from PIL import Image
from torch import Tensor

from hooked_llava import analysis
from hooked_llava.datasets import StudyRow
from hooked_llava.experiments.corruptions import Noise
from hooked_llava.model.cache_hooks import axis_sizes
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.readout.metrics import Answer, log_probability
from hooked_llava.replay import Intervention, Replay
from hooked_llava.results.arrays import to_numpy
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor
from tests.pairs import FAMILY
from tests.tiled import with_processor

LANGUAGES = ["llama-clip", "mistral-clip", "qwen2-clip", "phi-clip", "phi-siglip"]
TILED = {"llava_next": ("next", (24, 100)), "onevision": ("onevision", (50, 170))}
"""Models that cut images into tiles, and a size (height, width) of which the second's fine grid is pooled."""


@functools.cache
def hf_of(name: str) -> Any:
    return make_hf_model(**FAMILY[name])


@functools.cache
def model_of(name: str) -> HookedLLaVA:
    if name in TILED:
        return with_processor(TILED[name][0])
    siglip = {"image_size": 18, "select_strategy": "full", "n_class_tokens": 0} if name.endswith("siglip") else {}
    return HookedLLaVA.from_hf(hf_of(name), make_processor(**siglip))


def image(seed: int, size: tuple[int, int] = (24, 24)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def prompts(name: str) -> tuple[Any, Any]:
    return prompt(name, "What is the star?", 0), prompt(name, "What is the star?", 1)


def prompt(name: str, question: str, seed: int) -> Any:
    text = f"USER: <image>\n{question} ASSISTANT:"
    size = TILED[name][1] if name in TILED else (24, 24)
    return model_of(name).prepare(text, images=image(seed, size), template=None).with_spans(question=question)


def change_at(model: HookedLLaVA, hook: Any, inputs: Any) -> Intervention:
    """A vector added in the middle of the prompt, or edges blocked."""
    n, sizes = inputs.shape[1], axis_sizes(model.hooks_table, hook.name, inputs)
    where = [1, 2] if hook.on_image_side else [n - 4, n - 2]
    if hook.site == "attn.hook_attn_scores" and not hook.on_image_side:
        return Intervention(hook.name, block=([n - 3], [n - 1, n - 2]))
    if "key" in hook.axes or hook.axes[-1] == "1":
        return Intervention(hook.name, positions=where, scale=1.5)
    noise = torch.randn(sizes[hook.axes[-1]], generator=torch.Generator().manual_seed(0))
    return Intervention(hook.name, positions=where, add=noise)


def left_padded(singles: list[Any]) -> dict[str, Tensor]:
    width = max(one.shape[1] for one in singles)
    ids = [torch.nn.functional.pad(one.input_ids, (width - one.shape[1], 0), value=0) for one in singles]
    mask = [torch.nn.functional.pad(one.attention_mask, (width - one.shape[1], 0), value=False) for one in singles]
    pixels = torch.cat([one.pixel_values for one in singles])
    return {"input_ids": torch.cat(ids), "attention_mask": torch.cat(mask), "pixel_values": pixels}


# ---------------------------------------------------------------------- analyses


def all_analyses(model: HookedLLaVA, clean: Any, other: Any) -> dict[str, Callable[[], Any]]:
    """All of them: what reads a run, what re-runs, and what goes through data."""
    given = model, clean, other
    return {**reading_analyses(*given), **patching_analyses(*given), **data_analyses(*given)}


def patching_analyses(model: HookedLLaVA, clean: Any, other: Any) -> dict[str, Callable[[], Any]]:
    """Those that re-run: each must give numbers that are not all 0."""
    metric = log_probability(Answer.of(model, "red"))
    ranking = {"map": analysis.patch_importance(model, clean, "red")}
    own = int(model(clean)[0, -1].argmax())
    last = model.cfg.n_layers - 1
    receivers = ["logits", ("q", last, 1), ("k", 1, 0), ("v", last, 1)]
    if not model.config.language.parallel_attn_mlp:
        receivers.append(("mlp", 1))
    found = {
        "patched streams": lambda: analysis.activation_patching(model, clean, other, metric=metric),
        "patched heads": lambda: analysis.activation_patching(
            model, clean, other, hook="z", positions=[-4, -1], metric=metric
        ),
        "patched features": lambda: analysis.activation_patching(
            model, clean, other, hook="hook_image_embed", metric=metric
        ),
        "paths": lambda: analysis.path_patching(model, clean, other, receivers=receivers, metric=metric),
        "paths of MLPs": lambda: analysis.path_patching(
            model, clean, other, receivers=receivers, senders="mlps", metric=metric
        ),
        "knockout": lambda: analysis.attention_knockout(model, clean, ["image->last", "question->last"], 1),
        "knockout of outputs": lambda: analysis.output_knockout(model, clean, window=1),
        "trace": lambda: analysis.causal_trace(model, clean, "star", corruption=Noise(3.0)),
        "ablated": lambda: analysis.ablate_heads(model, clean, [(0, 1), (last, 0)], replace="zero"),
        "ablated tokens": lambda: analysis.patch_importance(model, clean, "red", method="token_ablation"),
        "occlusion": lambda: analysis.patch_importance(model, clean, "red", method="occlusion"),
        "patched tower": lambda: analysis.activation_patching(
            model, clean, other, hook="vision.resid_pre", layers=1, metric=metric
        ),
        "deleted patches": lambda: analysis.deletion_curves(model, clean, ranking, shares=(0, 0.4, 1)),
        "deleted tokens": lambda: analysis.deletion_curves(model, clean, ranking, shares=(0, 0.4, 1), where="tokens"),
        "without": lambda: analysis.answer_without(model, clean, own, heads=[(0, 1)], patches=ranking["map"]),
        "patchscope": lambda: analysis.patchscope(
            model, clean, layers=[0, 2], target=other, target_position="last", max_new_tokens=2
        ),
        "temperature": lambda: _measured(model, clean, metric, temperature=0.1),
        "reweighted": lambda: _measured(model, clean, metric, reweight=("question", "last"), factor=3.0),
    }
    if not model.config.language.parallel_attn_mlp:
        found["circuit"] = lambda: _circuits(model, clean, other, metric)
    return found


def _circuits(model: HookedLLaVA, clean: Any, other: Any, metric: Any) -> xr.Dataset:
    """None of the edges, and half of them."""
    edges = analysis.edge_attribution(model, clean, other, metric=metric)
    half = sum(int(part.notnull().sum()) for part in edges.values()) // 2
    return analysis.faithfulness_curve(model, clean, other, edges, [0, half], metric, n_random=1, choose="top")


def _measured(model: HookedLLaVA, inputs: Any, metric: Any, **change: Any) -> np.ndarray:
    """A metric where attention is changed in each layer in turn."""
    runs = [[Intervention(("attn_scores", layer), **change)] for layer in range(model.cfg.n_layers)]
    return to_numpy(Replay(model, inputs).run(runs, metric, progress=False))


MAPS: list[dict[str, Any]] = [
    {"method": method, "vision": vision, "target": "red" if vision else None}
    for method in ("grad_x_input", "integrated_gradients", "rollout", "relevancy")
    for vision in (False, True)
]
MAPS += [{"method": "grad_cam", "layer": 1, "target": "red"}, {"method": "grad_cam", "vision": True}]
MAPS += [{"method": "tam", "target": "red"}, {"method": "attention"}, {"method": "log_increase", "heads": "all"}]


def reading_analyses(model: HookedLLaVA, clean: Any, other: Any) -> dict[str, Callable[[], Any]]:
    metric = log_probability(Answer.of(model, "red"))
    of_cells = analysis.patch_importance(model, clean, "red")
    return {
        "lens": lambda: analysis.logit_lens(model, clean, k=2, answers=["red"]),
        "heads": lambda: analysis.head_scores(model, clean, "red"),
        "positions": lambda: analysis.position_scores(model, clean, "red", heads=2),
        "map": lambda: analysis.patch_importance(model, clean, "red"),
        **{f"map {how}": functools.partial(analysis.patch_importance, model, clean, **how) for how in MAPS},
        "readings": lambda: analysis.head_readings(model, clean, 1, 1, "red", k=2),
        "stored": lambda: analysis.information_storage(model, clean, "red", "blue", top=3),
        "neurons": lambda: analysis.neuron_scores(model, clean, "red", top=3),
        "next": lambda: analysis.next_tokens(model, clean, k=3),
        "attention": lambda: analysis.image_attention(model, clean),
        "signs": lambda: analysis.answer_signs(model, clean, of_cells, of_cells > of_cells.mean()),
        "by patch": lambda: analysis.logit_attribution(model, clean, "red", by="patch"),
        "curve": lambda: analysis.answer_probability(model, clean, "red"),
        "contribution": lambda: analysis.attention_contribution(model, clean, "star"),
        "estimate": lambda: analysis.attribution_patching(model, clean, other, metric=metric),
        "answer maps": lambda: analysis.answer_maps(model, clean, "red blue"),
        "sinks": lambda: analysis.sink_positions(model, clean),
        "layers": lambda: analysis.layer_scores(model, clean, "red"),
        "heads that look at a span": lambda: analysis.heads_by_attention(model, clean, "question"),
        "heads that look for an object": lambda: analysis.attention_to_object(model, clean, other, "question"),
        "edges": lambda: analysis.edge_attribution(model, clean, other, metric=metric),
        "deleted": lambda: analysis.attribution_patching(model, clean, other, hooks=["z"], steps=3, metric=metric),
    }


def data_analyses(model: HookedLLaVA, clean: Any, other: Any) -> dict[str, Callable[[], Any]]:
    """Those of many prompts: what is trained on them, and studies of a table."""
    data = [clean, other, other, clean]
    row: dict[str, Any] = {"question": clean.prompts[0].split("\n")[1].split("?")[0] + "?"}
    row |= {"answer": "Red", "false_option": "blue", "constraint": "star"}
    rows = [StudyRow(id=str(i), kind="a", image=one.images[0], **row) for i, one in enumerate((clean, other))]
    how: dict[str, Any] = {"only_correct": False, "progress": False}
    return {
        "probes": lambda: analysis.probe_linear(model, data, ["a", "b", "b", "a"], tokens="question", folds=2).result,
        "training of a lens": lambda: _trained_lens(model, data),
        "traces": lambda: analysis.trace_study(model, rows, corruption=Noise(8.0), layers=[1], **how),
        "yes and no": lambda: analysis.pope_study(model, rows, **how),
        "knockouts": lambda: analysis.knockout_study(model, rows, ["image->last"], 1, **how),
        "flow": lambda: analysis.flow_study(model, rows, window=1, **how),
        "curves": lambda: analysis.probability_study(model, rows, **how),
    }


def _trained_lens(model: HookedLLaVA, data: Any) -> xr.DataArray:
    lens = analysis.train_tuned_lens(model, data, steps=2, lr=1e-2, progress=False)
    return analysis.lens_kl(model, data, lens=lens)


CHOSEN_BY_ITSELF = {("circuit", "faithfulness"), ("probes", "weight"), ("probes", "bias")}
"""What rests on a choice or a fit that other roundings change: which edges a circuit has, a fit to four prompts."""


def numbers(result: Any) -> dict[str, np.ndarray]:
    if isinstance(result, xr.DataArray):
        result = result.to_dataset(name=result.name or "value")
    if isinstance(result, xr.Dataset):
        return {str(key): part.values for key, part in result.items() if part.dtype.kind == "f"}
    return {"value": np.asarray(result, dtype=float)}
