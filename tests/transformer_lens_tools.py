"""The tools of TransformerLens that take a model: which there are, what each finds on ours, and those that cannot run."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import pytest
import torch
import transformer_lens
from torch import Tensor
from transformer_lens import ActivationCache, SVDInterpreter, evals, patching
from transformer_lens.head_detector import detect_head
from transformer_lens.lit import model as lit_model
from transformer_lens.lit import utils as lit_utils
from transformer_lens.tools import training
from transformer_lens.tools.analysis import attribution_patching, direct_logit_attribution, interchange, logit_lens
from transformer_lens.tools.analysis.jacobian_lens import JacobianLens
from transformer_lens.tools.analysis.logit_lens import logit_readout
from transformer_lens.tools.analysis.projection_kernel import attention_head_subspace_affinity
from transformer_lens.utilities import LocallyOverridenDefaults, exploratory_utils, move_to_and_update_config

from hooked_llava.errors import PromptWithoutTemplate
from hooked_llava.model.llava import HookedLLaVA
from tests.builders import make_hf_model, make_prompt
from tests.fixtures_processor import make_processor

_MACHINERY = ("model_bridge", "remote_module_loading", "benchmarks", "tools.model_registry", "weight_processing",
              "conversion_utils")  # fmt: skip
_OF_ANOTHER_MODEL = {
    "utilities.bridge_components": "a TransformerBridge, by its type",
    "utilities.attn_implementation": "a model of transformers",
    "utilities.multi_gpu": "a model of transformers",
    "utilities.position_ids": "a model of transformers",
    "utilities.tracr": "a model of Tracr",
}
"""Modules that make bridges, and what others take in place of a TransformerLens model."""
LAYER = "blocks.1.hook_resid_post"


def _takes_a_model(function: Any) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(one.name == "model" or "TransformerLensModel" in str(one.annotation) for one in parameters)


def discovered() -> Iterator[str]:
    """Public functions, and classes with a method, that take a model; by module and name."""
    for module in pkgutil.walk_packages(transformer_lens.__path__, "transformer_lens."):
        place = module.name.removeprefix("transformer_lens.")
        if place.startswith(_MACHINERY) or place in _OF_ANOTHER_MODEL or any(p[0] == "_" for p in place.split(".")):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            function = value.func if isinstance(value, functools.partial) else value
            if name.startswith("_") or getattr(function, "__module__", None) != module.name:
                continue
            methods = [getattr(m, "__func__", m) for n, m in vars(value).items() if n == "__init__" or n[0] != "_"]
            if any(map(_takes_a_model, methods)) if inspect.isclass(value) else _takes_a_model(function):
                yield f"{place}.{name}"


RUNS: dict[str, Callable[[Any, Any], Any]] = {}
"""What each tool finds, given the prompts of two images."""
WITHOUT_IMAGE: set[str] = set()
"""Those that take text, rows of token ids, or no prompt at all."""


def runs(*names: str, image: bool = True) -> Callable[[Any], Any]:
    def keep(function: Any) -> Any:
        RUNS.update(dict.fromkeys(names, function))
        WITHOUT_IMAGE.update(() if image else names)
        return function

    return keep


@functools.cache
def hf_model() -> Any:
    """So small that tools which run it for every head at every position are fast."""
    return make_hf_model(n_layers=2, n_heads=2, n_key_value_heads=2)


@functools.cache
def model() -> Any:
    return HookedLLaVA.from_hf(hf_model(), processor=make_processor())


@functools.cache
def prompt(image: int) -> Any:
    """The same text with one of three images."""
    text, shown = make_prompt(hf_model(), seed=1, n_text=3), make_prompt(hf_model(), seed=image)
    return model().as_inputs(text | {"pixel_values": shown["pixel_values"]})


@functools.cache
def cached(image: int) -> Any:
    return model().run_with_cache(prompt(image))[1]


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 7] - logits[:, -1, 9]).mean()


def two_classes(inputs: Any) -> Tensor:
    return model()(inputs)[:, -1, [7, 9]]


# ---------------------------------------------------------------------- patching, with images

ONE_CELL = [name for name, tool in vars(patching).items() if isinstance(tool, functools.partial) and name[0] != "_"]


def _one_kind(name: str, clean: int, corrupted: int) -> Tensor:
    tool = getattr(patching, name)
    axes = tool.keywords["index_axis_names"]
    last = prompt(clean).shape[1] - 1
    at = {"pos": last, "dest_pos": last, "src_pos": 2}
    cells = pd.DataFrame([[{"layer": 1, **at}.get(axis, head) for axis in axes] for head in (0, 1)], columns=list(axes))
    return tool(model(), prompt(corrupted), cached(clean), metric, index_axis_names=None, index_df=cells)


for _name in ONE_CELL:
    RUNS[f"patching.{_name}"] = functools.partial(_one_kind, _name)


@runs("patching.generic_activation_patch")
def _(clean: int, corrupted: int) -> Tensor:
    how = {"patch_setter": patching.layer_pos_patch_setter, "activation_name": "resid_pre"}
    axes = ("layer", "pos")
    return patching.generic_activation_patch(
        model(), prompt(corrupted), cached(clean), metric, index_axis_names=axes, **how
    )


@runs("patching.get_act_patch_block_every")
def _(clean: int, corrupted: int) -> Tensor:
    return patching.get_act_patch_block_every(model(), prompt(corrupted), cached(clean), metric)


@runs("patching.get_act_patch_attn_head_all_pos_every")
def _(clean: int, corrupted: int) -> Tensor:
    return patching.get_act_patch_attn_head_all_pos_every(model(), prompt(corrupted), cached(clean), metric)


@runs("patching.get_act_patch_attn_head_by_pos_every")
def _(clean: int, corrupted: int) -> Tensor:
    return patching.get_act_patch_attn_head_by_pos_every(model(), prompt(corrupted), cached(clean), metric)


@runs("patching.get_act_patch_direct_path")
def _(clean: int, corrupted: int) -> Tensor:
    caches = cached(clean), cached(corrupted)
    return patching.get_act_patch_direct_path(model(), prompt(corrupted), *caches, metric, 0, 1, "q", verbose=False)


@runs("patching.get_act_patch_direct_path_all_sources")
def _(clean: int, corrupted: int) -> Tensor:
    caches = cached(clean), cached(corrupted)
    tool = patching.get_act_patch_direct_path_all_sources
    return tool(model(), prompt(corrupted), *caches, metric, "v", verbose=False)


# ---------------------------------------------------------------------- caches and readings, with images


@runs("ActivationCache.ActivationCache")
def _(clean: int, corrupted: int) -> Tensor:
    """TransformerLens's own class over what a run of ours has kept: its sums, heads, neurons and norms."""
    logits, ours = model().run_with_cache(prompt(clean))
    theirs = ActivationCache({name: value for name, value in ours.items() if name[:3] not in ("vis", "pro")}, model())
    parts = theirs.decompose_resid(pos_slice=-1)
    added = theirs.logit_attrs(parts, tokens=7, pos_slice=-1, has_batch_dim=True).sum()
    assert float(added) == pytest.approx(float(logits[0, -1, 7]), abs=1e-4)
    heads = theirs.stack_head_results(pos_slice=-1)
    neurons = theirs.stack_neuron_results(1, pos_slice=-1)
    whole = theirs.get_full_resid_decomposition(pos_slice=-1, expand_neurons=False).sum(0)
    torch.testing.assert_close(whole, theirs["resid_post", -1][:, -1], atol=1e-4, rtol=1e-4)
    layers = theirs.accumulated_resid(pos_slice=-1, incl_mid=True)
    return torch.cat([x.flatten() for x in (parts, heads, neurons, layers, theirs.logit_lens().values)])


