"""Ten kinds of tampering and more, several of each, by somebody who knows how checksums are made but
has not the key: each is caught, and named for what it is. And honest runs of every shape: none is
accused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import honest
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import run_folders
import signed_run
from signed_run import CARD, Signed, resealed, typed

from auditgap import evidence
from auditgap.audits.latent.audit import LATENT
from auditgap.errors import UsageError
from auditgap.evidence import attest, cells, dsse, keys
from auditgap.report import tables as lvs
from auditgap.store import RunFolder, files, merge, tables
from auditgap.types import Cell

Act = Callable[[Signed], None]


def keys_of(run: Signed) -> list[str]:
    """The cells' keys, the edited ones first."""
    records = run.store.records()
    return [r["key"] for r in sorted(records, key=lambda r: r["description"]["site"] is None)]


# -- each kind, with what `verify` has to call it


def weights() -> Iterator[Act]:
    def flipped(name: str, at: int) -> Act:
        def act(run: Signed) -> None:
            data = bytearray((run.model / name).read_bytes())
            data[at] ^= 1
            (run.model / name).write_bytes(data)

        return act

    yield flipped("model.safetensors", -1)
    yield flipped("model.safetensors", 5000)
    yield flipped("tokenizer.json", 40)
    yield lambda run: (run.model / "vocab.json").write_text("{}")


def row() -> Iterator[Act]:
    def changed(change) -> Act:
        def act(run: Signed) -> None:
            def with_rows(cell):
                made = change(cell.rows)
                # the record follows, so that the file is whole by every checksum
                told = {"sha256": tables.content_sha256(made), "n_rows": len(made)}
                return replace(cell, record=cell.record | told, rows=made)

            run_folders.remake(run.out, keys_of(run)[0], with_rows)

        return act

    def column(name: str, value) -> Callable:
        def change(table):
            at = table.schema.get_field_index(name)
            first = pa.array([True] + [False] * (len(table) - 1))
            made = pc.if_else(first, value, table[name])
            return table.set_column(at, table.schema.field(name), made.cast(table[name].type))

        return change

    yield changed(column("lvs", 0.0))
    yield changed(column("verdict_edited", "broken"))
    yield changed(lambda table: table.slice(1))
    yield changed(lambda table: table.take(list(range(len(table)))[::-1]))


def record() -> Iterator[Act]:
    def changed(**members) -> Act:
        def act(run: Signed) -> None:
            def told(cell):
                return replace(cell, record=cell.record | members)

            run_folders.remake(run.out, keys_of(run)[1], told)

        return act

    yield changed(seconds=0.5)
    yield changed(info={"longer": 3})
    yield changed(written="2020-01-01T00:00:00.000+00:00")
    yield changed(attempts=7)


def criterion() -> Iterator[Act]:
    def in_report(**changes) -> Act:
        path = "report.json"
        return lambda run: resealed(run.out / path, lambda d: d["criteria"].update(changes))

    def in_plan(**changes) -> Act:
        def act(run: Signed) -> None:
            path = run.out / attest.PLAN_FILE
            envelope = dsse.read(path)
            said = envelope.statement
            said["predicate"]["criteria"] |= changes
            dsse.write(path, replace(envelope, payload=json.dumps(said).encode()))

        return act

    yield in_report(gap=0.5)
    yield in_report(accept_screening=True)
    yield in_plan(gap=0.5)
    yield in_plan(safe=0.1)


def dropped_cell() -> Iterator[Act]:
    for number in range(4):
        yield lambda run, number=number: run_folders.lose(run.out, keys_of(run)[number])


def added_cell() -> Iterator[Act]:
    def more(number: int) -> Act:
        def act(run: Signed) -> None:
            config, options = LATENT.read(run.config, {})
            plan = LATENT.prepare(config, options)
            one: Cell = replace(plan.cells[number + 1], settings={"seed": 100 + number})
            store = run.store
            with store.lock():
                store.plan([one])
                signed_run.write(store, one, plan.prompts, number)

        return act

    yield from map(more, range(4))


def judge_card() -> Iterator[Act]:
    def changed(change) -> Act:
        def act(run: Signed) -> None:
            resealed(run.out / "run.json", lambda d: change(d["info"]["judge_cards"]))

        return act

    yield changed(lambda cards: cards[0].update(sens_k=1, sensitivity=1.0))
    yield changed(lambda cards: cards[0].update(informedness=0.99))
    yield changed(lambda cards: cards.pop())
    yield changed(lambda cards: cards.append(CARD))


