"""The progress bar of everything that may take longer than a moment."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

PATIENCE = 2.0
"""Seconds before a progress bar appears."""


def progress_bar(total: int | None, unit: str, *, shown: bool = True, done: int = 0, **options: Any) -> tqdm:
    """A bar in the terminal that appears after `PATIENCE` seconds and goes when the work is done; elsewhere there is none.

    `options` go to `tqdm`.

    >>> with progress_bar(3, "step", shown=False) as bar:
    ...     _ = bar.update()
    """
    hidden = None if shown else True  # None: shown where somebody looks, in a terminal
    return tqdm(total=total, unit=unit, initial=done, delay=PATIENCE, disable=hidden, leave=False, **options)
