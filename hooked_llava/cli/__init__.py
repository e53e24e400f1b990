"""The command `hooked-llava`: ask a model about images, explain its answers, and check it against Hugging Face.

One file for each command, `common.py` for what they share, and `edit_probes.py` for what `edit` asks besides. Everything
heavy is imported inside the commands, so that `--help` is quick.
"""

import typer

from hooked_llava.cli import ask, edit, explain, knockout, patch, trace, verify
from hooked_llava.cli.terminal import examples

app = typer.Typer(
    name="hooked-llava",
    help="Ask a LLaVA model about an image, and see how it came to its answer.",
    epilog=examples('ask demo "What color is the star?"', 'explain demo "What color is the star?" -o report.html')
    + "\n\nBundled images: demo, one-shape, two-shapes, five-shapes, demo-blue-star. The model tiny-shapes comes "
    "with the package, so all of this runs offline.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# In the order in which --help lists them.
app.command(epilog=ask.EPILOG)(ask.ask)
app.command(epilog=explain.EPILOG)(explain.explain)
app.command(epilog=patch.EPILOG)(patch.patch)
app.command(epilog=knockout.EPILOG)(knockout.knockout)
app.command(epilog=trace.EPILOG)(trace.trace)
app.command(epilog=edit.EPILOG)(edit.edit)
app.command(epilog=verify.EPILOG)(verify.verify)

__all__ = ["app"]