def order() -> Iterator[Act]:
    def listed(change) -> Act:
        def act(run: Signed) -> None:
            resealed(run.out / cells.LEAVES, lambda d: d.update(leaves=change(d["leaves"])))

        return act

    yield listed(lambda leaves: leaves[::-1])
    yield listed(lambda leaves: leaves[1:] + leaves[:1])
    yield listed(lambda leaves: [leaves[1], leaves[0], *leaves[2:]])
    yield listed(lambda leaves: sorted(leaves, key=lambda leaf: leaf["rows"]))


def config() -> Iterator[Act]:
    """Replayed: the signed result of one run, put into the folder of another."""

    def other(**changes) -> Act:
        return lambda run: resealed(run.out / "run.json", lambda d: d["config"].update(changes))

    yield other(eps=[0.2])
    yield other(seed=5)
    yield other(judge="builtin")
    yield other(max_new_tokens=2)


def model() -> Iterator[Act]:
    def named(change) -> Act:
        return lambda run: resealed(run.out / "run.json", lambda d: change(d["config"]["subjects"]))

    def plan_of(change) -> Act:
        return lambda run: _other_plan(run, change)

    yield named(lambda known: known.update(dict.fromkeys(known, "f00d" * 6)))
    yield named(lambda known: known.update(another="9c1e" * 6))
    yield plan_of(lambda said: said["subject"][0]["digest"].update(sha256="00" * 32))
    yield plan_of(
        lambda said: said["predicate"].update(fingerprints={"./another": "9c1e" * 6}),
    )


def plan() -> Iterator[Act]:
    yield lambda run: _other_plan(run, lambda said: said["predicate"]["cells"].pop())
    yield lambda run: _other_plan(run, lambda said: said["predicate"].update(estimate={}))
    yield lambda run: _other_plan(run, lambda said: said["predicate"]["criteria"].update(gap=0.9))
    yield lambda run: (run.out / attest.PLAN_FILE).unlink()


def _other_plan(run: Signed, change) -> None:
    """A plan that the auditor has signed as well, for something else."""
    said = dsse.read(run.plan).statement
    change(said)
    dsse.write(run.out / attest.PLAN_FILE, dsse.sign(said, keys.private(run.key)))


def signature() -> Iterator[Act]:
    def envelope(change) -> Act:
        def act(run: Signed) -> None:
            path = run.out / attest.RESULT_FILE
            dsse.write(path, change(dsse.read(path)))

        return act

    def said(**changes) -> Act:
        def change(found: dsse.Envelope) -> dsse.Envelope:
            made = found.statement
            made["predicate"] |= changes
            return replace(found, payload=json.dumps(made).encode())

        return envelope(change)

    def stranger(run: Signed) -> None:
        path = run.out / attest.RESULT_FILE
        pem = run.out.parent / "stranger.pem"
        keys.make(pem)
        dsse.write(path, dsse.sign(dsse.read(path).statement, keys.private(pem)))

    yield said(verdicts=[])
    yield envelope(lambda found: replace(found, signatures=(("", bytes(64)),)))
    yield stranger


def table() -> Iterator[Act]:
    def stored(run: Signed) -> None:
        frame = run.store.table("lvs")
        frame.loc[0, "median_lvs" if "median_lvs" in frame else "n"] = 0
        (run.out / "lvs.parquet").write_bytes(tables.seal(frame))

    def text(form: str, old: str, new: str) -> Act:
        def act(run: Signed) -> None:
            path = run.out / f"lvs.{form}"
            words = path.read_text()
            assert old in words
            path.write_text(words.replace(old, new, 1))

        return act

    yield stored
    yield text("csv", "targeted", "random")
    yield text("md", "targeted", "random")


def verdict() -> Iterator[Act]:
    def line(number: int, **changes) -> Act:
        path = "report.json"
        return lambda run: resealed(run.out / path, lambda d: d["verdicts"][number].update(changes))

    yield line(0, answer="inconclusive")
    yield line(-1, value=0.123)


def completions() -> Iterator[Act]:
    def act(run: Signed) -> None:
        def said(cell):
            at = cell.texts.schema.get_field_index("completion")
            made = pc.utf8_upper(cell.texts["completion"])
            return replace(cell, texts=cell.texts.set_column(at, "completion", made))

        run_folders.remake(run.out, keys_of(run)[0], said)

    yield act


