"""How strongly a feature is active where it is active."""

from __future__ import annotations

from matplotlib.figure import Figure

from hooked_llava.features.store import FeatureStore
from hooked_llava.viz.style import ORANGE, PAGE_WIDTH, PAPER, plot, value_lines


def activation_histogram(store: FeatureStore, feature: int, *, bins: int = 30, title: str | None = None) -> Figure:
    """How often a feature is active how strongly, over the tokens of a store; tokens at which it is not are left out.

    `title` stands instead of the feature's number and its share of the tokens; "" for none. Raises `InputError` as
    `FeatureStore.histogram`.

    >>> import tempfile
    >>> from hooked_llava.model.llava import HookedLLaVA
    >>> from hooked_llava.sae.files import load_sae
    >>> from hooked_llava.toy.images import image_path
    >>> model, sae = HookedLLaVA.from_pretrained("tiny-shapes"), load_sae("tiny-shapes")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = FeatureStore.build(model, sae, [(image_path("demo"), "What is there?")], folder, progress=False)
    ...     figure = activation_histogram(store, 32, bins=4)
    >>> [int(bar.get_height()) for bar in figure.axes[0].patches], figure.axes[0].get_xlabel()
    ([1, 11, 16, 10], 'activation')
    """
    counts, edges = store.histogram(feature, bins)
    own = f"feature {feature}: active at {store.frequency[feature]:.2%} of tokens"
    with plot(PAGE_WIDTH, 1.8) as figure:
        axes = figure.add_subplot()
        axes.bar(edges[:-1], counts, edges[1:] - edges[:-1], align="edge", color=ORANGE, edgecolor=PAPER, linewidth=0.4)
        axes.set_xlim(edges[0], edges[-1])
        axes.set_xlabel("activation")
        axes.set_ylabel("tokens")
        value_lines(axes, "y")
        axes.set_title(own if title is None else title)
    return figure
