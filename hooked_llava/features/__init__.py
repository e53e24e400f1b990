"""What features of an autoencoder mean: where they are active, what a larger model says of that, and whether it is right.

In: a model, an autoencoder and images, or the cache that the pipeline of Zhang et al. (2411.14982) released. Out: a
`FeatureStore` on disk, which says without the model in which images a feature is most active and where, and which features are
active in a part of an image; explanations of features by a larger model, and their scores; the words that features write, and
what steering by them changes. Uses autoencoders, steering, the model, the tables of questions and what lies below them.
"""

from hooked_llava.features.clip_score import ClipSimilarity
from hooked_llava.features.effects import steered_answers, written_words
from hooked_llava.features.explain import explain_features, lit_images
from hooked_llava.features.explainers.server import ServerExplainer
from hooked_llava.features.explainers.transformers_model import TransformersExplainer
from hooked_llava.features.explanations import Explanation, load_explanations
from hooked_llava.features.labels import LabelScores, label_scores, match_labels
from hooked_llava.features.ranking import ActiveFeature, Pooling, TopImage
from hooked_llava.features.released import read_released, write_released
from hooked_llava.features.released_lists import read_explanations, read_filter, write_explanations, write_filter
from hooked_llava.features.scores import score_features, score_table
from hooked_llava.features.segmenters import GroundedSegmenter
from hooked_llava.features.shards import Entries, ImageRecord
from hooked_llava.features.store import FeatureStore, Placed

__all__ = [
    "ActiveFeature",
    "ClipSimilarity",
    "Entries",
    "Explanation",
    "FeatureStore",
    "GroundedSegmenter",
    "ImageRecord",
    "LabelScores",
    "Placed",
    "Pooling",
    "ServerExplainer",
    "TopImage",
    "TransformersExplainer",
    "explain_features",
    "label_scores",
    "lit_images",
    "load_explanations",
    "match_labels",
    "read_explanations",
    "read_filter",
    "read_released",
    "score_features",
    "score_table",
    "steered_answers",
    "written_words",
    "write_explanations",
    "write_filter",
    "write_released",
]