@runs("head_detector.detect_head")
def _(clean: int, corrupted: int) -> Tensor:
    return detect_head(model(), prompt(clean), "previous_token_head")


@runs("tools.analysis.direct_logit_attribution.direct_logit_attribution")
def _(clean: int, corrupted: int) -> Tensor:
    return direct_logit_attribution(model(), prompt(clean), answer_tokens=7, incorrect_tokens=9).attribution


@runs("tools.analysis.logit_lens.logit_lens")
def _(clean: int, corrupted: int) -> Tensor:
    return logit_lens(model(), prompt(clean)).values


@runs("tools.analysis.logit_lens.logit_readout")
def _(clean: int, corrupted: int) -> Tensor:
    logits, cache = model().run_with_cache(prompt(clean))
    read = logit_readout(model(), cache["resid_post", -1][0, -1]).values
    torch.testing.assert_close(read.flatten(), logits[0, -1].detach(), atol=1e-4, rtol=1e-4)
    return read


# ---------------------------------------------------------------------- attribution, with images

EDGES = attribution_patching.EdgeAttributionConfig(granularity="edge")


@runs("tools.analysis.attribution_patching.attribution_patch")
def _(clean: int, corrupted: int) -> list[float]:
    found = attribution_patching.attribution_patch(model(), prompt(clean), prompt(corrupted), metric)
    return [float(score) for score in found.node_scores.values()]


