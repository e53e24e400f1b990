"""Weights changed for good or for a while, and what that changed."""

from hooked_llava.editing.change import Change
from hooked_llava.editing.contexts import generated_contexts
from hooked_llava.editing.covariance import KeyCovariance, key_covariance, key_covariances
from hooked_llava.editing.edit import Edit, active_edits
from hooked_llava.editing.evaluate import Probe, evaluate_edit, sequential_edits, summary
from hooked_llava.editing.finetune import finetune
from hooked_llava.editing.memit import memit
from hooked_llava.editing.multedit import multedit
from hooked_llava.editing.prompts import KeptPrompts, keep_prompts
from hooked_llava.editing.questions import ask_questions
from hooked_llava.editing.request import EditRequest
from hooked_llava.editing.rome import rome
from hooked_llava.editing.size import relative_size, size_text
from hooked_llava.editing.sweep import edit_sweep
from hooked_llava.editing.values import TargetNotReached
from hooked_llava.options.edit_methods import ROME_RELEASED

__all__ = [
    "active_edits",
    "ask_questions",
    "Change",
    "Edit",
    "EditRequest",
    "KeptPrompts",
    "KeyCovariance",
    "Probe",
    "ROME_RELEASED",
    "edit_sweep",
    "evaluate_edit",
    "finetune",
    "generated_contexts",
    "keep_prompts",
    "key_covariance",
    "key_covariances",
    "memit",
    "multedit",
    "relative_size",
    "rome",
    "sequential_edits",
    "size_text",
    "summary",
    "TargetNotReached",
]
