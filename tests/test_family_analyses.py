"""Every analysis, edit and re-run on every language model: what Replay computes equals full runs with the same hooks.

The analyses run twice: with the engine, and with each of its re-runs replaced by a full hooked run of the whole prompt.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_llava import analysis
from hooked_llava.editing import EditRequest, key_covariance, key_covariances, memit, multedit, rome
from hooked_llava.errors import HookNameError, InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.patch_maps import PATCH_MAPS
from hooked_llava.readout.metrics import Answer, log_probability
from hooked_llava.replay import Intervention, Replay
from hooked_llava.replay.layer_pass import LayerPass
from tests.analyses import (
    LANGUAGES,
    MAPS,
    TILED,
    all_analyses,
    change_at,
    data_analyses,
    hf_of,
    left_padded,
    model_of,
    numbers,
    patching_analyses,
    prompt,
    prompts,
    reading_analyses,
)
from tests.builders import make_hf_model
from tests.oracles.naive_interventions import run_naively
from tests.oracles.naive_trace import trace_in_transformers
from tests.pairs import FAMILY, off

_ENGINE = LayerPass.logits
SHARES = {"control", "answer_kept", "total_answer_kept"}
"""What of a random model may well be 0: labels that are guessed, answers that are kept."""
each = pytest.mark.parametrize("name", LANGUAGES)
every = pytest.mark.parametrize("name", [*LANGUAGES, *TILED])


def test_the_list_of_analyses_is_whole() -> None:
    """What takes a model is in it, and every way to draw a patch map."""
    source = Path(inspect.getfile(all_analyses)).read_text()
    functions = [getattr(analysis, name) for name in analysis.__all__]
    takes_a_model = [
        f for f in functions if inspect.isfunction(f) and next(iter(inspect.signature(f).parameters)) == "model"
    ]
    assert len(takes_a_model) > 25
    lists_of_heads = {"heads_by_layer", "random_heads"}  # run nothing
    assert {f.__name__ for f in takes_a_model if f"analysis.{f.__name__}(" not in source} == lists_of_heads
    drawn = {how["method"] for how in MAPS} | set(re.findall(r'method="(\w+)"', source))
    assert not set(PATCH_MAPS) - drawn


def naive_logits(self: LayerPass) -> Tensor:
    """In place of `LayerPass.logits`: a full forward pass of the whole prompt for each run, with its interventions as hooks."""
    if self._listen:  # a branch keeps what its pass records
        return _ENGINE(self)
    model, inputs = self.model, self.state.inputs
    rows = []
    for run in sorted(self.runs, key=lambda run: run.index):
        hooks: list[Any] = [bound.intervention for bound in (*run.image, *run.language)]
        if not run.image:  # a branch has embeddings of its own
            hooks.insert(0, ("hook_embed", lambda x, hook: self.kept.entering(0)))
        logits = model.run_with_hooks(inputs, fwd_hooks=hooks)
        assert logits is not None
        rows.append(logits.gather(1, self.wanted[..., None].expand(-1, -1, logits.shape[-1])))
    return torch.stack(rows).detach()


# ---------------------------------------------------------------------- Replay


@each
@torch.no_grad()
def test_replay_equals_the_full_run_at_every_hook(name: str) -> None:
    model = model_of(name)
    for inputs in (prompts(name)[0], model.as_inputs(left_padded([prompts(name)[0], prompt(name, "Who?", 2)]))):
        n, real = inputs.shape[1], inputs.attention_mask
        runs = [
            [change]
            for hook in model.hooks_table.hooks.values()
            if hook.layer in (None, 1, 2)
            for change in _changes_at(model, hook, inputs)
        ]
        fast = Replay(model, inputs).run(runs, positions=list(range(n)))
        fast = fast if fast.ndim == 4 else fast[:, None]
        plain = model(inputs)
        for run, own, theirs in zip(runs, fast, run_naively(model, inputs, runs), strict=True):
            assert off(own[real], theirs[real]) <= 1e-5, run
            assert off(theirs[real], plain[real]) > 1e-4, f"{run} changes nothing"


def _changes_at(model: HookedLLaVA, hook: Any, inputs: Any) -> list[Intervention]:
    """What changes the logits: a vector added in the middle of the prompt; edges blocked or weighted, and temperature."""
    if hook.site != "attn.hook_attn_scores":
        return [change_at(model, hook, inputs)]
    sharper = Intervention(hook.name, temperature=0.1)
    if hook.on_image_side:
        return [change_at(model, hook, inputs), sharper]
    n = inputs.shape[1]
    more = Intervention(hook.name, reweight=([n - 3], [n - 1, n - 2]), factor=8.0)
    return [change_at(model, hook, inputs), more, sharper]


# ---------------------------------------------------------------------- analyses


@every
def test_analyses_that_re_run_equal_full_hooked_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    analyses = patching_analyses(model, *prompts(name))
    fast = {what: numbers(run()) for what, run in analyses.items()}
    monkeypatch.setattr(LayerPass, "logits", naive_logits)
    for what, run in analyses.items():
        assert max(float(np.nanstd(values)) for values in fast[what].values()) > 1e-4, f"{what}: no effect"
        for key, slow in numbers(run()).items():
            own = fast[what][key]
            assert np.isfinite(own).any(), (what, key)
            scale = max(1.0, float(np.nanmax(np.abs(slow))))
            assert np.array_equal(np.isnan(own), np.isnan(slow)), (what, key)
            assert float(np.nanmax(np.abs(own - slow))) <= 1e-5 * scale, (what, key)


@every
def test_analyses_that_read_run(name: str) -> None:
    model = model_of(name)
    given = model, *prompts(name)
    for what, run in {**reading_analyses(*given), **data_analyses(*given)}.items():
        result = run()
        parts = numbers(result)
        assert parts or what == "next", what
        for key, values in parts.items():
            assert np.isfinite(values).any(), (what, key)
            if "mistral" not in name:  # there the window of the last position holds no patch, in any layer
                assert key in SHARES or np.nanmax(np.abs(values)) > 0, (what, key)


@every
def test_inputs_that_were_run_in_inference_mode_have_gradients_later(name: str) -> None:
    """What inputs keep from their first run serves every run."""
    model, (clean, _) = model_of(name), prompts(name)
    fresh = clean[0]
    with torch.inference_mode():
        model(fresh)
    leaf: list[torch.Tensor] = []
    model.run_with_hooks(
        fresh, fwd_hooks=[("hook_image_embed", lambda x, hook: leaf.append(x.detach().requires_grad_()) or leaf[0])]
    )[0, -1, 7].backward()
    assert leaf[0].grad is not None
    assert float(leaf[0].grad.abs().max()) > 0 or "mistral" in name


@every
def test_sums_hold(name: str) -> None:
    model = model_of(name)
    clean, other = prompts(name)
    parts = analysis.logit_attribution(model, clean, "red", baseline="blue")
    assert float(parts.sum()) == pytest.approx(parts.attrs["logit"], abs=1e-4)
    assert ("unembed_bias" in parts.component.values) == ("ln_final_bias" in parts.component.values) == ("phi" in name)
    scores = analysis.layer_scores(model, clean, "red")
    gained = scores.log_probability - scores.log_probability_of_embedding
    assert float(scores.sum()) == pytest.approx(gained, abs=1e-4)
    assert ("mlp_given" in scores.attrs) == ("phi" in name)
    for by in ("head", "layer", "neuron", "source", "patch"):
        assert np.isfinite(analysis.logit_attribution(model, clean, "red", by=by).values).all()
    last = analysis.answer_probability(model, clean, "red")
    log_p = model(clean)[0, -1].detach().log_softmax(-1)[model.to_single_token("red")]
    assert scores.log_probability == pytest.approx(float(log_p), abs=1e-4)
    assert last is not None
    metric = log_probability(Answer.of(model, "red"))
    edges = analysis.edge_attribution(model, clean, other, metric=metric)
    nodes = analysis.attribution_patching(model, clean, other, hooks=["z", "mlp_out", "hook_embed"], metric=metric)
    summed = edges.heads.sum("receiver", skipna=True)
    assert np.allclose(summed, nodes["z"].sum("position"), atol=1e-4 * float(np.abs(nodes["z"]).max() + 1))
    assert np.allclose(edges.mlps.sum("receiver"), nodes["mlp_out"].sum("position"), atol=1e-3)
    assert float(edges.embed.sum()) == pytest.approx(float(nodes["hook_embed"].sum()), abs=1e-3)


def test_what_a_parallel_block_lacks_is_refused_with_what_stands_for_it() -> None:
    model = model_of("phi-clip")
    clean, other = prompts("phi-clip")
    metric = log_probability(Answer.of(model, "red"))
    with pytest.raises(HookNameError, match=r"resid_mid.*side by side.*resid_pre"):
        analysis.activation_patching(model, clean, other, hook="resid_mid", metric=metric)
    with pytest.raises(HookNameError, match=r"mlp_in.*side by side"):
        Replay(model, clean).run([[Intervention("blocks.1.hook_mlp_in", zero=True)]])
    with pytest.raises(InputError, match=r"\('mlp', 1\).*edge_attribution"):
        analysis.path_patching(model, clean, other, receivers=[("mlp", 1)], metric=metric)
    _, cache = model.run_with_cache(clean)
    whole = cache.decompose_resid(3).sum(0)
    assert torch.allclose(whole, cache["resid_post", 2], atol=1e-5)
    assert torch.allclose(cache.accumulated_resid(3)[-1], cache["resid_post", 2])
    for refused in (
        lambda: cache.decompose_resid(2, mlp_input=True),
        lambda: cache.accumulated_resid(2, incl_mid=True),
        lambda: cache.apply_ln_to_stack(whole[None], 2, mlp_input=True),
        lambda: cache.get_full_resid_decomposition(2, True),
        lambda: model.accumulated_bias(2, mlp_input=True),
    ):
        with pytest.raises(InputError, match=r"mlp_input|incl_mid"):
            refused()
    assert cache.vision.decompose_resid(1, mlp_input=True).shape[0] > 1


# ---------------------------------------------------------------------- traces and edits


@pytest.mark.parametrize("name", ["llama-clip", "phi-clip"])
def test_a_trace_is_transformers_runs_with_outputs_overwritten(name: str) -> None:
    """In a parallel block too, where restoring a layer's attention does not reach its MLP."""
    model, clean = model_of(name), prompts(name)[0]
    other = prompt(name, "What is the circle?", 0)
    assert clean.shape == other.shape
    (star,) = clean.token_map.find("star")
    cells = [
        (kind, layer, at) for kind in ("mlp", "attn", "resid") for layer in (0, 2) for at in (star, clean.shape[1] - 1)
    ]
    fields = [{"input_ids": one.input_ids, "pixel_values": one.pixel_values} for one in (clean, other)]
    p_clean, p_other, restored = trace_in_transformers(hf_of(name), *fields, cells)
    trace = analysis.causal_trace(model, clean, "star", corruption="circle", kinds=("mlp", "attn", "resid"))
    assert float(trace.p_clean) == pytest.approx(p_clean, rel=1e-4)
    assert float(trace.p_corrupted) == pytest.approx(p_other, rel=1e-4)
    for (kind, layer, at), p in zip(cells, restored, strict=True):
        effect = float(trace.indirect_effect.sel(kind=kind, layer=layer, position=at))
        assert effect == pytest.approx(p - p_other, rel=1e-3, abs=1e-6), (kind, layer, at)
    assert max(restored) > p_other


