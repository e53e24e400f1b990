"""The command `hooked-llava`: ask a model about images, explain its answers, and check it against Hugging Face.

One file for each command; `command.py` makes a function a command, `common.py` and `options.py` hold what several share,
`tables.py` how a table of questions is given, `edit_options.py` and `edit_probes.py` what `edit` takes besides; the files that
begin with `sae` are the commands of `sae`.
Everything heavy is imported inside the commands, so that `--help` is quick.
"""

import typer

from hooked_llava.cli.ask import ask
from hooked_llava.cli.describe import describe
from hooked_llava.cli.edit import edit
from hooked_llava.cli.explain import explain
from hooked_llava.cli.knockout import knockout
from hooked_llava.cli.patch import patch
from hooked_llava.cli.pope import pope
from hooked_llava.cli.probability import probability
from hooked_llava.cli.sae import app as sae_app
from hooked_llava.cli.terminal import examples
from hooked_llava.cli.trace import trace
from hooked_llava.cli.verify import verify

app = typer.Typer(
    name="hooked-llava",
    help="Ask a LLaVA model about an image, and see how it came to its answer.",
    epilog=examples('ask demo "What color is the star?"', 'explain demo "What color is the star?" -o report.html')
    + "\n\nBundled images: demo, one-shape, two-shapes, five-shapes, demo-blue-star, and wide for the model "
    "tiny-shapes-next. It and tiny-shapes come with the package, so all of this runs offline.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# In the order in which --help lists them.
for _command in (ask, explain, patch, knockout, probability, pope, trace, edit, describe, verify):
    app.command(epilog=_command.epilog)(_command.run)
app.add_typer(sae_app, name="sae")

__all__ = ["app"]
