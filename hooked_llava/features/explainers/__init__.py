"""Explainers ready made: a model of transformers in this process, and a server that speaks OpenAI's protocol, such as vLLM."""

from hooked_llava.features.explainers.server import ServerExplainer
from hooked_llava.features.explainers.transformers_model import TransformersExplainer

__all__ = ["ServerExplainer", "TransformersExplainer"]
