"""Sparse autoencoders: trained, read, written, and put into a model, where their features are hook points.

In: activations of one hook, streamed from a model over images and prompts, and files of sparsify or SAELens. Out: autoencoders,
sparse features of activations, and a model whose `hooks_table` lists the features while the autoencoder is attached
(`model.attach_sae`). Uses the model, Replay, the tables of questions and what lies below them.
"""

from hooked_llava.sae.autoencoder import Features, SAEConfig, SparseAutoencoder
from hooked_llava.sae.files import load_sae, save_sae
from hooked_llava.sae.places import PLACE_COLUMNS
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
    "load_sae",
    "loss_recovered",
    "save_sae",
    "train_sae",
]
