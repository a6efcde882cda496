"""Nothing that a page shows is missing from what programs read: every table in report.json and as
CSV, every section in the contents, whatever was audited."""

from __future__ import annotations

import json
import re
from html import unescape
from xml.etree import ElementTree

import jsonschema
import pandas as pd
import pytest
from emergent_runs import write_study
from test_behaviour_page import rows_of, store_of
from test_curve import PAIR, rows
from test_curve import store_of as curve_of

from auditgap.audits import bundle, pages
from auditgap.audits.intervene.rows import InterveneRow
from auditgap.audits.probe.rows import ProbeRow
from auditgap.report.section import Table, blocks_of, figures_of, tables_of
from auditgap.report.verdict_lines import Criteria
from auditgap.store import RunFolder
from auditgap.types import Cell, Subject


def probed(path) -> RunFolder:
    made = [
        ProbeRow(
            subject=name,
            role="base" if name == "base" else "subject",
            example_id=f"{i}-{label}",
            prompt_id=f"p{i}",
            group=f"p{i}",
            label=label,
            split="evaluation",
            n_tokens=9,
            n_cut=0,
            logit=float(label + 0.3 * (i % 5)),
            probability=0.3 + 0.3 * label + 0.01 * i,
            text_score=float(i % 3),
            length_score=float(i % 4),
            shuffled_score=float(i % 2),
        )
        for name in ("base", "twin")
        for i in range(12)
        for label in (0, 1)
    ]
    return stored(path, "probe", made)


def intervened(path) -> RunFolder:
    made = [
        InterveneRow(
            subject="twin",
            site="block2",
            layer_index=2,
            intervention="steering",
            strength=strength,
            angle=None,
            arm=arm,
            draw=0,
            prompt_id=f"p{i}",
            donor_id=None,
            n_fit=12,
            n_prompt_tokens=9,
            n_new_tokens=5,
            l2=1.0,
            relative_norm=0.2,
            completion_nll=1.0,
            coherent=True,
            verdict_clean="refusal",
            verdict_donor=None,
            verdict="harmful" if arm == "edit" and i < 6 * strength else "refusal",
        )
        for strength in (0.5, 1.0)
        for arm in ("edit", "control")
        for i in range(12)
    ]
    return stored(path, "intervene", made)


def stored(path, attack: str, made: list) -> RunFolder:
    names = list(dict.fromkeys(row.subject for row in made))
    about = [{"name": name, "fingerprint": name} for name in names]
    store = RunFolder.open(path, config={"audit": attack}, info={"subjects": about})
    for name in names:
        cell = Cell(Subject(name, name), None, None, attack, "set")
        store.write(cell, [row for row in made if row.subject == name], seconds=1.0)
    return store


AUDITS = ("latent", "behaviour", "sft_curve", "probe", "intervene", "emergent")


@pytest.fixture(scope="module")
def stores(toy_run, tmp_path_factory) -> dict[str, RunFolder]:
    home = tmp_path_factory.mktemp("runs")
    return {
        "latent": toy_run(home / "latent", subjects={"twin": 4}, n=8, sites=(-1, 2), eps=(0.03,)),
        "behaviour": store_of(home / "behaviour", rows_of()),
        "sft_curve": curve_of(home / "sft", rows(PAIR), base="base"),
        "probe": probed(home / "probe"),
        "intervene": intervened(home / "intervene"),
        "emergent": write_study(home / "em", {"law": 0.4, "maths": 0.1}, n_prompts=6, samples=1),
    }


@pytest.mark.parametrize("audit", [*AUDITS, "all"])
def test_every_table_of_the_page_is_in_report_json_and_as_csv(audit, stores, tmp_path):
    folders = list(stores.values()) if audit == "all" else [stores[audit]]
    bundle.write(folders, out=tmp_path, criteria=Criteria(), title="t")
    page = (tmp_path / "report.html").read_text("utf-8")
    found = json.loads((tmp_path / "report.json").read_text("utf-8"))
    jsonschema.validate(found, bundle.schema())
    sections = pages.sections_of(pages.from_store(folders))
    tables = [b for s in sections for b in blocks_of(s) if isinstance(b, Table)]
    names = {table.label: table.name for table in tables} | {
        "Verdicts": "",
        "Verdicts, in short": "",
    }
    labels = [unescape(label) for label in re.findall(r'role="region" aria-label="([^"]+)"', page)]
    assert labels and page.count("<table") == len(labels)
    whole = [label.removesuffix(", continued") for label in labels]  # of a table that was folded
    for name in filter(None, map(names.__getitem__, whole)):
        rows = found["tables"][name]
        assert rows and len(pd.read_csv(tmp_path / "tables" / f"{name}.csv")) == len(rows), name
    assert len(tables_of(sections)) >= len({n for n in names.values() if n})


@pytest.mark.parametrize("audit", AUDITS)
def test_every_section_is_in_the_contents_and_every_figure_has_its_data(audit, stores, tmp_path):
    path = pages.write([stores[audit]], out=tmp_path)
    page = path.read_text("utf-8")
    assert re.findall(r'<section id="([^"]+)"', page) == re.findall(r'<li><a href="#([^"]+)"', page)
    sections = pages.sections_of(pages.from_store([stores[audit]]))
    drawn = {name for name, figure in figures_of(sections).items() if not figure.missing}
    assert drawn == {p.stem for p in (tmp_path / "figures").glob("*.csv")}
    assert drawn == set(re.findall(r'<figure id="fig-([^"]+)"', page)) and drawn
    for name in drawn:  # and its drawing, which needs neither the page nor its style sheet
        source = (tmp_path / "figures" / f"{name}.svg").read_text("utf-8")
        root = ElementTree.fromstring(source)
        panels = sum(len(panels) for _, panels in figures_of(sections)[name].groups)
        assert sum("aria-labelledby" in svg.attrib for svg in root) == panels > 0, name
        assert "var(" not in source and "<script" not in source
        kinds = {kind for node in root.iter() for kind in node.get("class", "").split()}
        styled = set(re.findall(r"\.([\w-]+)", root.find("{*}style").text))
        assert {kind for kind in kinds if re.fullmatch(r"k\d", kind)} <= styled


def test_a_section_says_what_it_found_wherever_it_stands(stores):
    """What is not in the page's reading stands in the section: nothing is said nowhere."""
    both = [stores["behaviour"], stores["probe"], stores["intervene"]]
    text = unescape(re.sub(r"<[^>]+>", "", pages.render(pages.from_store(both))))
    made = pages.audited(pages.from_store(both))
    for section in made:
        for _, sentences in section.findings:
            assert all(sentence in text for sentence in sentences), section.id


def test_files_of_an_earlier_report_do_not_pass_for_this_ones(stores, tmp_path):
    pages.write([stores["probe"]], out=tmp_path)
    assert (tmp_path / "figures" / "probe_scores.csv").is_file()
    pages.write([stores["behaviour"]], out=tmp_path)
    assert not (tmp_path / "figures" / "probe_scores.csv").exists()
    assert not (tmp_path / "tables" / "probe.csv").exists()