@runs("tools.analysis.attribution_patching.faithfulness")
def _(clean: int, corrupted: int) -> list[float]:
    sides = prompt(clean), prompt(corrupted)
    found = attribution_patching.attribution_patch(model(), *sides, metric, EDGES)
    every = [edge for *edge, _ in found.top_edges(len(found.edge_scores))]
    few, whole = (
        attribution_patching.faithfulness(model(), *sides, metric, [tuple(edge) for edge in edges])
        for edges in (every[:20], every)
    )
    assert whole.recovered == pytest.approx(1, abs=1e-3)
    return [few.recovered, few.full_metric]


@runs("tools.analysis.attribution_patching.cache_activation_and_gradient")
def _(clean: int, corrupted: int) -> Tensor:
    kept = attribution_patching.cache_activation_and_gradient(model(), prompt(clean), metric)
    return kept.gradients["blocks.1.hook_mlp_out"]


@runs("tools.analysis.attribution_patching.capture_writer_outputs")
def _(clean: int, corrupted: int) -> Tensor:
    return attribution_patching.capture_writer_outputs(model(), prompt(clean))["blocks.1.hook_mlp_out"]


def _graph(clean: int) -> Any:
    return attribution_patching.cache_activation_and_gradient(
        model(), prompt(clean), metric, names_filter=lambda _: True
    )


@runs("tools.analysis.attribution_patching.enumerate_nodes", image=False)
def _(clean: int, corrupted: int) -> list[float]:
    return [len(attribution_patching.enumerate_nodes(model(), _graph(clean)))]


@runs("tools.analysis.attribution_patching.enumerate_edges", image=False)
def _(clean: int, corrupted: int) -> list[float]:
    return [len(attribution_patching.enumerate_edges(model(), _graph(clean)))]


# ---------------------------------------------------------------------- subspaces, with images


def _last(n: int) -> Tensor:
    return torch.full((n,), prompt(0).shape[1] - 1)


@runs("tools.analysis.interchange.collect_activations")
def _(clean: int, corrupted: int) -> Tensor:
    held = interchange.collect_activations(model(), LAYER, prompt(clean), two_classes, positions=_last(1))
    torch.testing.assert_close(held[0], cached(clean)[LAYER][0, -1].detach())
    return held


def _whole_space(clean: int) -> tuple[Any, Tensor]:
    """Everything at the last position is exchanged: the result is the plain run with that activation."""
    step = interchange.SubspaceInterchange(torch.eye(model().cfg.d_model))
    return step, cached(clean)[LAYER][:, -1]


def _patched(clean: int, corrupted: int) -> Tensor:
    def put(resid: Tensor, hook: Any) -> None:
        resid[:, -1] = cached(clean)[LAYER][:, -1]

    return model().run_with_hooks(prompt(corrupted), fwd_hooks=[(LAYER, put)])[:, -1, [7, 9]]


@runs("tools.analysis.interchange.run_with_intervention")
def _(clean: int, corrupted: int) -> Tensor:
    step, source = _whole_space(clean)
    tool = interchange.run_with_intervention
    found = tool(model(), LAYER, step, prompt(corrupted), source, two_classes, positions=_last(1))
    torch.testing.assert_close(found, _patched(clean, corrupted), atol=1e-4, rtol=1e-4)
    return found


