from __future__ import annotations

import numpy as np
import pytest

from hooked_llava.errors import InputError
from hooked_llava.viz import activation_histogram
from tests.features.scenes_store import active_features, scenes_store


def test_bars_count_the_tokens_at_which_the_feature_is_active():
    store = scenes_store()
    feature = int(np.argmax(store.frequency))
    axes = activation_histogram(store, feature, bins=7).axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    assert sum(heights) == pytest.approx(store.frequency[feature] * store.n_tokens)
    assert axes.get_xlim()[1] == pytest.approx(store.largest[feature])
    assert str(feature) in axes.get_title(loc="left")
    assert activation_histogram(store, active_features(2)[0], title="").axes[0].get_title(loc="left") == ""
    with pytest.raises(InputError, match=r"feature=128"):
        activation_histogram(store, 128)
