"""The parts of a transformer, each with its hook points; both towers are built from them."""

from hooked_llava.model.components.attention import Attention, AttentionContext
from hooked_llava.model.components.block import Block, Blocks
from hooked_llava.model.components.hook_point import HookPoint, reads_only, start_graph
from hooked_llava.model.components.kv_cache import KVCache
from hooked_llava.model.components.mlp import MLP
from hooked_llava.model.components.norm import LayerNorm, RMSNorm, make_norm
from hooked_llava.model.components.prefix_attention import Prefix, SharedPrefix
from hooked_llava.model.components.rotary import RotaryEmbedding

__all__ = [
    "MLP",
    "Attention",
    "AttentionContext",
    "Block",
    "Blocks",
    "HookPoint",
    "KVCache",
    "LayerNorm",
    "Prefix",
    "RMSNorm",
    "RotaryEmbedding",
    "SharedPrefix",
    "make_norm",
    "reads_only",
    "start_graph",
]
