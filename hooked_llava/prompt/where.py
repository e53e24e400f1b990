"""What a user's `positions=` means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooked_llava.checks import as_indices
from hooked_llava.errors import InputError, SpanError
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.token_map import TokenMap

PositionsLike = str | SupportsIndex | slice | Sequence[SupportsIndex] | np.ndarray | Tensor
"""Sequence positions: a span or spans joined ("image", "question|last"), a number, a slice, or several numbers."""
Where = PositionsLike | None
"""Positions, or None for all."""
_PLACES = "whole numbers, a slice, or the name of one span ('image|last' joins two)"


def positions_of(
    where: Where, token_map: TokenMap | None, n_positions: int, *, what: str = "positions", seed: int = 0
) -> list[int]:
    """The positions that a user's `Where` means in one prompt: what every `positions=` and every end of an edge goes by.

    A span or spans joined ("question|last", see `TokenMap.span`), one index or several (from the end where negative, padding
    counted), a slice, or None for all real positions. `seed` is of the span "random". Raises `SpanError` for spans that
    are not there or are empty, and `InputError` for what is no position, lies outside, or is a span where no token map is known.

    >>> from hooked_llava.prompt.token_map import TokenMap
    >>> from hooked_llava.architecture.layouts import llava_layout
    >>> token_map = TokenMap(
    ...     token_ids=(1, 9, 9, 9, 9, 5, 0), real=range(6), image_starts=(1,), layouts=(llava_layout(2, 2),)
    ... )
    >>> positions_of("image|last", token_map, 7), positions_of(None, token_map, 7), positions_of([-1], token_map, 7)
    ([1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5], [6])
    """
    if isinstance(where, slice):
        return list(range(n_positions)[where])
    if where is None or isinstance(where, str):
        if token_map is None:
            if where is None:
                return list(range(n_positions))
            raise InputError(f"A residual stream has no spans, so {what}={where!r} means nothing; give numbers.")
        return list(token_map.real) if where is None else _of_span(where, token_map, what, seed)

    def outside(wrong: list[int]) -> str:
        return (
            f"{what}={wrong} do not lie in the prompt; expected numbers in {-n_positions}..{n_positions - 1}, a slice, or "
            "a span such as 'last'."
        )

    return as_indices(where, n_positions, what, expected=_PLACES, outside=outside, empty=True)


def _of_span(where: str, token_map: TokenMap, what: str, seed: int) -> list[int]:
    """The positions of a span; only one of the user's own may be empty, as the end of an edge is that a prompt does not have."""
    found = token_map.span(where, seed=seed)
    if not found and where not in token_map.named:
        raise SpanError(
            f"{what}={where!r} is empty in this prompt, so nothing would be read or changed there. Spans that it has: "
            f"{', '.join(token_map.spans)}."
        )
    return found.tolist()


def resolve_positions(positions: PositionsLike, inputs: Inputs | Tensor) -> Int[Tensor, "batch n_positions"]:
    """The same number of positions in every row, as indices; raises as `positions_of`, and for none or unequally many."""
    n_positions = inputs.shape[1]
    if isinstance(inputs, Tensor):
        rows = [positions_of(positions, None, n_positions) for _ in inputs]
    else:
        rows = inputs.each(lambda token_map: positions_of(positions, token_map, n_positions), inputs.token_maps)
    if not any(rows):
        raise InputError(
            f"positions={positions!r} do not lie in the prompt, or name none; expected numbers in "
            f"{-inputs.shape[1]}..{inputs.shape[1] - 1}, a slice, or a span such as 'last'."
        )
    if len({len(row) for row in rows}) != 1:
        raise InputError(
            f"Span {positions!r} has {[len(row) for row in rows]} positions in the rows of the batch; activations of "
            "different lengths do not stack. Run the prompts one at a time."
        )
    return torch.tensor(rows, dtype=torch.long)
