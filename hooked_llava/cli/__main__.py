"""`python -m hooked_llava.cli`."""

from hooked_llava.cli import app

app()
