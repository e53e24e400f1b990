"""One look for every figure: signed values diverge from white at zero, others grow from light at zero to dark."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox, BboxBase

from hooked_llava.errors import InputError, a_type
from hooked_llava.prompt.token_text import visible_token

INK, MUTED, RULE, PAPER = "#1f2933", "#66727f", "#d5dbe1", "#ffffff"
"""Text, secondary text, thin lines, background."""
BLUE, ORANGE, GREEN, PURPLE = "#1d4f91", "#c8622d", "#2fa37c", "#8e5bb5"
SKY, GOLD, SLATE = "#5fb4e6", "#e0b030", "#3b4450"
SERIES = (ORANGE, BLUE, GREEN, PURPLE, SKY, GOLD, SLATE)
"""Colors of lines and bars, in the order in which they are used: as far apart for color-blind eyes as for others."""
DIVERGING, SEQUENTIAL = "RdBu_r", "OrRd"
"""Names of matplotlib's color maps: one from blue over white to red, and one from paper to dark red."""
UNITS = {"logit": "logits", "attention": "share of attention", "probability": "probability"}
"""What the values of a result are counted in, by the result's name."""

_SIGNED = ("logit", "recovered")  # the names of results whose values may be negative, even if these are not
_RC: dict[Any, Any] = {
    "font.size": 9.0,
    "font.family": "sans-serif",
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "legend.frameon": False,
    "svg.fonttype": "path",  # the same letters wherever the page is opened
    "svg.hashsalt": "hooked_llava",
}
_DPI = 160
_LETTERS_PER_INCH = 14  # of a label
PAGE_WIDTH = 5.2
"""Inches: a figure of this width is read whole on a phone, where it is shown two thirds as large."""
_LETTER, _HANDLE, _LINE, _GAP = 0.066, 0.125, 0.18, 0.08  # inches, of a legend: a letter, a unit of its handle, a line


class Plot(Figure):
    """A matplotlib figure that a notebook shows once, whatever its backend, and that pyplot does not keep alive."""

    below = 0.0
    """Inches at the bottom that the panels leave to a legend and a note."""

    def get_tightbbox(self, renderer: Any = None, *, bbox_extra_artists: Any = None) -> BboxBase:
        """What savefig(bbox_inches="tight") keeps, in inches: the note below the panels, too, which they make no room for."""
        tight = super().get_tightbbox(renderer, bbox_extra_artists=bbox_extra_artists)
        if self._supxlabel is None:
            return tight
        note = self._supxlabel.get_window_extent(renderer)
        return Bbox.union([tight, note.transformed(self.dpi_scale_trans.inverted())])

    def _repr_png_(self) -> bytes:
        return self._rendered("png")

    def to_svg(self) -> str:
        """The figure as SVG text; images in it are embedded, letters are outlines."""
        return self._rendered("svg").decode("utf-8")

    def _rendered(self, file_format: str) -> bytes:
        buffer = io.BytesIO()
        about: dict[str, Any] = {"Date": None} if file_format == "svg" else {}  # the same figure, the same bytes
        with mpl.rc_context(_RC):
            self.savefig(buffer, format=file_format, dpi=_DPI, metadata=about)
        return buffer.getvalue()


@dataclass(frozen=True)
class ColorScale:
    """Which color map, from which value to which.

    Attributes:
        name (str): Name of the map, `DIVERGING` or `SEQUENTIAL`.
        low (float): The value of the first color.
        high (float): The value of the last color.
    """

    name: str
    low: float
    high: float

    @property
    def neutral(self) -> float:
        """The value that means nothing: white in the middle of a diverging map, the palest end of another."""
        return (self.low + self.high) / 2 if self.name == DIVERGING else self.low

    @property
    def map(self) -> Colormap:
        """0 to 1 -> colors."""
        return mpl.colormaps[self.name]

    def norm(self) -> Normalize:
        """Values -> 0 to 1."""
        return Normalize(self.low, self.high)

    def rgba(self, value: float) -> tuple[float, float, float, float]:
        """The color of one value."""
        return self.map(float(self.norm()(value)))

    def ink(self, value: float) -> str:
        """The color of text that is written on that value's color."""
        red, green, blue, _ = self.rgba(value)
        return PAPER if 0.299 * red + 0.587 * green + 0.114 * blue < 0.5 else INK


