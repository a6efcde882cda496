"""The documentation as a site: pip install -e '.[docs]' && sphinx-build -W docs build/docs"""

import re

import typer
from typer.cli import get_docs_for_click
from typer.main import get_command

import auditgap

project = "auditgap"
author = "the auditgap authors"
version = release = auditgap.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns: list[str] = []
source_suffix = {".md": "markdown"}
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository that are no pages here
autodoc_member_order = "bysource"
autodoc_typehints = "description"
html_theme = "furo"  # light and dark, as the reader's system has it
html_title = "auditgap"
html_show_copyright = False
smartquotes = False  # they would make a dash of an option's two hyphens
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#c2410c", "color-brand-content": "#0b66a3"},
    "dark_css_variables": {"color-brand-primary": "#ff8f5c", "color-brand-content": "#6fb7f0"},
}
html_static_path: list[str] = []
copybutton_prompt_text = "$ "


def setup(app) -> None:
    def plain(_app, _what, name, _object, _options, lines) -> None:
        # |h| is a norm in our docstrings, a substitution to docutils; FILE:KIND and id@revision
        # links; an indented block is code
        made, in_code = [], False
        for line in lines:
            if name.startswith("auditgap.api."):  # a verb's settings, one a line
                line = re.sub(r"^    (\w+): ", r"- ``\1``: ", line)
            is_code = line.startswith("    ")
            if is_code and not in_code:
                made += ["::", ""]
            in_code = is_code or (in_code and not line)
            escaped = re.sub(r"[|@]|(?<=[A-Z]):(?=[A-Z])", r"\\\g<0>", line)
            made.append(line if is_code else escaped)
        lines[:] = made

    def in_full(group) -> None:
        # a list of commands would cut their descriptions short
        for command in getattr(group, "commands", {}).values():
            command.short_help = (command.help or "").partition("\n\n")[0]
            in_full(command)

    def commands(_app, name, source) -> None:
        # the reference of the commands is what the commands say of themselves
        if name == "commands":
            from auditgap.cli import app as cli

            command = get_command(cli)
            in_full(command)
            context = typer.Context(command, info_name="auditgap")
            listed = get_docs_for_click(obj=command, ctx=context, name="auditgap")
            listed = listed.replace("# `auditgap`", "", 1)
            examples = re.compile(r"(?:^auditgap .*\n\n?)+", re.MULTILINE)
            source[0] += examples.sub(lambda found: f"```console\n{found[0]}```\n\n", listed)

    app.connect("autodoc-process-docstring", plain)
    app.connect("source-read", commands)
