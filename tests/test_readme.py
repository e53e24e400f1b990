"""What the README shows is what the library does."""

from __future__ import annotations

from transformers import LlavaConfig

from benchmarks.readme import README, SESSIONS, between, session
from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.hook_specs import markdown_table


def test_the_session_prints_what_the_readme_says() -> None:
    text, names = README.read_text(encoding="utf-8"), {}
    for part in SESSIONS:
        assert session(text, part, names).splitlines() == between(text, part).splitlines()


def test_the_hook_table_is_the_generated_one() -> None:
    assert between(README.read_text(encoding="utf-8"), "hooks") == markdown_table(LLaVAConfig.from_hf(LlavaConfig()))


def test_measured_tables_are_filled() -> None:
    text = README.read_text(encoding="utf-8")
    assert "hooked_llava" in between(text, "overhead")
    assert "color_vqa" in between(text, "accuracy")