@each
@pytest.mark.parametrize("method", [multedit, rome, memit])
def test_edits_do_what_they_say_in_transformers_too_and_are_reverted(name: str, method: Any) -> None:
    model = HookedLLaVA.from_hf(hf := make_hf_model(**FAMILY[name]), model_of(name).processor)
    clean, _ = prompts(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    token = model.to_single_token("blue")
    plain = model(clean)[0, -1].log_softmax(-1)[token]
    request = EditRequest(clean, "blue")
    if method is multedit:
        edit = multedit(model, request, layer=1, position="last")
    elif method is rome:
        edit = rome(model, request, key_covariance(model, list(prompts(name)), layer=1), position="last", lam=0.1)
    else:
        edit = memit(model, request, key_covariances(model, list(prompts(name)), [0, 1]), position="last", lam=0.1)
    with edit.applied():
        edited = model(clean)
        assert edited[0, -1].log_softmax(-1)[token] > plain + 0.1
        fields = {"input_ids": clean.input_ids, "pixel_values": clean.pixel_values}
        assert off(edited, hf(**fields).logits) <= 1e-5
        replayed = Replay(model, clean).run([[Intervention("blocks.2.attn.hook_z", positions="last", zero=True)]])
        hooked = run_naively(model, clean, [[Intervention("blocks.2.attn.hook_z", positions="last", zero=True)]])
        assert off(replayed[0], hooked[0, 0, -1]) <= 1e-5
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
