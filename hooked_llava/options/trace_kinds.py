"""What of a layer a causal trace restores."""

from __future__ import annotations

from typing import NamedTuple


class TraceKind(NamedTuple):
    """One of the outputs that `causal_trace(kinds=)` names.

    Attributes:
        hook (str): The hook that is restored.
        name (str): What it is called in a table.
        title (str): What it is called above a figure.
    """

    hook: str
    name: str
    title: str


TRACE_KINDS = {
    "mlp": TraceKind("mlp_out", "MLP", "MLP output"),
    "attn": TraceKind("attn_out", "attention", "attention output"),
    "resid": TraceKind("resid_post", "residual stream", "residual stream"),
}
"""What a layer's MLP adds, what its attention adds, and the whole residual stream that leaves it."""