def damaged() -> Iterator[Act]:
    def act(run: Signed, name: str) -> None:
        path = run.out / name
        path.write_bytes(path.read_bytes().replace(b'"seed": 0', b'"seed": 1', 1))

    yield lambda run: act(run, "run.json")


KINDS = (
    weights,
    row,
    record,
    criterion,
    dropped_cell,
    added_cell,
    judge_card,
    order,
    config,
    model,
    plan,
    signature,
    table,
    verdict,
    completions,
    damaged,
)
TAMPERINGS = [
    pytest.param(kind.__name__.replace("_", " "), act, id=f"{kind.__name__}-{number}")
    for kind in KINDS
    for number, act in enumerate(kind())
]


def test_there_are_enough():
    assert len(KINDS) >= 10 and len(TAMPERINGS) >= 40


@pytest.mark.parametrize(("kind", "act"), TAMPERINGS)
def test_it_is_caught_and_named(signed, tmp_path, kind, act):
    run = signed.copied(tmp_path)
    act(run)
    assert kind in run.kinds()


# -- nobody is accused who did nothing


def resumed(run: Signed, to: Path) -> Signed:
    store = LATENT.open(LATENT.prepare(*LATENT.read(run.config, {})), _options(run), run.out)
    assert len(store.run["sessions"]) > 1
    return run


def _options(run: Signed):
    return LATENT.read(run.config, {})[1]


def moved(run: Signed, to: Path) -> Signed:
    shutil.move(run.out, to / "elsewhere")
    return replace(run, out=to / "elsewhere")


def merged(run: Signed, to: Path) -> Signed:
    """Made on two machines, joined, and then attested."""
    for name, rest in (("one", 0), ("two", 1)):
        signed_run.run(run.config, to / name, keep=lambda n, rest=rest: n % 2 == rest)
    store = merge([to / "one", to / "two"], to / "whole")
    LATENT.reduce(store)
    assert typed("attest", to / "whole", "--plan", run.plan, "--key", run.key) == 0
    return replace(run, out=to / "whole")


def joined_otherwise(run: Signed, to: Path) -> Signed:
    """Each cell in a file of its own, as a run that is still at work has them."""
    signed_run.run(run.config, to / "alone", settled=False)
    found = RunFolder.load(to / "alone")
    assert len(list((to / "alone" / "cells").iterdir())) == len(found.records())
    assert typed("attest", to / "alone", "--plan", run.plan, "--key", run.key) == 0
    with found.lock():
        found.settle(found.keys())
    assert len(list((to / "alone" / "cells").iterdir())) < len(found.records())
    return replace(run, out=to / "alone")


def written_otherwise(run: Signed, to: Path) -> Signed:
    """Numbers, spaces and line ends as another machine writes them."""
    for name in ("run.json", "plan.json", "report.json", cells.LEAVES):
        document = files.unseal(run.out / name)
        (run.out / name).write_bytes(files.seal(document, indent=None))
    csv = run.out / "lvs.csv"
    lines = csv.read_text().splitlines()
    csv.write_text(
        "\n".join([lines[0], *(",".join(map(_number, line.split(","))) for line in lines[1:])])
    )
    return run


def _number(word: str) -> str:
    try:
        return f"{float(word):.16e}"
    except ValueError:
        return word


def without_its_page(run: Signed, to: Path) -> Signed:
    for name in ("report.html", "report.json", "lvs.parquet", "lvs.md", "SHA256SUMS"):
        (run.out / name).unlink()
    return run


SHAPES = (resumed, moved, merged, joined_otherwise, written_otherwise, without_its_page)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_an_honest_run_is_not_accused(signed, tmp_path, shape):
    run = shape(signed.copied(tmp_path / "copy"), tmp_path)
    assert run.findings() == []


@pytest.mark.parametrize("number", range(4))
def test_a_run_of_a_drawn_shape_is_not_accused(signed, tmp_path, number):
    """Of the two hundred of `make honest`; one of these is made on Ray."""
    if honest.is_on_ray(number):
        pytest.importorskip("ray")
    with honest.actors() if honest.is_on_ray(number) else nullcontext():
        assert honest.shaped(number, signed, tmp_path).findings() == []


