"""`Inputs` become activations and logits: `HookedLLaVA`, its three parts, its cache, its generation.

In: `Inputs` or token ids. Out: logits, a `LLaVACache`, generated text. Uses architecture, prompt and loading.
"""

from hooked_llava.model.cache import LLaVACache
from hooked_llava.model.llava import HookedLLaVA

__all__ = ["HookedLLaVA", "LLaVACache"]
