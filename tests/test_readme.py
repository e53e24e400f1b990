"""What the README and the documentation show is what the library does."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.readme import MEASURED, README, ROOT, between, blocks, executed, measured, pages, parts

PAGES = pages()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(text_of(page))], ids=name_of)
def test_every_block_prints_what_its_page_says(page: Path) -> None:
    text = text_of(page)
    assert all(block.startswith(">>> ") for block in blocks(text)), "a block without a prompt is not executed"
    assert executed(text).splitlines() == text.splitlines()


@pytest.mark.parametrize("page", [page for page in PAGES if parts(text_of(page))], ids=name_of)
def test_measured_tables_are_those_of_the_result_files(page: Path) -> None:
    text = text_of(page)
    for part in parts(text):
        assert between(text, part).startswith("| ")
        if part in MEASURED:
            assert between(text, part) == measured(part)


def test_every_measured_part_stands_on_one_page() -> None:
    found = sorted(part for page in PAGES for part in parts(text_of(page)))
    assert found == sorted([*MEASURED, "accuracy"])


def test_the_readme_is_short() -> None:
    assert len(text_of(README).splitlines()) <= 200
