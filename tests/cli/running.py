"""The command as a user runs it."""

from __future__ import annotations

from click.testing import Result
from typer.testing import CliRunner

from hooked_llava.cli import app

QUESTION = "What color is the star?"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "120", "TERM": "dumb"})


def refused(*arguments: str) -> str:
    """The error, in one line; besides only warnings may be said, and nothing to standard output."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    return "\n".join(line for line in result.stderr.strip().splitlines() if not line.startswith("Warning: "))
