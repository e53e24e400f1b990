"""Where `benchmarks.baseline` finds what it runs: the only file of it to edit when something moves or is renamed.

Names of the root package and those that `hooked_llava.analysis`, `editing`, `datasets` and `viz` export are imported where
they are used.

To record version 0.1 (commit f8ca89f), import there from where it was: `span` from hooked_llava.experiments.edges,
`flow_study` and `edit_sweep` from hooked_llava.viz, `compiled` from hooked_llava.toy.compiled.
"""

from dataclasses import make_dataclass

from hooked_llava.analysis.causal_trace import was_lowered
from hooked_llava.analysis.studies.flow import flow_study
from hooked_llava.architecture.image_axis import ImageAxis
from hooked_llava.architecture.layout import ImageLayout
from hooked_llava.architecture.layouts import llava_layout
from hooked_llava.architecture.processor_axes import processor_axes
from hooked_llava.architecture.tensors import expected_tensors
from hooked_llava.cli import app
from hooked_llava.datasets.rows import boxes_lost
from hooked_llava.datasets.study import answers_match
from hooked_llava.editing.sweep import edit_sweep
from hooked_llava.experiments.corruptions import MeanEmbedding, Noise, OtherImage, Replace, find_constraints
from hooked_llava.experiments.pairs import (
    blank_image,
    gaussian_noise,
    mean_embedding,
    other_image,
    other_question,
    swapped_objects,
    without_object,
)
from hooked_llava.experiments.windows import centered_window, paper_width, released_window
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.templates import find_template
from hooked_llava.prompt.token_map import TokenMap
from hooked_llava.readout.answer_cache import cache_answer
from hooked_llava.readout.metrics import (
    Answer,
    at_last,
    from_transformer_lens,
    kl_divergence,
    log_probability,
    logit_difference,
    own_answers,
    probability,
    rank,
    relative_change,
    teacher_forced,
)
from hooked_llava.replay import Intervention, Replay
from hooked_llava.results.arrays import load as load_result
from hooked_llava.results.arrays import recovered
from hooked_llava.results.arrays import save as save_result
from hooked_llava.results.map_quality import average_precision, bootstrap, map_quality, mean_intervals, roc_auc
from hooked_llava.storage import written_whole
from hooked_llava.toy.constraint_tables import constraint_rows
from hooked_llava.toy.edit_tables import edit_table
from hooked_llava.toy.gqa_tables import gqa_rows, write_gqa
from hooked_llava.toy.images import image_path
from hooked_llava.viz.style import color_scale
from tests.builders import make_hf_model, make_prompt  # noqa: TID251 (models and processors that tests have)
from tests.compiled import compiled  # noqa: TID251 (models and processors that tests have)
from tests.fixtures_processor import make_processor  # noqa: TID251 (models and processors that tests have)
from tests.known_mechanism import OBJECTS, RECOLORED, places  # noqa: TID251 (models and processors that tests have)
from tests.pairs import GEOMETRIES  # noqa: TID251 (models and processors that tests have)

__all__ = [
    "GEOMETRIES",
    "OBJECTS",
    "RECOLORED",
    "Answer",
    "Inputs",
    "Intervention",
    "MeanEmbedding",
    "Noise",
    "OtherImage",
    "Replace",
    "Replay",
    "answers_match",
    "app",
    "at_last",
    "average_precision",
    "blank_image",
    "bootstrap",
    "boxes_lost",
    "centered_window",
    "color_scale",
    "compiled",
    "constraint_rows",
    "cache_answer",
    "edit_sweep",
    "edit_table",
    "expected_tensors",
    "find_constraints",
    "find_template",
    "flow_study",
    "from_transformer_lens",
    "gaussian_noise",
    "geometry_of",
    "gqa_rows",
    "kl_divergence",
    "llava_layout",
    "load_result",
    "log_probability",
    "logit_difference",
    "make_hf_model",
    "make_processor",
    "make_prompt",
    "map_quality",
    "mean_embedding",
    "mean_intervals",
    "other_image",
    "other_question",
    "own_answers",
    "paper_width",
    "image_path",
    "places",
    "probability",
    "processor_axes",
    "rank",
    "recovered",
    "relative_change",
    "released_window",
    "roc_auc",
    "save_result",
    "span_positions",
    "swapped_objects",
    "teacher_forced",
    "was_lowered",
    "without_object",
    "write_gqa",
    "written_whole",
]

span_positions = TokenMap.span


_LENGTHS = ("original", "padded", "before", "resized", "offset", "crop", "canvas", "patch_size")
_AxisGeometry = make_dataclass("AxisGeometry", _LENGTHS)  # as version 0.1 writes them
_ImageGeometry = make_dataclass("ImageGeometry", ("vertical", "horizontal"))


def geometry_of(layout: ImageLayout) -> object:
    """The axes of a layout of one grid, written as version 0.1 writes them."""

    def shown(axis: ImageAxis) -> object:
        return _AxisGeometry(**{name: length for name, length in vars(axis).items() if name in _LENGTHS})

    return _ImageGeometry(shown(layout.grids[0].rows.pixels), shown(layout.grids[0].columns.pixels))
