"""How Sphinx builds the documentation: offline, and into pages that ask no server for anything."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from transformers import LlavaConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import hooked_llava
from hooked_llava.architecture import hook_specs
from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.supported import supported
from hooked_llava.datasets import formats
from hooked_llava.editing import roles
from hooked_llava.errors import HookedLLaVAError
from hooked_llava.options import attribution_methods, edit_methods, feature_scores, patch_maps, steering_modes, support

project = "hooked_llava"
author = "hooked_llava contributors"
copyright = author  # noqa: A001 (Sphinx's name)
version = release = hooked_llava.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks hold their outputs; tests/test_notebooks.py executes them
nb_ipywidgets_js: dict[str, Any] = {}  # no script from a server
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields have no targets of their own: many classes have one called `image`
default_role = "code"  # docstrings are written with single backticks
add_module_names = False
toc_object_entries = False

html_theme = "furo"
html_title = "hooked_llava"
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"


TABLES: dict[str, Callable[[], str]] = {
    "hook-table": lambda: hook_specs.markdown_table(LLaVAConfig.from_hf(LlavaConfig())),
    "supported-models": supported,
    "patch-map-table": patch_maps.markdown_table,
    "edit-method-table": edit_methods.markdown_table,
    "probe-role-table": roles.markdown_table,
    "steering-mode-table": steering_modes.markdown_table,
    "attribution-method-table": attribution_methods.markdown_table,
    "feature-score-table": feature_scores.markdown_table,
    "support-table": support.markdown_table,
    "table-format-table": formats.markdown_table,
}
"""Directives that are a table made from a registry of the library when the documentation is built."""


class RegistryTable(SphinxDirective):
    """One of `TABLES`, by the name of the directive."""

    def run(self) -> list[nodes.Node]:
        """The table's nodes."""
        return self.parse_text_to_nodes(TABLES[self.name]())


class PublicNames(SphinxDirective):
    """`{public-names} module`: what its `__all__` holds, documented by its docstrings. Errors have pages of their own."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The nodes of every name."""
        module = import_module(self.arguments[0])
        entries = [_entry(module, name) for name in public_names(module)]
        return self.parse_text_to_nodes("```{eval-rst}\n" + "\n".join(filter(None, entries)) + "\n```")


def public_names(module: ModuleType) -> list[str]:
    """`__all__`, or the functions and classes that the module itself defines."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
    return list(getattr(module, "__all__", None) or [name for name in own if not name.startswith("_")])


def _entry(module: ModuleType, name: str) -> str:
    value, full_name = getattr(module, name), f"{module.__name__}.{name}"
    if inspect.isclass(value) and issubclass(value, HookedLLaVAError):
        return ""
    if inspect.isclass(value):
        return f".. autoclass:: {full_name}\n   :members:\n"
    return f".. autofunction:: {full_name}\n" if callable(value) else ""


def _as_rst(app: Sphinx, what: str, name: str, value: object, options: Any, lines: list[str]) -> None:
    """Docstrings are written in Markdown's manner: strokes and tables are made reStructuredText's, before napoleon reads them."""
    found: list[str] = []
    example = False
    for line in lines:
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if re.fullmatch(r"\s*\|[-|]+\|\s*", line) and not example:
            continue
        if line.lstrip().startswith("| ") and not example:
            if not found or not found[-1].startswith("     "):
                found += ["", ".. list-table::", "   :header-rows: 1", ""]
            first, *others = [_escaped(cell.strip()) for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
            found += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
        else:
            found.append(line if example else _escaped(line))
    if found and what in ("attribute", "property", "data"):
        found[0] = f": {found[0]}"  # or napoleon takes what stands before a colon for a type
    lines[:] = found


def _escaped(text: str) -> str:
    """Strokes outside of backticks, which reStructuredText would take for substitutions."""
    parts = text.split("`")
    return "`".join(part if i % 2 else part.replace("|", r"\|") for i, part in enumerate(parts))


def _inline(translator: Any, node: nodes.math) -> None:
    translator.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def _display(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(latex2mathml.converter.convert(node.astext(), display="block"))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Sphinx calls this: its directives, and formulas as MathML, which browsers draw without a script."""
    app.connect("autodoc-process-docstring", _as_rst, priority=100)
    for name in TABLES:
        app.add_directive(name, RegistryTable)
    app.add_directive("public-names", PublicNames)
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
