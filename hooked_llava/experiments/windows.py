"""Which layers a window around a layer holds, in the two ways that the papers count."""

from __future__ import annotations

from hooked_llava.checks import as_index, whole_number
from hooked_llava.errors import InputError

PAPER_SHARE = 9 / 40
"""Width of a window as a share of all layers in Zhang et al. (2411.18620): 9 of 40; 7 of 32 by the same share."""


def centered_window(center: int, width: int, n_layers: int) -> range:
    """`width` layers around `center`, clipped at the ends and not shifted, as Zhang et al. (2411.18620) clip them.

    From max(0, l - floor(w / 2)) to min(n_layers, l + ceil(w / 2)) - 1; a negative center counts from the end. Raises
    `InputError` for a center outside the layers and a width below 1.

    >>> centered_window(5, 9, 40), centered_window(0, 9, 40), centered_window(31, 7, 32)
    (range(1, 10), range(0, 5), range(28, 32))
    """
    center = _checked(center, n_layers)
    if width < 1:
        raise InputError(f"A window of {width} layers holds none; expected a width of at least 1.")
    return range(max(0, center - width // 2), min(n_layers, center + (width + 1) // 2))


def released_window(center: int, w: int, n_layers: int) -> range:
    """What `--window w` means in the code that Basu et al. (2406.04236) released: 1 is the layer alone, w > 1 is 2w + 1.

    For w > 1 from max(l - w, 0) to min(l + w, n_layers - 1). Raises `InputError` as `centered_window`.

    >>> released_window(5, 3, 32), released_window(5, 1, 32), released_window(31, 3, 32)
    (range(2, 9), range(5, 6), range(28, 32))
    """
    center, w = _checked(center, n_layers), whole_number(w, "w", least=1)
    reach = 0 if w == 1 else w
    return range(max(center - reach, 0), min(center + reach, n_layers - 1) + 1)


def widest_window(n_layers: int) -> int:
    """The width from which on a window holds every layer, whatever its center: wider ones would change nothing.

    >>> [centered_window(center, widest_window(3), 3) for center in range(3)]
    [range(0, 3), range(0, 3), range(0, 3)]
    """
    return 2 * n_layers - 1


def paper_width(n_layers: int) -> int:
    """The odd width nearest to the paper's share of all layers (Zhang et al. 2411.18620: 9 of 40, 7 of 32), at least 3.

    A single layer is hardly a window: what one layer is kept from reading, its neighbor reads.

    >>> paper_width(40), paper_width(32), paper_width(6)
    (9, 7, 3)
    """
    return max(3, 2 * round((PAPER_SHARE * n_layers - 1) / 2) + 1)


def _checked(center: int, n_layers: int) -> int:
    return as_index(center, n_layers, "center", says=f"Layer {center} is out of range")
