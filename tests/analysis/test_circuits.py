"""A circuit's run is that of a model whose readers sum up clean and corrupted outputs edge by edge."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from hooked_llava.analysis.attribution_patching import edge_attribution
from hooked_llava.analysis.circuits import circuit, faithfulness_curve
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.readout.metrics import teacher_forced
from tests.builders import make_hf_model
from tests.known_mechanism import ROUTED, model_of, pair_of
from tests.oracles.naive_circuit import circuit_logits
from tests.pairs import FAMILY, as_users_run, pair

KEYS = ("input_ids", "pixel_values", "attention_mask")


def metric(logits: torch.Tensor) -> torch.Tensor:
    return logits[..., 4] - logits[..., 9]


def two_prompts(geometry: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    models = pair(geometry, torch.float64)
    clean, corrupted = (dict(models.prompt(seed=seed, n_text=4)) for seed in (1, 2))
    corrupted["input_ids"] = clean["input_ids"]
    return models, clean, corrupted


def is_inside(edges: xr.Dataset) -> Any:
    """Whether an edge, by the names of sender and receiver, is in a circuit."""

    def inside(sender: str, receiver: str) -> bool:
        row = edges.sel(receiver=receiver)
        layer, _, head = sender.removesuffix(" mlp").removeprefix("L").partition("H")
        own = row.embed if sender == "embed" else row.heads[int(layer), int(head)] if head else row.mlps[int(layer)]
        return bool(own)

    return inside


@pytest.mark.parametrize("geometry", ["plain", "grouped", "biases"])
def test_a_circuits_run_sums_up_clean_and_corrupted_outputs(geometry: str) -> None:
    models, clean, corrupted = two_prompts(geometry)
    scores = edge_attribution(models.ours, clean, corrupted, metric=metric)
    n_edges = sum(int(np.isfinite(scores[name]).sum()) for name in scores)
    sizes = [0, 7, n_edges // 2, n_edges]
    found = faithfulness_curve(models.ours, clean, corrupted, scores, sizes, metric, n_random=0, batch_size=3)
    assert found.n_edges == n_edges
    for n, value in zip(sizes, found.faithfulness.values[0], strict=True):
        logits = circuit_logits(models.slow, clean, corrupted, is_inside(circuit(scores, n)))
        expected = (float(metric(logits[-1])) - found.corrupted) / (found.clean - found.corrupted)
        assert value == pytest.approx(expected, abs=1e-6), n
    assert found.faithfulness.values[0, [0, -1]] == pytest.approx([0, 1], abs=1e-6)
    assert not np.allclose(found.faithfulness.values[0, 1:3], [0, 1], atol=0.01)


def test_random_circuits_of_the_same_size_are_the_control() -> None:
    models, clean, corrupted = two_prompts("plain")
    scores = edge_attribution(models.ours, clean, corrupted, metric=metric)
    found = faithfulness_curve(models.ours, clean, corrupted, {"a": scores, "b": -scores}, [0, 20], metric, n_random=2)
    assert dict(found.sizes) == {"scores": 2, "size": 2, "draw": 2}
    assert found.random[:, 0].values == pytest.approx([0, 0], abs=1e-6)
    assert found.random[0, 1] != found.random[1, 1]
    assert found.faithfulness[0].values == pytest.approx(found.faithfulness[1].values), "signs do not count"


def test_an_answer_of_several_tokens_and_several_pairs() -> None:
    models, one, other = two_prompts("plain")
    forced = [teacher_forced(models.ours, side, [8, 9]) for side in (one, other)]
    clean, corrupted = (one.inputs for one in forced)
    read: dict[str, Any] = {"metric": forced[0].metric, "logit_positions": forced[0].positions}
    scores = edge_attribution(models.ours, [clean, clean], [corrupted, corrupted], **read)
    found = faithfulness_curve(models.ours, [clean] * 2, [corrupted] * 2, scores, [25], n_random=0, **read)
    assert found.faithfulness.dims == ("pair", "scores", "size")
    prompts = [{key: getattr(one, key) for key in KEYS} for one in (clean, corrupted)]
    logits = circuit_logits(models.slow, prompts[0], prompts[1], is_inside(circuit(scores, 25)))
    value = float(forced[0].metric(logits[forced[0].positions]))
    ends = [
        float(found.attrs[name][0]) if isinstance(found.attrs[name], list) else float(found.attrs[name])
        for name in ("clean", "corrupted")
    ]
    assert found.faithfulness.values[:, 0, 0] == pytest.approx((value - ends[1]) / (ends[0] - ends[1]), abs=1e-6)


def test_a_run_costs_no_more_than_the_positions_from_the_first_difference_on() -> None:
    models, clean, _ = two_prompts("plain")
    changed = {**clean, "input_ids": clean["input_ids"].clone()}
    changed["input_ids"][0, -2] = 9 if int(clean["input_ids"][0, -2]) != 9 else 8
    scores = edge_attribution(models.ours, clean, changed, metric=metric)
    found = faithfulness_curve(models.ours, clean, changed, scores, [0, 20, 40], metric, n_random=1)
    assert found.n_forward == 2
    assert 0 < found.work <= 6 * 2 / clean["input_ids"].shape[1]
    assert found.faithfulness.values[0, 0] == pytest.approx(0, abs=1e-6)


MECHANISM = {
    ("direct", "color"): {("embed", "L3H0 v"), ("L3H0", "logits")},
    ("direct", "shape"): {("embed", "L1H2 v"), ("L1H2", "L3H0 q"), ("L3H0", "logits")},
    ("two_hops", "color"): {("embed", "L1H1 v"), ("L1H1", "L3H3 v"), ("L3H3", "logits")},
    ("two_hops", "shape"): {("embed", "L1H1 q"), ("L1H1", "L3H3 v"), ("L3H3", "logits")},
}
"""The edges on which the two prompts of a pair differ and which the answer needs."""


@pytest.mark.parametrize(("variant", "datum"), ROUTED)
def test_the_mechanism_is_a_faithful_circuit(variant: str, datum: str) -> None:
    model = model_of(variant)
    clean, corrupted = pair_of(model, datum)
    scores = edge_attribution(model, clean, corrupted, steps=4)
    wanted = MECHANISM[variant, datum]
    by_hand = xr.zeros_like(scores).where(np.isfinite(scores))
    for rank, (sender, receiver) in enumerate(sorted(wanted)):
        row = by_hand.sel(receiver=receiver)
        layer, _, head = sender.removeprefix("L").partition("H")
        own = row.embed if sender == "embed" else row.heads[int(layer), int(head)]
        own += 1 + rank
    n = len(wanted)
    found = faithfulness_curve(model, clean, corrupted, by_hand, [0, n - 1, n], n_random=1, choose="top")
    assert found.faithfulness.values[0] == pytest.approx([0, 0, 1], abs=0.02)
    assert found.random.values[0, -1] == pytest.approx(0, abs=0.02)
    if datum == "color":
        chosen = faithfulness_curve(model, clean, corrupted, {"EAP-IG": scores}, [n], n_random=0)
        assert chosen.faithfulness.values.item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("choose", ["greedy", "top"])
def test_circuits_are_nested(choose: Any) -> None:
    models, clean, corrupted = two_prompts("grouped")
    scores = edge_attribution(models.ours, clean, corrupted, metric=metric)
    before = circuit(scores, 0, choose=choose)
    for n in (1, 9, 40, 41):
        now = circuit(scores, n, choose=choose)
        assert sum(int(now[name].sum()) for name in now) == n
        assert all(bool((now[name] | ~before[name]).all()) for name in now)
        before = now
    if choose == "greedy":
        fed = [
            str(r) for r in now.receiver.values[now.heads.any(("layer", "head")) | now.mlps.any("layer") | now.embed]
        ]
        speaks = {f"L{i} mlp" for i in range(3) if bool(now.mlps[:, i].any())}
        speaks |= {f"L{i}H{h}" for i in range(3) for h in range(6) if bool(now.heads[:, i, h].any())}
        for receiver in set(fed) - {"logits"}:
            layer, _, rest = receiver.partition("H")
            head, _, kind = rest.partition(" ")
            group = (
                [receiver]
                if not rest
                else [f"{layer}H{head}"]
                if kind == "q"
                else [f"{layer}H{3 * int(head) + i}" for i in range(3)]
            )
            assert set(group) & speaks, receiver
    else:
        sizes = abs(np.concatenate([scores[n].values.ravel() for n in ("heads", "mlps", "embed")]))
        least = min(float(abs(scores[n].where(now[n])).min()) for n in ("heads", "mlps", "embed") if bool(now[n].any()))
        assert least >= np.sort(sizes[np.isfinite(sizes)])[-41]


def test_what_does_not_fit_is_refused() -> None:
    models, clean, corrupted = two_prompts("plain")
    scores = edge_attribution(models.ours, clean, corrupted, metric=metric)
    run = lambda *args, **options: faithfulness_curve(models.ours, clean, corrupted, *args, metric=metric, **options)  # noqa: E731
    with pytest.raises(InputError, match=r"n=100000.*0 to \d+"):
        circuit(scores, 100_000)
    with pytest.raises(InputError, match=r"n=-1 edges"):
        run(scores, [-1])
    with pytest.raises(InputError, match=r"choose='best'.*'greedy'"):
        circuit(scores, 1, choose="best")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="edge_scores is Dataset.*edge_attribution"):
        run(scores[["heads"]], [1])
    with pytest.raises(InputError, match=r"sizes=\[\]"):
        run(scores, [])
    with pytest.raises(InputError, match=r"n_random=-1"):
        run(scores, [1], n_random=-1)
    with pytest.raises(InputError, match=r"'edges'.*senders.*receivers"):
        run(scores.isel(receiver=slice(1, None)), [1])
    with as_users_run(), pytest.raises(InputError, match="of both runs"):
        faithfulness_curve(models.ours, clean, clean, scores, [1], metric)
    phi = HookedLLaVA.from_hf(make_hf_model(**FAMILY["phi-clip"]))
    with pytest.raises(InputError, match="path_patching"):
        faithfulness_curve(phi, clean, corrupted, scores, [1], metric)