@runs("tools.analysis.interchange.intervened_logits")
def _(clean: int, corrupted: int) -> Tensor:
    step, source = _whole_space(clean)
    tool = interchange.intervened_logits
    found = tool(model(), LAYER, step, prompt(corrupted), source, two_classes, positions=_last(1))
    torch.testing.assert_close(found, _patched(clean, corrupted).detach(), atol=1e-4, rtol=1e-4)
    return found


@runs("tools.analysis.interchange.fit_das")
def _(clean: int, corrupted: int) -> list[float]:
    """Batches are drawn from both sides by rows of numbers, which `Inputs` take as they take slices."""
    pairs = [model().as_inputs(make_prompt(hf_model(), seed=seed, batch=4, n_text=3)) for seed in (clean, 5)]
    targets = torch.tensor([0, 1, 0, 1])
    how: dict[str, Any] = {"rank": 2, "epochs": 3, "batch_size": 2, "lr": 0.1}
    places = {"base_positions": _last(4), "source_positions": _last(4)}
    return list(interchange.fit_das(model(), LAYER, *pairs, targets, two_classes, **how, **places).losses)


# ---------------------------------------------------------------------- weights, and text

WORDS = "USER: What color is the star? ASSISTANT:"


@runs("SVDInterpreter.SVDInterpreter", image=False)
def _(clean: int, corrupted: int) -> Tensor:
    return SVDInterpreter(model()).get_singular_vectors("OV", 1, 3, head_index=1)


@runs("tools.analysis.projection_kernel.attention_head_subspace_affinity", image=False)
def _(clean: int, corrupted: int) -> Tensor:
    """Overlap of what a head writes with what a later one reads, from bases by QR and not by the tool's way."""
    found = attention_head_subspace_affinity(model(), target_role="Q")
    spans = [torch.linalg.qr(x)[0] for x in (model().W_O[0, 1].T, model().W_Q[1, 0])]
    expected = (spans[0].T @ spans[1]).pow(2).sum()
    assert float(found.scores[0, 1, 1, 0]) == pytest.approx(float(expected), rel=1e-4)
    return found.scores[found.valid_mask]


@runs("tools.training.train", image=False)
def _(clean: int, corrupted: int) -> Tensor:
    learner = HookedLLaVA.from_hf(make_hf_model(seed=3))
    rows = torch.randint(6, 99, (4, 5))
    learner.requires_grad_(True)
    before = learner(rows, return_type="loss").detach()
    config = training.TrainConfig(num_epochs=3, batch_size=2, lr=1e-2, device="cpu", print_every=None)
    trained: Any = training.train(learner, config, [{"tokens": row} for row in rows])  # type: ignore[arg-type]
    after = trained.eval()(rows, return_type="loss").detach()
    assert after < before
    return after


@runs("evals.sanity_check", image=False)
def _(clean: int, corrupted: int) -> Tensor:
    with pytest.warns(PromptWithoutTemplate):
        return evals.sanity_check(model()).detach()


@runs("evals.evaluate_on_dataset")
def _(clean: int, corrupted: int) -> list[float]:
    """What a loader yields as tokens may be `Inputs`; image tokens are predicted as any other, so the loss is large."""
    return [evals.evaluate_on_dataset(model(), [{"tokens": prompt(clean)}], device="cpu")]


@runs("evals.evaluate", image=False)
def _(clean: int, corrupted: int) -> list[float]:
    """Its data sets are downloaded: two rows of text stand for each."""
    with pytest.MonkeyPatch.context() as patch:
        own = [{"tokens": model().to_tokens(WORDS)}] * 2
        patch.setattr(evals, "DATASET_LOADERS", [lambda tokenizer, batch_size: own] * len(evals.DATASET_NAMES))
        patch.setattr(evals, "evaluate_on_dataset", functools.partial(evals.evaluate_on_dataset, device="cpu"))
        return list(evals.evaluate(model()).values())


