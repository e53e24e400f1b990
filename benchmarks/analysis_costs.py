"""What each analysis costs in forward passes, counted by torch while it runs: `python -m benchmarks.analysis_costs`.

Multiplications of all matrix products and convolutions, backward passes included, over those of one forward pass of the same
prompt with all logits. They are the same on every machine; seconds also hold reading, writing and Python.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks._measure import arguments, markdown, start, write
from benchmarks._models import POSITIONS, hf_config, random_hf_model, random_prompt, sizes
from benchmarks.knockout import EDGES, with_asked_spans
from hooked_llava import Intervention, Replay, analysis
from hooked_llava.experiments import Noise
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs

OUTPUTS = ["attn at question", "mlp at question", "attn at last", "mlp at last"]
STEPS = 4
_ANSWER, _BASELINE = 7, 9  # any two tokens: what is counted is the same for all


@dataclass(frozen=True)
class Subject:
    """What is analysed.

    Attributes:
        model (HookedLLaVA): The model.
        inputs (Inputs): One prompt with the spans image, question, object and last.
        other (Inputs): The same words with another image.
    """

    model: HookedLLaVA
    inputs: Inputs
    other: Inputs

    @property
    def layers(self) -> range:
        """All of the language model."""
        return range(self.model.cfg.n_layers)

    @property
    def named(self) -> int:
        """The position of a word in the middle of the question, which is traced and patched."""
        return self.inputs.token_map["question"][len(self.inputs.token_map["question"]) // 2]


Call = Callable[[Subject], Any]


def _difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[..., _ANSWER] - logits[..., _BASELINE]


def _map(subject: Subject, method: str, **options: Any) -> Any:
    return analysis.patch_importance(subject.model, subject.inputs, _ANSWER, method=method, **options)


def _edges(subject: Subject, steps: int) -> Any:
    return analysis.edge_attribution(subject.model, subject.inputs, subject.other, metric=_difference, steps=steps)


def _softened(subject: Subject) -> Any:
    where: dict[str, Any] = {"positions": "question|last", "temperature": 2.0}
    return Replay(subject.model, subject.inputs).run(
        [[Intervention(("attn_scores", i), **where)] for i in subject.layers]
    )


def _without(subject: Subject, positions: str) -> Any:
    by_layer = analysis.heads_by_layer(subject.model)
    return analysis.ablate_heads(subject.model, subject.inputs, by_layer, _ANSWER, replace="zero", positions=positions)


def _patchscope(subject: Subject) -> Any:
    into = {"target": subject.inputs, "target_position": subject.named, "max_new_tokens": 1}
    return analysis.patchscope(subject.model, subject.inputs, positions="question", **into)


def _patched(subject: Subject, **how: Any) -> Any:
    return analysis.activation_patching(subject.model, subject.inputs, subject.other, metric=_difference, **how)


def _faithfulness(subject: Subject) -> Any:
    given = subject.model, subject.inputs, subject.other
    return analysis.faithfulness_curve(*given, _edges(subject, 0), [0, 100], _difference, n_random=1)


def _probe(subject: Subject) -> Any:
    prompts = [subject.inputs, subject.other] * 2
    return analysis.probe_linear(subject.model, prompts, ["a", "b"] * 2, tokens="question", folds=2)


def _deletion(subject: Subject) -> Any:
    ranked = {"map": _map(subject, "attention")}
    return analysis.deletion_curves(subject.model, subject.inputs, ranked, shares=(0, 0.5, 1))


CALLS: Mapping[str, Call] = {
    "next_tokens": lambda s: analysis.next_tokens(s.model, s.inputs),
    "image_attention": lambda s: analysis.image_attention(s.model, s.inputs),
    "attention_contribution": lambda s: analysis.attention_contribution(s.model, s.inputs, [s.named]),
    "attention_to_object, two prompts": lambda s: analysis.attention_to_object(s.model, s.inputs, s.other, "object"),
    "heads_by_attention": lambda s: analysis.heads_by_attention(s.model, s.inputs, "object"),
    "logit_attribution, neurons": lambda s: analysis.logit_attribution(s.model, s.inputs, _ANSWER, _BASELINE, by="neuron"),
    "head_scores": lambda s: analysis.head_scores(s.model, s.inputs, _ANSWER),
    "layer_scores": lambda s: analysis.layer_scores(s.model, s.inputs, _ANSWER),
    "neuron_scores": lambda s: analysis.neuron_scores(s.model, s.inputs, _ANSWER),
    "position_scores, 3 heads": lambda s: analysis.position_scores(s.model, s.inputs, _ANSWER, heads=3),
    "information_storage, 20 patches": lambda s: analysis.information_storage(
        s.model, s.inputs, _ANSWER, _BASELINE, positions="image", top=20
    ),
    "head_readings": lambda s: analysis.head_readings(s.model, s.inputs, 1, 1, _ANSWER),
    "patch_importance, log increase": lambda s: _map(s, "log_increase"),
    "patch_importance, attention": lambda s: _map(s, "attention"),
    "patch_importance, TAM": lambda s: _map(s, "tam"),
    "patch_importance, Grad-CAM": lambda s: _map(s, "grad_cam", layer=s.model.cfg.n_layers // 2),
    "answer_maps, 3 tokens": lambda s: analysis.answer_maps(s.model, s.inputs, [_ANSWER, _BASELINE, 8]),
    "sink_positions": lambda s: analysis.sink_positions(s.model, s.inputs),
    "logit_lens at every patch": lambda s: analysis.logit_lens(s.model, s.inputs, positions="image"),
    "lens_kl, three lenses": lambda s: analysis.lens_kl(s.model, [s.inputs], lens=analysis.TunedLens.identity(s.model)),
    f"train_tuned_lens, {STEPS} steps": lambda s: analysis.train_tuned_lens(s.model, [s.inputs], steps=STEPS, progress=False),
    "ablate_heads, every layer, last position": lambda s: _without(s, "last"),
    "ablate_heads, every layer, question": lambda s: _without(s, "question"),
    "attention_knockout, six edges, every window": lambda s: analysis.attention_knockout(s.model, s.inputs, EDGES, 1),
    "the same edges, weighted": lambda s: analysis.attention_knockout(s.model, s.inputs, EDGES, 1, factor=0.3),
    "output_knockout, four outputs, every window": lambda s: analysis.output_knockout(s.model, s.inputs, OUTPUTS, 1),
    "temperature of every layer, question and last": _softened,
    "causal_trace, three kinds": lambda s: analysis.causal_trace(s.model, s.inputs, [s.named], corruption=Noise()),
    "patchscope of the question, every layer": _patchscope,
    "activation_patching, every head, last position": lambda s: _patched(s, hook="z", positions="last"),
    "activation_patching, residual stream, question": lambda s: _patched(
        s, hook="resid_pre", positions=list(s.inputs.token_map["question"])
    ),
    "path_patching, every head to the logits": lambda s: analysis.path_patching(
        s.model, s.inputs, s.other, receivers=["logits"], metric=_difference
    ),
    "attribution_patching": lambda s: analysis.attribution_patching(s.model, s.inputs, s.other, metric=_difference),
    "edge_attribution (EAP)": functools.partial(_edges, steps=0),
    f"edge_attribution, {STEPS} steps (EAP-IG)": functools.partial(_edges, steps=STEPS),
    "EAP, and 4 circuits of its edges or random ones": _faithfulness,
    "answer_without, two heads": lambda s: analysis.answer_without(s.model, s.inputs, _ANSWER, heads=[(0, 1), (1, 0)]),
    "a map, deletion and insertion of half its patches": _deletion,
    "probe_linear, 4 prompts": _probe,
}  # fmt: skip
"""Each is one call; what it is counted in is one forward pass of the same prompt."""


def _fused_attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """As torch counts the kernels of an accelerator; it leaves out the one of the CPU."""
    return sdpa_flop_count(query, key, value)


_KERNELS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention}  # noqa: SLF001


def multiplications(call: Callable[[], Any]) -> int:
    """Of all matrix products and convolutions while it runs, backward passes included."""
    with FlopCounterMode(display=False, custom_mapping=_KERNELS) as counted:
        call()
    return counted.get_total_flops() // 2


def forwards(call: Callable[[], Any], model: HookedLLaVA, inputs: Inputs) -> float:
    """Multiplications of a call over those of one forward pass of these inputs, with all logits."""
    return multiplications(call) / multiplications(lambda: model(inputs))


def subject_of(hf_model: Any, prompt: Mapping[str, torch.Tensor]) -> Subject:
    """A prompt of Hugging Face's model, with the spans of a question and an object."""
    model = HookedLLaVA.from_hf(hf_model)
    inputs = with_asked_spans(model.as_inputs(dict(prompt)))
    assert inputs.pixel_values is not None
    return Subject(model, inputs, replace(inputs, pixel_values=inputs.pixel_values.flip(-1)))


def measure(geometry: str) -> dict[str, Any]:
    """What every call costs, by name."""
    config, n_positions = hf_config(geometry), POSITIONS[geometry]
    subject = subject_of(random_hf_model(config), random_prompt(config, n_positions))
    counted = {}
    for name, call in CALLS.items():
        counted[name] = round(forwards(functools.partial(call, subject), subject.model, subject.inputs), 4)
        print(f"  {name}: {counted[name]:.2f}", flush=True)
    return {"forwards": counted, "sizes": sizes(config, n_positions)}


def table(geometry: str, measured: Mapping[str, Any]) -> str:
    """A row for each call."""
    cells = {name: [f"{value:.2f}"] for name, value in measured["forwards"].items()}
    return markdown(["forward passes, counted"], cells, f"one call, {geometry}")


def main(argv: list[str] | None = None) -> None:
    options = start(arguments(__doc__), argv)
    found = {geometry: measure(geometry) for geometry in options.geometry}
    for geometry, measured in found.items():
        print(f"\n{table(geometry, measured)}")
    print(f"\nwritten to {write('analysis_costs', options, geometries=found)}")


if __name__ == "__main__":
    main()
