"""How large an edit is."""

from __future__ import annotations

import numpy as np

from hooked_llava.editing import weight_records
from hooked_llava.editing.change import Change
from hooked_llava.editing.edit import Edit


def size_text(edit: Edit) -> str:
    """An edit's rank, the bytes of its file, and norm in parts of the weights' in words.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> size_text(Edit(model, {}))
    'nothing'
    """
    if not edit.changes:
        return "nothing"
    ranks = {change.rank for change in edit.changes.values()}
    rank = "full rank" if None in ranks else f"rank {max(r for r in ranks if r is not None)}"
    return f"{rank}, {edit.file_bytes / 1000:.1f} kB, {relative_size(edit):.2g} of the weights' norm"


def relative_size(edit: Edit) -> float:
    """Norm of an edit's update in parts of the norm of the weights that it changes, unedited; 0 if it changes none."""
    weights = [weight_records.original(edit.model.get_parameter(name)).detach() for name in edit.changes]
    changed = float(np.linalg.norm([_norm(change) for change in edit.changes.values()]))
    whole = float(np.linalg.norm([float(weight.float().norm()) for weight in weights]))
    return changed / whole if whole else 0.0


def _norm(change: Change) -> float:
    """Frobenius norm, for factors without writing the product out."""
    if change.full is not None:
        return float(change.matrix().norm())
    left, right = change.left.double(), change.right.double()
    return float(((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt())
