"""Sparse autoencoders: trained, read, written, put into a model as hook points, and answers attributed to their features.

In: activations of one hook, streamed from a model over images and prompts, and files of sparsify or SAELens. Out: autoencoders,
sparse features of activations, and a model whose `hooks_table` lists the features while the autoencoder is attached
(`model.attach_sae`); attributions by feature and token. Uses the model, Replay, steering, the tables of questions and what lies
below them.
"""

from hooked_llava.datasets.places import PLACE_COLUMNS
from hooked_llava.sae.attribution import feature_attribution, feature_maps, pooled
from hooked_llava.sae.autoencoder import Features, SAEConfig, SparseAutoencoder
from hooked_llava.sae.files import load_sae, save_sae
from hooked_llava.sae.splice import LossRecovered, loss_recovered
from hooked_llava.sae.statistics import ActivationStatistics
from hooked_llava.sae.stream import ActivationBatch, ActivationStream, activation_stream
from hooked_llava.sae.train import train_sae
from hooked_llava.sae.trainer import StepRecord, TrainingConfig

__all__ = [
    "PLACE_COLUMNS",
    "ActivationBatch",
    "ActivationStatistics",
    "ActivationStream",
    "Features",
    "LossRecovered",
    "SAEConfig",
    "SparseAutoencoder",
    "StepRecord",
    "TrainingConfig",
    "activation_stream",
    "feature_attribution",
    "feature_maps",
    "load_sae",
    "loss_recovered",
    "pooled",
    "save_sae",
    "train_sae",
]
