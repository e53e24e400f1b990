"""`python -m hooked_llava.cli`: the command `hooked-llava`."""

from hooked_llava.cli import app

app(prog_name="python -m hooked_llava.cli")
