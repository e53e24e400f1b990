"""One file for each question a researcher asks of a model; none imports another."""

from hooked_llava.analysis.activation_patching import activation_patching
from hooked_llava.analysis.answer_probability import answer_probability, probability_summary, with_released_norm
from hooked_llava.analysis.answer_signs import answer_signs, predict_wrong
from hooked_llava.analysis.answer_without import answer_without, decisive_removal, leads_from
from hooked_llava.analysis.attention_contribution import attention_contribution, error_auroc
from hooked_llava.analysis.attribution_patching import agreement, attribution_patching, edge_attribution
from hooked_llava.analysis.causal_trace import best_cells, by_role, causal_trace
from hooked_llava.analysis.circuits import circuit, faithfulness_curve
from hooked_llava.analysis.deciding_places import deciding_places
from hooked_llava.analysis.deletion import deletion_curves
from hooked_llava.analysis.head_ablation import ablate_heads, heads_by_layer, nested_sets, random_heads
from hooked_llava.analysis.head_readings import attention_to_object, head_readings
from hooked_llava.analysis.head_scores import (
    head_overlap,
    head_scores,
    heads_by_attention,
    layer_scores,
    position_scores,
    top_heads,
)
from hooked_llava.analysis.image_attention import image_attention
from hooked_llava.analysis.information_storage import information_storage, reciprocal_rank
from hooked_llava.analysis.knockout import attention_knockout, flow_summary
from hooked_llava.analysis.logit_attribution import contribution_sums, logit_attribution
from hooked_llava.analysis.logit_lens import logit_lens
from hooked_llava.analysis.maps.answer_maps import answer_maps
from hooked_llava.analysis.maps.sinks import sink_positions
from hooked_llava.analysis.neuron_scores import neuron_scores, top_neurons
from hooked_llava.analysis.next_tokens import next_tokens
from hooked_llava.analysis.output_knockout import output_knockout
from hooked_llava.analysis.patch_importance import patch_importance
from hooked_llava.analysis.patchscope import patchscope
from hooked_llava.analysis.path_patching import path_patching
from hooked_llava.analysis.probe_linear import LinearProbe, probe_linear
from hooked_llava.analysis.studies.flow import flow_study
from hooked_llava.analysis.studies.knockout import knockout_study
from hooked_llava.analysis.studies.pope import pope_study
from hooked_llava.analysis.studies.probability import probability_study
from hooked_llava.analysis.studies.trace import average_traces, best_effects, trace_means, trace_study
from hooked_llava.analysis.tuned_lens import lens_kl, train_tuned_lens
from hooked_llava.readout.tuned_lens import TunedLens
from hooked_llava.results.arrays import recovered

__all__ = [
    "LinearProbe",
    "TunedLens",
    "ablate_heads",
    "activation_patching",
    "agreement",
    "answer_maps",
    "answer_probability",
    "answer_signs",
    "answer_without",
    "attention_contribution",
    "attention_knockout",
    "attention_to_object",
    "attribution_patching",
    "average_traces",
    "best_cells",
    "best_effects",
    "by_role",
    "causal_trace",
    "circuit",
    "contribution_sums",
    "deciding_places",
    "decisive_removal",
    "deletion_curves",
    "edge_attribution",
    "error_auroc",
    "faithfulness_curve",
    "flow_study",
    "flow_summary",
    "head_overlap",
    "head_readings",
    "head_scores",
    "heads_by_attention",
    "heads_by_layer",
    "image_attention",
    "information_storage",
    "knockout_study",
    "layer_scores",
    "leads_from",
    "lens_kl",
    "logit_attribution",
    "logit_lens",
    "nested_sets",
    "neuron_scores",
    "next_tokens",
    "output_knockout",
    "patch_importance",
    "patchscope",
    "path_patching",
    "pope_study",
    "position_scores",
    "predict_wrong",
    "probability_study",
    "probability_summary",
    "probe_linear",
    "random_heads",
    "reciprocal_rank",
    "recovered",
    "sink_positions",
    "top_heads",
    "top_neurons",
    "trace_means",
    "trace_study",
    "train_tuned_lens",
    "with_released_norm",
]
