"""Warnings point at the user's line, however deep in the library they arise; tests of messages leave the prose free."""

from __future__ import annotations

import ast
import inspect
import linecache
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hooked_llava import HookedLLaVA
from hooked_llava.analysis import head_scores, logit_attribution, logit_lens
from hooked_llava.errors import PromptWithoutTemplate, warn_user
from hooked_llava.replay import Replay
from hooked_llava.toy.images import image_path

BARE = "Who made the star?"


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model(BARE),
        lambda model: model.generate(BARE, max_new_tokens=1),
        lambda model: model.run_with_cache(BARE, names_filter="hook_embed"),
        lambda model: logit_lens(model, BARE),
        lambda model: head_scores(model, BARE, "Red"),
        lambda model: logit_attribution(model, BARE, "Red"),
        lambda model: Replay(model, BARE),
    ],
    ids=["model", "generate", "run_with_cache", "logit_lens", "head_scores", "logit_attribution", "replay"],
)
def test_every_way_in_warns_at_the_line_that_used_it(use: Callable[[HookedLLaVA], Any]) -> None:
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    with pytest.warns(PromptWithoutTemplate) as caught:
        use(model)
    assert {Path(w.filename) for w in caught} == {Path(__file__)}
    assert {w.lineno for w in caught} == {inspect.getsourcelines(use)[1]}, linecache.getline(__file__, caught[0].lineno)


def test_a_warning_from_the_users_own_file_is_at_his_line() -> None:
    with pytest.warns(UserWarning, match="here") as caught:
        warn_user("here", UserWarning)
    assert Path(caught[0].filename) == Path(__file__)


def test_the_same_question_prepared_is_silent_and_is_answered_otherwise() -> None:
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    question = "What color is the star?"
    prepared = model.generate(model.prepare(question, images=image_path("demo")))
    with pytest.warns(PromptWithoutTemplate):
        assert model.generate(question) != prepared


# ---------------------------------------------------------------------- tests of messages

TESTS = Path(__file__).parent
QUOTED = re.compile(r"(?<!\w)'[^']*(?:'|$)")
SENTENCE = re.compile(r"(?<!\w)[a-z]+(?: [a-z]+){3,}(?!\w)")
"""Four lower-case words in a row that quote nothing: prose, which may be improved. A test of a message matches names, values
and ranges."""


def message_patterns(path: Path) -> Iterator[tuple[int, str]]:
    """What a test file gives as `match=`, with its line: texts, and those of names from `parametrize`, loops and helpers."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for call in (node for node in ast.walk(function) if isinstance(node, ast.Call)):
            called = ast.unparse(call.func)
            matches = [keyword.value for keyword in call.keywords if keyword.arg == "match"]
            for match in {"pytest.raises": matches, "pytest.warns": matches, "says": call.args}.get(called, ()):
                names = {node.id for node in ast.walk(match) if isinstance(node, ast.Name)}
                values = [match, *(value for name in names for value in values_of(name, function, tree))]
                yield from {(text.lineno, text_of(text)) for value in values for text in texts_in(value)}


def texts_in(value: ast.expr) -> Iterator[ast.Constant | ast.JoinedStr]:
    """The strings of an expression, whole f-strings as one."""
    if isinstance(value, ast.JoinedStr) or (isinstance(value, ast.Constant) and isinstance(value.value, str)):
        yield value
    else:
        for child in ast.iter_child_nodes(value):
            if isinstance(child, ast.expr):
                yield from texts_in(child)


def text_of(text: ast.Constant | ast.JoinedStr) -> str:
    """A string's text, with {} for what an f-string fills in."""
    if isinstance(text, ast.Constant):
        return str(text.value)
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in text.values)


def values_of(name: str, function: ast.FunctionDef, tree: ast.Module) -> Iterator[ast.expr]:
    """What a name in a test may be: of its parameters, its loops, assignments, or what a helper is called with."""
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.parametrize":
            yield from at_name(name, decorator.args[0], decorator.args[1])
    for node in [*ast.walk(function), *tree.body]:
        if isinstance(node, ast.For):
            yield from at_name(name, node.target, node.iter)
        elif isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
            yield node.value
    parameters = [argument.arg for argument in function.args.args]
    if name in parameters and not function.name.startswith("test_"):
        position = parameters.index(name)
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) == function.name and len(call.args) > position:
                yield call.args[position]


def at_name(name: str, names: ast.expr, rows: ast.expr) -> Iterator[ast.expr]:
    """The values that a name takes in rows that are written out; all of a row if it is not known which of them."""
    if isinstance(names, ast.Constant):
        targets = [part.strip() for part in str(names.value).split(",")]
    else:
        targets = [ast.unparse(part).strip("'") for part in getattr(names, "elts", [names])]
    if name not in targets:
        return
    for row in rows.values if isinstance(rows, ast.Dict) else getattr(rows, "elts", [rows]):
        row = (
            row.args
            if isinstance(row, ast.Call) and ast.unparse(row.func) == "pytest.param"
            else getattr(row, "elts", [row])
        )
        yield from [row[targets.index(name)]] if len(row) == len(targets) else row


def test_messages_are_tested_by_names_and_values_not_by_sentences() -> None:
    found = [
        f"{path.relative_to(TESTS)}:{line}: {text}"
        for path in sorted(TESTS.rglob("test_*.py"))
        for line, text in message_patterns(path)
        if SENTENCE.search(QUOTED.sub("''", text))
    ]
    assert not found, "\n".join([f"{len(found)} patterns hold a sentence", *found])
