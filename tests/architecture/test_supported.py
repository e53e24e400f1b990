from __future__ import annotations

from typing import Any

from hooked_llava import HookedLLaVA
from hooked_llava.architecture.language import LANGUAGE_MODELS
from hooked_llava.architecture.llava import LLAVA_MODELS
from hooked_llava.architecture.vision import VISION_TOWERS
from tests import tiled
from tests.builders import LANGUAGES, TOWERS
from tests.model import test_family, test_tiles
from tests.pairs import FAMILY


def test_what_is_said_to_load_is_tested() -> None:
    assert {config.model_type for config in LANGUAGES.values()} == set(LANGUAGE_MODELS)
    assert {config.model_type for config in TOWERS.values()} == set(VISION_TOWERS)
    assert {"llava", *(tiled.hf_config(kind).model_type for kind in tiled.KINDS)} == set(LLAVA_MODELS)
    tested = {(fields["language"], fields["tower"]) for fields in FAMILY.values()}
    assert tested == {(language, tower) for language in LANGUAGES for tower in TOWERS}
    table = HookedLLaVA.supported()
    assert all(f"`{model_type}`" in table for model_type in (*LLAVA_MODELS, *LANGUAGE_MODELS, *VISION_TOWERS))


def test_the_sentence_on_tests_claims_no_more_than_they_cover() -> None:
    """Of each claim whether every pair of parts is run, in LLaVA and in the models that cut images into tiles."""
    said = HookedLLaVA.supported().splitlines()[-1]
    every_pair, rest = said.split(". ")
    assert "in every whole model" in every_pair
    assert varied(test_tiles.test_every_combination_of_parts_equals_hugging_face) == {"kind", "language", "tower"}
    assert varied(test_family.test_every_layer_and_the_logits_equal_hugging_face) == {"name", "n_images"}
    assert "one pair in LLaVA-NeXT and in LLaVA-OneVision" in rest
    for claim, in_llava, in_tiles in (
        ("padded", "padded_rows_equal_hugging_face_and_the_prompt_alone", "every_layer_equals_hugging_face"),
        ("generation", "greedy_generation_is_hugging_faces_token_by_token", "greedy_generation_equals_hugging_face"),
        ("saved", "a_saved_model_loads_in_transformers_and_here", "saved_and_loaded_by_both"),
    ):
        assert claim in rest
        assert "name" in varied(getattr(test_family, f"test_{in_llava}"))
        assert varied(getattr(test_tiles, f"test_{in_tiles}")) & {"kind", "language"} == {"kind"}


def varied(test: Any) -> set[str]:
    """The arguments that a test is parametrized by, each by a mark of its own."""
    return {mark.args[0] for mark in test.pytestmark}
