"""`auditgap clean`: what may go, and what never does."""

import pytest
import toy_runs

from auditgap.cli import main
from auditgap.errors import UsageError
from auditgap.store import RunFolder
from auditgap.store.leavings import leavings


def ended(*words: str) -> int:
    with pytest.raises(SystemExit) as over:
        main(list(words))
    return over.value.code


@pytest.fixture
def run(tmp_path):
    """A finished run, a training that is done, and one that is not, each with what may go."""
    store = toy_runs.write_toy_run(tmp_path / "lvs", n=4, sites=(-1,), distances=False)
    (store.path / "scratch" / "pack.safetensors").write_bytes(b"x" * 1000)
    (store.path / "cells" / "a.parquet.corrupt").write_bytes(b"torn")
    for name, done in (("done", True), ("stopped", False)):
        (tmp_path / name / "checkpoints" / "step10").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "step10" / "state").write_bytes(b"y" * 5000)
        (tmp_path / name / "train.json").write_text("{}")
        if done:
            (tmp_path / name / "model").mkdir()
            (tmp_path / name / "model" / "model.safetensors").write_bytes(b"w")
    return tmp_path


def kept(folder):
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not {"scratch", "checkpoints"} & set(path.parts)
    )


def test_what_may_go_is_listed_largest_first(run):
    found = leavings(run)
    assert [one.path.relative_to(run).as_posix() for one in found] == [
        "done/checkpoints",
        "lvs/scratch/pack.safetensors",
        "lvs/cells/a.parquet.corrupt",
    ]
    assert [one.size for one in found] == [5000, 1000, 4]


def test_it_asks_and_then_deletes_nothing_else(run, capsys):
    rows, before = RunFolder.load(run / "lvs").rows(), kept(run)
    assert ended("clean", str(run)) == 2
    assert "add --yes" in capsys.readouterr().err and len(leavings(run)) == 3
    assert ended("clean", str(run), "--yes") == 0
    assert "Deleted: 0.0 MB" in capsys.readouterr().out
    assert kept(run) == [name for name in before if not name.endswith(".corrupt")]
    assert RunFolder.load(run / "lvs").rows().equals(rows)
    assert (run / "stopped/checkpoints/step10/state").exists(), "it is needed to go on"
    assert not leavings(run) and ended("clean", str(run)) == 0


def test_answers_that_were_paid_for_stay_until_the_run_is_done(run):
    store = RunFolder.load(run / "lvs")
    store.journals.mkdir()
    (store.journals / "answers.jsonl").write_bytes(b"{}\n")
    assert store.journals in [one.path for one in leavings(store.path)]
    for path in (store.path / "cells").glob("*.parquet"):
        path.unlink()
    found = [one.path for one in leavings(store.path)]
    assert store.journals not in found and store.path / "scratch" / "pack.safetensors" in found


def test_a_run_at_work_and_no_run_are_refused(run, tmp_path):
    store = RunFolder.load(run / "lvs")
    with store.lock(), pytest.raises(UsageError, match="is being written"):
        leavings(run)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no run"):
        leavings(tmp_path / "empty")


def test_watching_ends_when_nobody_works_on_it(tmp_path, capsys):
    store = toy_runs.write_toy_run(
        tmp_path / "lvs", n=8, sites=(-1, 0), distances=False, config={"audit": "latent"}
    )
    assert ended("status", str(store.path), "--watch") == 0
    said = " ".join(capsys.readouterr().out.split())
    planned = len(store.keys())
    assert f"lvs: {planned}/{planned}" in said and "gap so far" in said


def test_watching_says_who_works_how_fast_and_what_failed(tmp_path):
    from auditgap.cli.watch import line, look

    store = toy_runs.write_toy_run(tmp_path / "lvs", n=4, sites=(-1,), distances=False)
    with store.lock():
        [row], over = look(str(store.path))
        assert "pid" in row["by"] and line(row).startswith("lvs: ")
    assert over, "every cell is done"