def test_verify_makes_the_large_table_once(signed, monkeypatch):
    made, large = [], lvs.lvs_table
    monkeypatch.setattr(lvs, "lvs_table", lambda *a, **k: made.append(1) or large(*a, **k))
    assert signed.findings() == [] and len(made) == 1


def test_a_run_of_an_earlier_release_is_refused(signed, tmp_path):
    run = signed.copied(tmp_path)
    run_folders.age(run.out)
    with pytest.raises(UsageError, match="unchecked"):
        run.findings()
    assert typed("attest", run.out, "--key", run.key) == 2


def test_a_run_that_is_not_whole_or_not_the_plans_is_not_attested(signed, tmp_path, capsys):
    run = signed.copied(tmp_path)
    run_folders.lose(run.out, keys_of(run)[0])
    assert typed("attest", run.out, "--key", run.key) == 2
    assert "is not whole" in " ".join(capsys.readouterr().err.split())
    other = tmp_path / "other.dsse.json"
    words = ("plan", "lvs", "--config", run.config, "--set", "seed=3", "--sign", run.key)
    assert typed(*words, "--out", other) == 0
    capsys.readouterr()
    assert (
        typed("attest", signed.copied(tmp_path / "b").out, "--plan", other, "--key", run.key) == 2
    )
    assert "not the run that was planned: config" in " ".join(capsys.readouterr().err.split())


# -- the commands


def test_verify_says_what_it_saw(signed, tmp_path, capsys):
    run, public = signed.copied(tmp_path), signed.key.with_name("auditor.pem.pub")
    assert typed("verify", run.out, "--key", public, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["holds"] and said["findings"] == [] and "the plan" in said["checked"]
    assert any("--model" in line for line in said["not_checked"])
    run_folders.lose(run.out, keys_of(run)[0])
    assert typed("verify", run.out, "--key", public, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["holds"] and {"dropped cell"} <= {f["what"] for f in found["findings"]}
    assert all(set(f) == {"what", "where", "expected", "found"} for f in found["findings"])


def test_one_cell_is_shown_and_the_others_stay_withheld(signed, tmp_path, capsys):
    out, public = tmp_path / "cell.json", signed.key.with_name("auditor.pem.pub")
    key, others = keys_of(signed)[0], keys_of(signed)[1:]
    assert typed("disclose", signed.out, key, "--out", out) == 0
    assert typed("verify", out, "--key", public) == 0
    text = out.read_text()
    assert key in text and not any(other in text for other in others) and "colour" not in text
    with_texts = evidence.disclose(signed.store, key, completions=True)
    assert evidence.disclosure.verify(with_texts, signed.public) == []


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda d: d["record"].update(seconds=9.0), "record"),
        (lambda d, o: d.update(rows=o["rows"]), "row"),
        (lambda d, o: d.update(completions=o["completions"]), "completions"),
        (lambda d: d["proof"].update(index=d["proof"]["index"] ^ 1), "proof"),
        (lambda d: d["proof"]["path"].pop(), "proof"),
        (lambda d: d["leaf"].update(rows="00" * 32), "proof"),
        (lambda d: d["result"].update(signatures=[]), "signature"),
    ],
)
def test_a_disclosure_that_was_changed_is_named(signed, change, kind):
    one, other = (
        evidence.disclose(signed.store, key, completions=True) for key in keys_of(signed)[:2]
    )
    change(one, other) if change.__code__.co_argcount == 2 else change(one)
    assert kind in {found.what for found in evidence.disclosure.verify(one, signed.public)}


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["proof"].update(index="0"),
        lambda d: d["proof"].update(n=None),
        lambda d: d["proof"].update(n=2**5001, path=["00" * 32] * 5000),
        lambda d: d["proof"].update(path=[1]),
        lambda d: d["proof"].update(path=7),
        lambda d: d.update(record=[]),
        lambda d: d.update(rows=3),
        lambda d: d["leaf"].update(edits=[["x"]]),
        lambda d: d.update(leaf=[]),
        lambda d: d.update(result={"payload": 3}),
        lambda d: d.pop("proof"),
    ],
)
def test_what_is_no_disclosure_is_a_sentence(signed, change):
    one = evidence.disclose(signed.store, keys_of(signed)[0], completions=True)
    change(one)
    with pytest.raises(UsageError, match=r"no disclosure|no DSSE envelope"):
        evidence.disclosure.verify(one, signed.public)
