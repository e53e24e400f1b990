"""Draws what was measured: results in, figures and pages out. It uses every room before it, and measures nothing itself.

`figures` has one function for each kind of result, `pages` the pages that put several on one HTML file, `templates` their
words. Needs matplotlib: `pip install 'hooked_llava[viz]'`.
"""

try:
    import matplotlib as mpl  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError("Figures need matplotlib, which is not installed: pip install 'hooked_llava[viz]'") from error

from hooked_llava.viz.figures.activations import activation_histogram
from hooked_llava.viz.figures.answer_strip import answer_strip
from hooked_llava.viz.figures.bars import contribution_bars, neuron_bars, top_bars
from hooked_llava.viz.figures.by_layer import ablation_curves, storage_curves
from hooked_llava.viz.figures.circuits import faithfulness_curves
from hooked_llava.viz.figures.contributions import plot_contributions
from hooked_llava.viz.figures.edges import edge_map
from hooked_llava.viz.figures.edit import answer_shift, edit_by_layer, probe_bars
from hooked_llava.viz.figures.features import dose_response, feature_overlays
from hooked_llava.viz.figures.knockout import knockout_curves, probability_curves
from hooked_llava.viz.figures.knockout_models import knockout_models
from hooked_llava.viz.figures.lens import answer_curve, lens_table
from hooked_llava.viz.figures.maps import cell_map, cell_maps, layer_head_map
from hooked_llava.viz.figures.model_view import as_the_model_sees_it, model_view
from hooked_llava.viz.figures.overlay import patch_overlay, patch_overlays
from hooked_llava.viz.figures.patch_words import patch_words
from hooked_llava.viz.figures.patching import by_patch, plot_patching
from hooked_llava.viz.figures.pope import pope_bars
from hooked_llava.viz.figures.positions import layer_position_map, layer_position_maps
from hooked_llava.viz.figures.probes import lens_curves, probe_curves
from hooked_llava.viz.figures.sinks import sink_scatter
from hooked_llava.viz.figures.trace import contribution_maps, role_curves, trace_maps
from hooked_llava.viz.figures.value_curves import value_curves
from hooked_llava.viz.pages.edit import EditPage, edit_page
from hooked_llava.viz.pages.explain import Report, explain
from hooked_llava.viz.pages.features import FeaturePage, attribution_page, steering_page
from hooked_llava.viz.pages.gallery import feature_page, gallery_page
from hooked_llava.viz.pages.knockout import KnockoutPage, knockout_page, study_page
from hooked_llava.viz.pages.patching import PatchingReport, patching_report
from hooked_llava.viz.pages.pope import PopePage, pope_page
from hooked_llava.viz.pages.probability import ProbabilityPage, probability_page, probability_study_page
from hooked_llava.viz.pages.trace import TracePage, trace_page, trace_study_page

__all__ = [
    "ablation_curves",
    "activation_histogram",
    "answer_curve",
    "answer_shift",
    "answer_strip",
    "as_the_model_sees_it",
    "attribution_page",
    "by_patch",
    "cell_map",
    "cell_maps",
    "contribution_bars",
    "contribution_maps",
    "dose_response",
    "edge_map",
    "edit_by_layer",
    "edit_page",
    "EditPage",
    "explain",
    "faithfulness_curves",
    "feature_overlays",
    "feature_page",
    "FeaturePage",
    "gallery_page",
    "knockout_curves",
    "knockout_models",
    "knockout_page",
    "KnockoutPage",
    "layer_head_map",
    "layer_position_map",
    "layer_position_maps",
    "lens_curves",
    "lens_table",
    "model_view",
    "neuron_bars",
    "patch_overlay",
    "patch_overlays",
    "patch_words",
    "patching_report",
    "PatchingReport",
    "plot_contributions",
    "plot_patching",
    "pope_bars",
    "pope_page",
    "PopePage",
    "probability_curves",
    "probability_page",
    "probability_study_page",
    "ProbabilityPage",
    "probe_bars",
    "probe_curves",
    "Report",
    "role_curves",
    "sink_scatter",
    "steering_page",
    "storage_curves",
    "study_page",
    "top_bars",
    "trace_maps",
    "trace_page",
    "trace_study_page",
    "TracePage",
    "value_curves",
]