def color_scale(values: np.ndarray, *, signed: bool = False, neutral: float = 0.0) -> ColorScale:
    """Symmetric about the neutral value if any lies below it or could (`signed`), else from there to the largest.

    >>> color_scale(np.array([-1.0, 3.0]))
    ColorScale(name='RdBu_r', low=-3.0, high=3.0)
    >>> color_scale(np.array([0.25, 0.5]))
    ColorScale(name='OrRd', low=0.0, high=0.5)
    """
    away = values[np.isfinite(values)] - neutral
    largest = float(np.abs(away).max(initial=0.0)) or 1.0
    if signed or bool((away < 0).any()):
        return ColorScale(DIVERGING, neutral - largest, neutral + largest)
    return ColorScale(SEQUENTIAL, neutral, neutral + largest)


def scale_of(result: xr.DataArray, values: np.ndarray | None = None) -> ColorScale:
    """The scale for a result's values, or for `values` made from them.

    Contributions always diverge; a result's attribute `neutral` is the value that means no effect, if it is not 0.
    """
    neutral = float(result.attrs.get("neutral", 0.0))
    return color_scale(result.values if values is None else values, signed=result.name in _SIGNED, neutral=neutral)


@contextmanager
def plot(width: float, height: float) -> Iterator[Plot]:
    """A new figure of so many inches; what is drawn inside the block has the common look."""
    with mpl.rc_context(_RC):
        yield Plot(figsize=(width, height), layout="constrained")


def add_color_bar(
    figure: Plot,
    axes: Axes | Sequence[Axes] | np.ndarray,
    scale: ColorScale,
    label: str,
    values: np.ndarray,
    *,
    colors: Colormap | None = None,
) -> None:
    """A thin color bar to the right of one or several axes, its unit written along it; `colors` replace the scale's.

    It shows the part of the scale that occurs in `values`, and names its ends.
    """
    low, high = _occurring(values, scale)
    shown = (colors or scale.map)(scale.norm()(np.linspace(low, high, 256)))
    same = high - low <= 1e-9 * max(abs(low), abs(high), 1e-30)
    ends = (low - 0.5, high + 0.5) if same else (low, high)
    bar = figure.colorbar(
        ScalarMappable(Normalize(*ends), ListedColormap(shown)), ax=axes, shrink=0.8, aspect=24, pad=0.02
    )
    ticks = [low] if same else _bar_ticks(low, high)
    bar.set_ticks(ticks, labels=[_tick(tick, high - low) for tick in ticks])
    label = f"{label} (the same everywhere)" if same else label
    room = 0.8 * (figure.get_size_inches()[1] - figure.below)
    bar.set_label("\n".join(textwrap.wrap(label, max(8, int(_LETTERS_PER_INCH * room)))))
    bar.outline.set_visible(False)  # type: ignore[operator]


def _occurring(values: np.ndarray, scale: ColorScale) -> tuple[float, float]:
    """The smallest and the largest value that is a number, within the scale; the scale's ends if there is none."""
    numbers = np.asarray(values, dtype=float)
    numbers = numbers[np.isfinite(numbers)]
    if not numbers.size:
        return scale.low, scale.high
    low, high = np.clip([numbers.min(), numbers.max()], scale.low, scale.high)
    return float(low), float(high)


def _bar_ticks(low: float, high: float) -> list[float]:
    """Both ends, and round numbers between that do not touch them."""
    margin = 0.12 * (high - low)
    between = MaxNLocator(5).tick_values(low, high)
    return [low, *(float(t) for t in between if low + margin < t < high - margin), high]


def _tick(value: float, span: float) -> str:
    """A tick's number with as many digits as tell the range's parts apart, and a real minus sign."""
    magnitude = max(abs(value), span)
    if magnitude and not 1e-3 <= magnitude < 1e5:
        return f"{value:.1e}".replace("-", "\u2212")
    digits = 0 if not span else max(0, 2 - math.floor(math.log10(span)))
    text = f"{value + 0.0:.{digits}f}" if span else f"{value:.3g}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return ("0" if text in ("-0", "") else text).replace("-", "\u2212")


def unit_of(result: xr.DataArray) -> str:
    """What a result's values are counted in: its `units` attribute, or what its name implies."""
    return str(result.attrs.get("units") or UNITS.get(str(result.name), result.name or "value"))


