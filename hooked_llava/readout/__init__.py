"""Vectors become words and numbers: lenses, the log-probability of an answer, what heads write, metrics.

In: activations of a model. Out: logits through a lens, log P in nats, tokens as text. Uses the model and what lies below it.
"""

from hooked_llava.readout.answer_cache import AnswerCache, cache_answer

__all__ = ["AnswerCache", "cache_answer"]
