"""A released table is known by what it holds, whatever its name and whoever saved it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hooked_llava.datasets.formats import TABLE_FORMATS, table_format
from hooked_llava.errors import InputError
from hooked_llava.toy.constraint_tables import write_constraints
from hooked_llava.toy.gqa_tables import write_gqa
from hooked_llava.toy.pope_tables import write_pope

WRITERS = {"GQA": write_gqa, "POPE": write_pope, "VQA-Constraints": write_constraints}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tables")
    return {name: write(root / name, 2) for name, write in WRITERS.items()}


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_and_each_of_its_files_are_known_and_read(name: str, folders: dict[str, Path]) -> None:
    found = TABLE_FORMATS[name]
    assert table_format(folders[name]) is found
    files = [file for file in folders[name].iterdir() if file.suffix != ".png"]
    assert len(files) == len(found.kinds)
    for file in files:
        assert table_format(file) is found
        rows, note = found.read(file, 1)
        assert len(rows) == 1
        assert note == (
            "" if name != "VQA-Constraints" else "1 questions (0 placed with other capitals or punctuation)"
        )
    rows, _ = found.read(folders[name], None)
    assert {row.kind for row in rows} == set(found.kinds)


def test_a_table_that_another_program_saved_is_known(tmp_path: Path, folders: dict[str, Path]) -> None:
    for name in ("GQA", "VQA-Constraints"):
        text = next(folders[name].glob("*.csv")).read_text(encoding="utf-8")
        saved = tmp_path / "mine.txt"
        saved.write_text(text.replace(",", ";"), encoding="utf-16")
        assert table_format(saved) is TABLE_FORMATS[name]


def test_of_a_folder_with_several_tables_the_expected_one_is_taken(tmp_path: Path) -> None:
    for write in WRITERS.values():
        write(tmp_path, 1)
    for name in WRITERS:
        assert table_format(tmp_path, [name]) is TABLE_FORMATS[name]


def test_another_table_is_named_and_what_is_expected(tmp_path: Path, folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"GQA.*It has none.*mine.*VQA-Constraints.*OK-VQA"):
        table_format(folders["GQA"], ["VQA-Constraints"], needs="It has none", own="mine")
    with pytest.raises(InputError, match=r"GQA.*ChooseAttr.*type_structural.*POPE.*random"):
        table_format(tmp_path, ["GQA", "POPE"])
    with pytest.raises(InputError, match=r"'nowhere'.*POPE"):
        table_format("nowhere")
