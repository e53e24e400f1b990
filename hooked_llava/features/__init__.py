"""What features of an autoencoder mean: where they are active over a data set, and what is read from that.

In: a model, an autoencoder and images, or the cache that the pipeline of Zhang et al. (2411.14982) released. Out: a
`FeatureStore` on disk, which says without the model in which images a feature is most active and where, and which features are
active in a part of an image. Uses autoencoders, the model, the tables of questions and what lies below them.
"""

from hooked_llava.features.labels import LabelScores, label_scores, match_labels
from hooked_llava.features.ranking import ActiveFeature, Pooling, TopImage
from hooked_llava.features.released import read_released, write_released
from hooked_llava.features.released_lists import read_explanations, read_filter, write_explanations, write_filter
from hooked_llava.features.shards import Entries, ImageRecord
from hooked_llava.features.store import FeatureStore, Placed

__all__ = [
    "ActiveFeature",
    "Entries",
    "FeatureStore",
    "ImageRecord",
    "LabelScores",
    "Placed",
    "Pooling",
    "TopImage",
    "label_scores",
    "match_labels",
    "read_explanations",
    "read_filter",
    "read_released",
    "write_explanations",
    "write_filter",
    "write_released",
]
