"""Files cut off at every byte, and kills at every touch of the disk: what is torn is seen, set
aside and done again."""

from __future__ import annotations

import json
import signal
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import children
import numpy as np
import pytest
import run_folders
import toys

from auditgap.errors import UsageError
from auditgap.store import RunFolder
from auditgap.sweep import local
from auditgap.sweep.state import SweepState


@dataclass(frozen=True)
class Small:
    """A row of few columns, so that its file has few offsets."""

    subject: str
    prompt_id: str
    lvs: float | None


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


@pytest.mark.parametrize("kind", ["cells", "generations"])
def test_a_result_cut_at_any_byte_is_set_aside_and_its_siblings_stay(tmp_path, kind):
    """Every offset, not a sample: the cell is not finished, its file is moved to *.corrupt, and a
    reader never sees torn rows."""
    store = toys.open_folder(tmp_path / "out")
    torn, sibling = toys.cells(0, 2)
    for cell in (torn, sibling):
        said = [{"completion": str(cell)}]
        store.write(cell, [Small("toy", "p0", 0.5)], generations=said, seconds=1)
    find = run_folders.file_of if kind == "cells" else run_folders.texts_of
    file = find(tmp_path / "out", torn.key)
    aside = file.with_name(f"{file.name}.1.corrupt")
    data, beside = file.read_bytes(), run_folders.file_of(tmp_path / "out", sibling.key)
    whole = beside.read_bytes()
    for offset in range(len(data)):
        file.write_bytes(data[:offset])
        assert not store.is_finished(torn.key), f"{offset} of {len(data)} bytes passed for all"
        assert not file.exists() and aside.stat().st_size == offset
        assert store.is_finished(sibling.key)
        if offset % 97 == 0:
            assert len(store.rows()) == (1 if kind == "cells" else 2)
            assert store.status().corrupt >= 1 and store.status().finished == 1
        aside.rename(file)
    file.write_bytes(data)
    assert store.is_finished(torn.key) and len(store.rows()) == 2
    assert beside.read_bytes() == whole


@pytest.mark.parametrize("name", ["run.json", "plan.json"])
def test_a_document_of_which_one_byte_changed_is_refused_by_every_reader(tmp_path, name):
    """Another number, word or name that is still JSON is never believed, and the sentence names
    the file."""
    out = tmp_path / "out"
    store = toys.open_folder(out)
    store.plan(toys.cells(0, 1))
    store.write(toys.cells(0)[0], [Small("toy", "p0", 0.5)], seconds=1)
    data = (out / name).read_bytes()
    same = 0
    for at in range(len(data)):
        changed = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        (out / name).write_bytes(changed)
        with suppress(ValueError):
            same += json.loads(changed) == json.loads(data)  # a space for another
        try:
            RunFolder.load(out).status()
        except UsageError as error:
            assert name in str(error) and "damaged" in str(error) and "auditgap" not in str(error)
        else:
            assert json.loads(changed) == json.loads(data), f"byte {at} of {name} passed"
    assert same < len(data) / 10
    (out / name).write_bytes(data)
    assert RunFolder.load(out).status().finished == 1


def test_work_inside_a_cell_cut_at_any_byte_is_computed_again(tmp_path):
    store = toys.open_folder(tmp_path / "out")
    wanted = {"delta": np.linspace(-1, 1, 5, dtype=np.float32)}
    store.remember("abc", lambda: wanted)
    path = tmp_path / "out" / "scratch" / "abc.safetensors"
    data = path.read_bytes()
    for offset in range(len(data)):
        path.write_bytes(data[:offset])
        calls = []
        assert np.array_equal(
            store.remember("abc", lambda calls=calls: calls.append(1) or wanted)["delta"],
            wanted["delta"],
        )
        assert calls == [1] and path.read_bytes() == data
        (tmp_path / "out" / "scratch" / "abc.safetensors.1.corrupt").unlink()


@pytest.mark.parametrize("name", ["run.json", "plan.json", "lock.json"])
def test_the_runs_own_files_cut_at_any_byte(tmp_path, name):
    """A torn description is refused and left as it is; a torn plan is made again; a torn note of a
    dead writer is no lock."""
    out = tmp_path / "out"
    store = toys.open_folder(out)
    store.plan(toys.cells(0, 1))
    store.write(toys.cells(0)[0], [Small("toy", "p0", 0.5)], seconds=1)
    if name == "lock.json":
        (out / name).write_text('{"pid": 1, "host": "elsewhere"}\n')
    data = (out / name).read_bytes()
    for offset in range(len(data) - 1):
        (out / name).write_bytes(data[:offset])
        if name == "run.json":
            for opened in (lambda: toys.open_folder(out), lambda: RunFolder.load(out)):
                with pytest.raises(UsageError, match=r"run\.json is damaged: it cannot be read"):
                    opened()
            assert (out / name).read_bytes() == data[:offset]
        elif name == "plan.json":
            store.plan(toys.cells(0, 1))
            assert (out / name).read_bytes() == data and (
                out / "plan.json.1.corrupt"
            ).stat().st_size == offset
            (out / "plan.json.1.corrupt").unlink()
        elif offset % 4 == 0:
            with toys.open_folder(out).lock():
                pass
    (out / name).write_bytes(data)
    if name == "lock.json":
        with pytest.raises(UsageError, match="elsewhere"):
            toys.open_folder(out)
    assert RunFolder.load(out).is_finished(toys.cells(0)[0].key)


