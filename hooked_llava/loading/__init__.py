"""Files <-> tensors under our names, without any model class."""

from hooked_llava.architecture.tensors import expected_tensors, hf_name, our_name
from hooked_llava.loading.checkpoint import load_processor, read_config, read_generation_config, stored_dtype
from hooked_llava.loading.embedded import EMBEDDED, resolve
from hooked_llava.loading.saving import save
from hooked_llava.loading.sharing import share_weights
from hooked_llava.loading.supported import as_dtype, check_model
from hooked_llava.loading.weights import load_into, read_headers, stream_tensors

__all__ = [
    "EMBEDDED",
    "as_dtype",
    "check_model",
    "expected_tensors",
    "hf_name",
    "load_into",
    "load_processor",
    "our_name",
    "read_config",
    "read_generation_config",
    "read_headers",
    "resolve",
    "save",
    "share_weights",
    "stored_dtype",
    "stream_tensors",
]
