"""Weights changed for good or for a while, and what that changed."""

from hooked_llava.editing.change import Change
from hooked_llava.editing.covariance import KeyCovariance, key_covariance
from hooked_llava.editing.edit import Edit, active_edits
from hooked_llava.editing.evaluate import Probe, evaluate_edit, sequential_edits, summary
from hooked_llava.editing.finetune import finetune
from hooked_llava.editing.multedit import multedit
from hooked_llava.editing.prompts import KeptPrompts, keep_prompts
from hooked_llava.editing.request import EditRequest
from hooked_llava.editing.rome import rome
from hooked_llava.editing.values import TargetNotReached

__all__ = [
    "active_edits",
    "Change",
    "Edit",
    "EditRequest",
    "KeptPrompts",
    "KeyCovariance",
    "Probe",
    "evaluate_edit",
    "finetune",
    "keep_prompts",
    "key_covariance",
    "multedit",
    "rome",
    "sequential_edits",
    "summary",
    "TargetNotReached",
]
