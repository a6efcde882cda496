"""Every link of README, docs and examples leads somewhere, and the site is built; test_docs_run.py
runs the commands."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from cli_tree import faults
from docs_pages import PAGES, ROOT


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


def test_commands_inside_sentences_are_there():
    """Those in blocks of code are run; of those in a sentence or a table the command and its options
    exist."""
    wrong, seen = [], 0
    for page in PAGES:
        if page.name != "CHANGELOG.md":  # it names commands of releases that are gone
            found = re.findall(r"`(auditgap [a-z][^`\n…|]*)`", page.read_text("utf-8"))
            seen += len(found)
            wrong += [f"{page.name}: {fault}" for line in found for fault in faults(line)]
    assert seen > 100 and not wrong, "\n".join(wrong)


def test_the_site_is_built_without_a_warning(tmp_path):
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        str(ROOT / "docs"),
        str(tmp_path / "site"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= pages
    assert "auditgap.api.audit" in (tmp_path / "site" / "reference.html").read_text("utf-8")
    commands = (tmp_path / "site" / "commands.html").read_text("utf-8")
    assert "auditgap lvs" in commands and "--untargeted-tokens" in commands
