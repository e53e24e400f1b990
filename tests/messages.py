"""What errors say, in tests: names, values and ranges, so that the prose between them is free."""

from __future__ import annotations

from typing import Any

import pytest

from hooked_llava.errors import InputError


def says(pattern: str) -> Any:
    """Expects an `InputError` whose message has this pattern: names, values and ranges with `.*` between them."""
    return pytest.raises(InputError, match=pattern)
