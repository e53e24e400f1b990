"""The tests, in folders that mirror the package."""

from tests.shape_checks import first_calls, install

install()

__all__ = ["first_calls"]
