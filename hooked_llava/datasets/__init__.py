"""Tables of questions: readers of the papers' released files, and a runner that takes an analysis over a table.

Also the activations of the prompts of a table, one forward pass for each batch: what probes, lenses and autoencoders
are fitted on.
"""

from hooked_llava.datasets.gqa import GQA_KINDS, GQA_TAIL, read_gqa
from hooked_llava.datasets.matching import answers_match, answers_match_exactly
from hooked_llava.datasets.pope import POPE_KINDS, POPE_TAIL, answers_match_as_pope, pope_scores, read_pope
from hooked_llava.datasets.rows import StudyRow, prepare_rows
from hooked_llava.datasets.study import by_kind, study
from hooked_llava.datasets.vqa_constraints import ConstraintTable, read_vqa_constraints

__all__ = [
    "ConstraintTable",
    "GQA_KINDS",
    "GQA_TAIL",
    "POPE_KINDS",
    "POPE_TAIL",
    "StudyRow",
    "answers_match",
    "answers_match_as_pope",
    "answers_match_exactly",
    "by_kind",
    "pope_scores",
    "prepare_rows",
    "read_gqa",
    "read_pope",
    "read_vqa_constraints",
    "study",
]
