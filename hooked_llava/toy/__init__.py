"""The embedded world of colored shapes: images, questions, facts, and the training of `tiny-shapes` on them.

Light on import: the tokenizer, training and evaluation live in submodules that are loaded when used.
"""

from hooked_llava.toy.descriptions import Description
from hooked_llava.toy.facts import RELATION_NAMES, RELATIONS, Relation, fact_answer, fact_table
from hooked_llava.toy.objects import COLOR_NAMES, PATTERNS, SHAPES, SceneObject
from hooked_llava.toy.oracle import OracleExplainer, OracleSegmenter
from hooked_llava.toy.questions import (
    ANSWER_KINDS,
    KINDS,
    TEXT_KINDS,
    Question,
    ask,
    ask_fact,
    format_answer,
    format_prompt,
)
from hooked_llava.toy.scenes import Scene, draw_scene, recolor, replace_object, sample_scene

__all__ = [
    "ANSWER_KINDS",
    "COLOR_NAMES",
    "KINDS",
    "PATTERNS",
    "RELATIONS",
    "RELATION_NAMES",
    "SHAPES",
    "TEXT_KINDS",
    "Description",
    "OracleExplainer",
    "OracleSegmenter",
    "Question",
    "Relation",
    "Scene",
    "SceneObject",
    "ask",
    "ask_fact",
    "draw_scene",
    "fact_answer",
    "fact_table",
    "format_answer",
    "format_prompt",
    "recolor",
    "replace_object",
    "sample_scene",
]