# ------------------------------------------------------------------------- kills

AT_EVERY_TOUCH = """
    import os, signal, sys
    from pathlib import Path
    import toys
    from auditgap.store import files
    from auditgap.sweep.state import SweepState

    def begin(out):   # all that a start does before its first result
        store = toys.open_folder(out)
        with store.lock():
            store.plan(cell for group in toys.groups(2) for cell in group.cells)
            SweepState(toys.groups(2), store)

    def killed_at(step, out):
        calls = 0
        for name in ("write_new", "replace", "sync_folder", "rename", "unlink"):
            home = os if hasattr(os, name) else files
            def deadly(*args, name=name, real=getattr(home, name), **kw):
                nonlocal calls
                calls += 1
                if calls == step:
                    if name == "write_new":
                        real(args[0], args[1][: len(args[1]) // 2], *args[2:])
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kw)
            setattr(home, name, deadly)
        begin(out)

    out = Path(sys.argv[1])
    for step in range(1, 200):
        pid = os.fork()
        if not pid:
            try:
                killed_at(step, out)
            except BaseException as error:
                print("refused", step, error, flush=True)
                os._exit(1)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if os.WIFSIGNALED(status):
            continue
        print(step - 1, "kills, then", os.WEXITSTATUS(status))
        break
"""


def test_kills_between_scan_and_first_write_lose_no_earlier_cell(tmp_path):
    """A start that is killed at each touch of the disk in turn, before it writes a result; the next
    start knows every cell."""
    out, log = tmp_path / "out", tmp_path / "log"
    store = toys.open_folder(out)
    with store.lock():
        store.plan(toys.cells(0))
        assert local.run(toys.groups(1), lambda: toys.Toy(store, log), store).done == 3
    before = snapshot(out / "cells")
    child = children.python(AT_EVERY_TOUCH, str(out))
    said, err = child.communicate(timeout=120)
    kills, *_, code = said.split()
    assert code == "0" and "refused" not in said, said + err
    assert int(kills) >= 10, "opening, locking and planning touch the disk that often"
    assert snapshot(out / "cells") == before
    store = toys.open_folder(out)
    assert not list(out.rglob(".*.tmp")), "leavings of the dead are gone"
    with store.lock():
        outcome = local.run(toys.groups(2), lambda: toys.Toy(store, log), store)
    assert (outcome.done, outcome.skipped) == (3, 3)
    begun = toys.counts(log)
    assert begun.pop("made") == 2 and set(begun.values()) == {1}
    assert {entry["key"] for entry in store.planned()} == {
        c.key for g in toys.groups(2) for c in g.cells
    }


DIES_BEFORE_ITS_FIRST_CELL = children.SWEEP.replace(
    "lambda: toys.Toy(store, log, spells)",
    "lambda: __import__('os').kill(__import__('os').getpid(), 9)",
)


def test_the_third_run_still_sees_the_first_runs_cells(tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    first = children.python(children.SWEEP, str(out), str(log), '{(2, 0.02): "die"}')
    assert first.wait(60) == -signal.SIGKILL
    done = snapshot(out / "cells")
    assert len(done) == 3, "two groups of three, and a cell of the group at work"
    second = children.python(DIES_BEFORE_ITS_FIRST_CELL, str(out), str(log), "{}")
    assert second.wait(60) == -signal.SIGKILL
    assert snapshot(out / "cells") == done
    third = children.python(children.SWEEP, str(out), str(log), "{}")
    assert "Outcome(done=5, failed={}, skipped=7)" in third.communicate(timeout=60)[0]
    begun = toys.counts(log)
    assert begun.pop("made") == 2 and begun.pop("block2/0.02") == 2 and set(begun.values()) == {1}


def test_after_a_kill_the_books_are_kept_by_content(tmp_path):
    """The ledger of a new start asks the disk; what an older ledger thought it knew does not
    count."""
    store = toys.open_folder(tmp_path / "out")
    old = SweepState(toys.groups(1), store)
    local.run(toys.groups(1), lambda: toys.Toy(store, tmp_path / "log"), store)
    assert (
        old.outcome().done == 0 and old.open_cells(old.groups[0]) == [] and old.outcome().done == 3
    )
    run_folders.lose(tmp_path / "out", toys.cells(0)[0].key)
    assert [c.key for c in SweepState(toys.groups(1), store).open_cells(toys.groups(1)[0])] == [
        toys.cells(0)[0].key
    ]
    (file,) = (tmp_path / "out" / "cells").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    assert SweepState(toys.groups(1), store).open_cells(toys.groups(1)[0]) == list(toys.cells(0))
    assert [path.name for path in (tmp_path / "out" / "cells").iterdir()] == [
        f"{file.name}.1.corrupt"
    ]
