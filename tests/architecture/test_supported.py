from __future__ import annotations

from hooked_llava import HookedLLaVA
from hooked_llava.architecture.language import LANGUAGE_MODELS
from hooked_llava.architecture.vision import VISION_TOWERS
from tests.builders import LANGUAGES, TOWERS
from tests.pairs import FAMILY


def test_what_is_said_to_load_is_tested() -> None:
    assert {config.model_type for config in LANGUAGES.values()} == set(LANGUAGE_MODELS)
    assert {config.model_type for config in TOWERS.values()} == set(VISION_TOWERS)
    tested = {(fields["language"], fields["tower"]) for fields in FAMILY.values()}
    assert tested == {(language, tower) for language in LANGUAGES for tower in TOWERS}
    table = HookedLLaVA.supported()
    assert all(f"`{model_type}`" in table for model_type in (*LANGUAGE_MODELS, *VISION_TOWERS))
