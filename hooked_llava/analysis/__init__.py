"""One file for each question a researcher asks of a model; none imports another."""

from hooked_llava.analysis.activation_patching import activation_patching
from hooked_llava.analysis.attribution_patching import agreement, attribution_patching, edge_attribution
from hooked_llava.analysis.image_attention import image_attention
from hooked_llava.analysis.logit_attribution import logit_attribution
from hooked_llava.analysis.logit_lens import logit_lens
from hooked_llava.analysis.next_tokens import next_tokens
from hooked_llava.analysis.path_patching import path_patching

__all__ = [
    "activation_patching",
    "agreement",
    "attribution_patching",
    "edge_attribution",
    "image_attention",
    "logit_attribution",
    "logit_lens",
    "next_tokens",
    "path_patching",
]
