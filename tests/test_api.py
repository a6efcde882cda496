"""The same from Python: results are those of the commands, imports stay light, and what comes back
is typed."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
import tiny

import auditgap
from auditgap.errors import PartlyFailed, UsageError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    home = tmp_path_factory.mktemp("api")
    tiny.save("llama", home / "model")
    (home / "asked.txt").write_text("tell the vault\ntell the door\ntell the key\n", "utf-8")
    common = {"device": "cpu", "dtype": "float32", "judge": "keyword", "max_new_tokens": 4}
    return home, common


def test_lvs_gives_the_table_that_the_folder_holds(world):
    home, common = world
    found = auditgap.lvs(
        str(home / "model"),
        prompts=str(home / "asked.txt"),
        reward="margin",
        layers="embedding,1",
        eps=[0.03],
        steps=2,
        attacks="targeted,random_matched",
        out=home / "lvs",
        **common,
    )
    assert (
        isinstance(found, auditgap.Result)
        and found.failed == {}
        and found.raise_failures() is found
    )
    pd.testing.assert_frame_equal(found.table, pd.read_parquet(home / "lvs" / "lvs.parquet"))
    assert len(found.table) == 4 and len(found.rows) == 3 * 5 and found.report.is_file()
    again = auditgap.load(home / "lvs")
    assert again.path == found.path and again.store.status().finished == 5


def test_the_notebook_opens_a_run(world, monkeypatch):
    """Its cells, one after the other, in one namespace: what a kernel does with them."""
    home, _ = world
    monkeypatch.setenv("AUDITGAP_RUN", str(home / "lvs"))
    notebook = json.loads(
        (Path(__file__).parents[1] / "examples" / "open_a_run.ipynb").read_text("utf-8")
    )
    space: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "no output is kept in the repository"
            exec("".join(cell["source"]), space)
    assert (
        len(space["targeted"]) == 2
        and len(space["gaps"]) == 1
        and space["run"].path == home / "lvs"
    )
    assert {"audit_gap", "robust"} <= set(space["verdicts"]["id"])
    assert space["figure"]._repr_svg_().startswith("<svg ")
    made = space["figure"].save(home / "asr.svg")
    assert ElementTree.parse(made).getroot().tag.endswith("svg")
    assert set(space["run"].profile().table["attack"]) == {"targeted", "random_matched"}
    with pytest.raises(UsageError, match="lvs or asr; 'nll' came"):
        space["run"].profile("nll")


def test_evaluate_and_distance(world):
    home, common = world
    asked = auditgap.evaluate(
        str(home / "model"), suite=f"{home / 'asked.txt'}:harmful", out=home / "asked", **common
    )
    assert {"compliance", "refusal"} <= set(asked.table) and asked.table["n"].max() == 3
    far = auditgap.distance(
        str(home / "model"),
        prompts=str(home / "asked.txt"),
        layers="1",
        eps=[0.05],
        steps=2,
        bisections=0,
        distance_limit=2,
        out=home / "far",
        **common,
    )
    assert len(far.rows) >= 3


def test_a_whole_audit(world):
    home, common = world
    found = auditgap.audit(
        str(home / "model"),
        profile="smoke",
        suite=f"{home / 'asked.txt'}:harmful",
        prompts=str(home / "asked.txt"),
        lvs={"reward": "margin", "steps": 2},
        out=home / "whole",
        **common,
    )
    assert isinstance(found, auditgap.AuditResult) and found.failed == {}
    words = ["subject", "question", "answer", "figure", "reason"]
    values = [
        "id",
        "value",
        "lo",
        "hi",
        "threshold",
        "cause",
        "n",
        "needs",
        "thinking",
        "criterion",
    ]
    assert list(found.verdicts.columns) == words + values
    assert set(found.parts) == {"evaluate", "lvs"} and len(found.table("lvs")) == len(
        found.parts["lvs"].table
    )
    assert found.overall == found.data["overall"] and found.report.is_file()


def test_the_table_of_every_audit_or_a_sentence_never_an_empty_frame(tmp_path):
    """A run folder of any audit gives its own table; one without gives its tables' names."""
    from auditgap.audits import AUDITS
    from auditgap.store import RunFolder

    frame = pd.DataFrame({"subject": ["s"], "n": [3]})
    for audit, name in ((a.name, a.main_table) for a in AUDITS.values()):
        store = RunFolder.open(tmp_path / audit, config={"audit": audit}, info={})
        with pytest.raises(UsageError, match=r"has no single table\. Its tables are: none"):
            auditgap.load(tmp_path / audit).table  # noqa: B018
        store.write_table(f"{name or 'em_rates'}.parquet", frame)
        found = auditgap.load(tmp_path / audit)
        if name is None:
            pd.testing.assert_frame_equal(found.tables["em_rates"], frame)
            with pytest.raises(UsageError, match="em_rates"):
                found.table  # noqa: B018
        else:
            pd.testing.assert_frame_equal(found.table, frame)
    RunFolder.open(tmp_path / "training", config={"training": "sft"}, info={})
    with pytest.raises(UsageError, match="a training run"):
        auditgap.load(tmp_path / "training").table  # noqa: B018


def test_completion_finds_the_verbs():
    assert {"lvs", "audit", "distance", "evaluate", "load"} <= set(dir(auditgap))
    assert "TYPE_CHECKING" not in dir(auditgap)


def test_failures_are_kept_and_can_be_raised(world):
    home, _ = world
    lost = auditgap.Result(home / "lvs", {"targeted at block1": "it broke"})
    with pytest.raises(PartlyFailed, match="it broke"):
        lost.raise_failures()
    with pytest.raises(UsageError, match="no run folder"):
        auditgap.load(home)
    with pytest.raises(UsageError, match="stepz"):
        auditgap.lvs(str(home / "model"), stepz=3)
    with pytest.raises(AttributeError, match="lvss"):
        auditgap.lvss  # noqa: B018


def test_importing_it_is_light():
    code = (
        "import sys, auditgap; auditgap.__version__; print([m for m in ('torch', 'pandas') if m in"
        " sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
