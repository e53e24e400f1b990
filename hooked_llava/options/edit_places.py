"""Where an edit may be: the words that stand for a layer or a position, and what each means."""

from __future__ import annotations

AUTO = "auto"
"""`layer=` and `position=` that leave the choice to a causal trace."""
EDIT_LAYERS = {
    AUTO: "where a causal trace of the constraint finds that the MLP's output at the edited position restores most",
}
"""Besides a number: what `layer=` and `hooked-llava edit --layer` take."""
EDIT_POSITIONS = {
    "constraint": "the constraint's last token, as in the paper",
    AUTO: "the constraint or the last position, where the trace's MLPs restore more",
}
"""Besides a span, whose last token is edited: what `position=` and `hooked-llava edit --position` take."""