@runs("evals.induction_loss", image=False)
def _(clean: int, corrupted: int) -> Tensor:
    """It draws token ids up to 20000."""
    large = HookedLLaVA.from_hf(
        make_hf_model(text={"vocab_size": 20_000, "max_position_embeddings": 64}), processor=make_processor()
    )
    return evals.induction_loss(large, batch_size=2, subseq_len=12, device="cpu")


@runs("evals.ioi_eval", image=False)
def _(clean: int, corrupted: int) -> list[float]:
    tokens = {name: model().to_tokens(f"What color is the {name}", prepend_bos=False)[0] for name in ("star", "ring")}
    sample = {"prompt": tokens["star"], "IO": tokens["star"], "S": tokens["ring"]}
    return list(evals.ioi_eval(model(), dataset=[sample] * 2, batch_size=2).values())


@runs("evals.mmlu_eval", image=False)
def _(clean: int, corrupted: int) -> list[float]:
    asked = {"question": "What color is the star?", "choices": ["red", "blue", "green", "white"], "answer": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evals, "make_mmlu_data_loader", lambda **_: [asked | {"subject": "stars"}])
        found = evals.mmlu_eval(model())
    return [found["accuracy"], found["num_total"]]


@runs("utilities.exploratory_utils.test_prompt", image=False)
def _(clean: int, corrupted: int) -> list[float]:
    exploratory_utils.test_prompt("What color is the", "star", model(), print_details=False)
    return [1.0]


@runs("lit.utils.get_tokens_from_model", image=False)
def _(clean: int, corrupted: int) -> Tensor:
    words, ids = lit_utils.get_tokens_from_model(model(), WORDS)
    assert len(words) == len(ids)
    return ids


@runs("lit.utils.get_model_info", image=False)
def _(clean: int, corrupted: int) -> list[float]:
    return [lit_utils.get_model_info(model())[name] for name in ("n_layers", "n_heads", "d_model")]


@runs("lit.utils.compute_token_gradients", image=False)
def _(clean: int, corrupted: int) -> Tensor:
    """The gradient of the embeddings in the same run of our own."""
    norms, along, words = lit_utils.compute_token_gradients(model(), WORDS)
    ids, leaf = model().to_tokens(WORDS), []
    keep = [("hook_embed", lambda x, hook: leaf.append(x.detach().requires_grad_()) or leaf[0])]
    model().run_with_hooks(ids, fwd_hooks=keep)[0, -1, ids[0, 0]].backward()
    torch.testing.assert_close(torch.tensor(norms), leaf[0].grad[0].norm(dim=-1), atol=1e-4, rtol=1e-4)
    assert len(words) == len(along)
    return torch.tensor(along)


@runs("lit.model.TransformerLensLIT", "lit.model.HookedTransformerLIT", image=False)
def _(clean: int, corrupted: int) -> list[float]:
    """The page needs lit-nlp; what it shows does not."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        patch.setattr(lit_model, "_ensure_lit_available", lambda: None)
        config = lit_model.TransformerLensLITConfig(top_k=2)
        shown = [tool(model(), config) for tool in (lit_model.TransformerLensLIT, lit_model.HookedTransformerLIT)]
        found = [next(iter(page.predict([{"text": WORDS}]))) for page in shown]
    return [p for one in found for row in one["top_k_tokens"] for _, p in row]


# ---------------------------------------------------------------------- what cannot run

CANNOT: dict[str, tuple[Callable[[], Any], type[BaseException], str]] = {
    "tools.analysis.jacobian_lens.JacobianLens": (
        *(lambda: JacobianLens.fit(model(), [WORDS], corpus="own"), TypeError, "TransformerBridge only"),
    ),
    "tools.analysis.interchange.reinitialized": (
        *(lambda: interchange.reinitialized(model(), 0), ValueError, "reset_parameters"),
    ),
    "utilities.defaults_utils.LocallyOverridenDefaults": (
        *(lambda: LocallyOverridenDefaults(model(), prepend_bos=False).__enter__(), AttributeError, "prepend_bos"),
    ),
    "utilities.devices.move_to_and_update_config": (
        *(lambda: move_to_and_update_config(model(), torch.float32, False), AttributeError, "dtype"),
    ),
}  # fmt: skip
"""Each with a call, and what it says; docs/howto/from-transformerlens.md has the reasons."""
