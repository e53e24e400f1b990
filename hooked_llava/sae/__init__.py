"""Sparse autoencoders: read, write, and put into a model, where their features are hook points.

In: activations of one hook, and files of sparsify or SAELens. Out: sparse features of them, and a model whose `hooks_table`
lists the features while the autoencoder is attached (`model.attach_sae`). Uses the model and what lies below it.
"""

from hooked_llava.sae.autoencoder import Features, SAEConfig, SparseAutoencoder
from hooked_llava.sae.files import load_sae, save_sae

__all__ = ["Features", "SAEConfig", "SparseAutoencoder", "load_sae", "save_sae"]