def require_dims(result: xr.DataArray, *dims: str) -> xr.DataArray:
    """The result with exactly these axes, in this order; axes of length one are dropped.

    Raises `InputError` if one is missing, or another longer than one is left.

    >>> require_dims(xr.DataArray(np.zeros((1, 2, 3)), dims=("image", "head", "layer")), "layer", "head").shape
    (3, 2)
    """
    if not isinstance(result, xr.DataArray):
        raise InputError(
            f"Expected one array with the axes {', '.join(dims)}; got {a_type(result)}. Take one of its arrays, for "
            "example result['effect'], or let plot_patching choose the figure."
        )
    missing = [dim for dim in dims if dim not in result.dims]
    surplus = [str(dim) for dim in result.dims if dim not in dims and result.sizes[dim] != 1]
    if missing or surplus:
        raise InputError(
            f"The result has the axes {', '.join(map(str, result.dims)) or 'none'}; expected {', '.join(dims)}. "
            "Choose or average the others first, for example result.sel(image=0) or result.mean('head')."
        )
    return result.squeeze([dim for dim in result.dims if dim not in dims], drop=True).transpose(*dims)


def token_label(token: object, longest: int | None = None) -> str:
    r"""A token as matplotlib can write it, where `$` would begin a formula, cut to so many characters.

    >>> token_label(" $5"), token_label("understanding", longest=6)
    ('\\$5', 'under…')
    """
    shown = visible_token(token).replace("$", r"\$")
    return shown if longest is None or len(shown) <= longest else shown[: longest - 1] + "…"


def format_small(value: float) -> str:
    """A number that is not below 0 but for rounding, in few letters.

    >>> format_small(0.01234), format_small(0.000123), format_small(-1e-9)
    ('0.012', '1e-4', '< 1e-6')
    """
    if value < 1e-6:
        return "< 1e-6"
    return f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def tick_every(n: int, most: int = 16) -> int:
    """A step such that ticks at its multiples are at most `most`.

    >>> tick_every(8), tick_every(32), tick_every(80)
    (1, 2, 5)
    """
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, n) if n / step <= most)


def name_bars(axes: Axes, names: Sequence[str]) -> None:
    """Names of horizontal bars at 0, 1, ..., the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.tick_params("y", length=0)


def value_lines(axes: Axes, which: Literal["x", "y"]) -> None:
    """Thin lines below what is drawn, to read values by."""
    axes.grid(axis=which, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def legend_below(figure: Plot, entries: Axes | Sequence[Artist], *, handlelength: float = 1.4) -> None:
    """A legend below all panels, in as many columns as fit; the figure grows by its height.

    `entries` are what it names: the labelled lines and bars of one panel, or handles with a label.
    """
    handles = entries.get_legend_handles_labels()[0] if isinstance(entries, Axes) else list(entries)
    lines = [str(handle.get_label()).split("\n") for handle in handles]
    width = figure.get_size_inches()[0]
    column = _LETTER * max(len(line) for label in lines for line in label) + _HANDLE * (handlelength + 3)
    columns = max(1, min(len(lines), int(width / column)))
    rows = -(-len(lines) // columns)
    tallest = max(sum(map(len, lines[i : i + rows])) for i in range(0, len(lines), rows))
    grow_below(figure, _LINE * tallest + _GAP)
    look: dict[str, Any] = {"labelcolor": INK, "handlelength": handlelength, "borderaxespad": 0.2}
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.0), ncols=columns, **look)


def grow_below(figure: Plot, inches: float) -> None:
    """Add a strip at the bottom; the panels, and a legend at the bottom, stay above it."""
    width, height = figure.get_size_inches()
    total, figure.below = height + inches, figure.below + inches
    figure.set_size_inches(width, total)
    engine = figure.get_layout_engine()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(0.0, figure.below / total, 1.0, 1.0 - figure.below / total))
    for legend in figure.legends:
        legend.set_bbox_to_anchor((0.5, inches / total), transform=figure.transFigure)


def label_across(figure: Plot, text: str) -> None:
    """A label for the vertical axes of all panels, beside their middle; to be written after the legend below them."""
    middle = (1 + figure.below / figure.get_size_inches()[1]) / 2
    figure.supylabel(text, y=middle, fontsize=9, color=INK, multialignment="center")


def add_heading(figure: Plot, text: str) -> None:
    """The title of a figure with several panels; none for ""."""
    if text:
        figure.suptitle(text, x=0.01, ha="left", fontsize=10, fontweight="bold", color=INK)


def hide_axes(axes: Axes) -> None:
    """No ticks and no frame: for images and tables."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
