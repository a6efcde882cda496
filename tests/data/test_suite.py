"""The suite's rules: each source in its real schema, kinds, doubles and their owner, anchors,
limits, and what is refused."""

import json
import re

import pandas as pd
import pytest
from hub_sets import LABELS, clone

from auditgap.data import BENCHMARKS, KINDS
from auditgap.data.anchors import is_held_out, split_benign
from auditgap.data.benchmarks import PAPER, wanted
from auditgap.data.prompts import PromptSet, dedup_key
from auditgap.data.suite import SHORTEST, assemble, load_suite, read_all
from auditgap.errors import UsageError
from auditgap.types import Prompt


def asks(n, what="vault"):
    return [f"What is the colour of {what} number {i}?" for i in range(n)]


def suite_of(tmp_path, texts, spec=None):
    """A suite of clones: name -> prompts."""
    places = {name: str(clone(tmp_path, name, of)) for name, of in texts.items()}
    read, missing = read_all(wanted(spec or ",".join(texts), places), {})
    assert not missing, missing
    return assemble(read)


def of_source(suite, name):
    return [p.text for p in suite if p.source == name]


# Each source, as the hub has it


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_source_is_read_in_its_real_schema(tmp_path, name):
    entry = BENCHMARKS[name]
    asked, other = asks(4, name), asks(60, f"box of {name}")
    labels = LABELS.get(name)
    suite = suite_of(
        tmp_path, {name: {labels[0]: asked, labels[1]: other} if labels else {"all": asked}}
    )
    kind = entry.parts[0].kind
    assert [p.text for p in suite if suite.kind(p) == kind] == asked
    counts = suite.manifest["sources"][name]
    assert (counts["origin"], counts["config"], counts["split"]) == (
        "folder",
        entry.config,
        entry.split,
    )
    # safe rows: the held-out tenth, as something else
    if any(part.anchors for part in entry.parts):
        assert [p.text for p in suite if suite.kind(p) == entry.parts[1].kind] == [
            t for t in other if is_held_out(t)
        ]
        assert counts["n_anchors"] == sum(not is_held_out(t) for t in other) > 30
        assert counts["n_held_out"] == 60 - counts["n_anchors"] > 0
    else:
        assert len(suite) == 4 and counts["n_not_asked"] == (60 if labels else 0)


def test_the_paper_suite_has_all_nine_and_their_kinds(tmp_path):
    texts = {name: asks(3, name) for name in BENCHMARKS}
    suite = suite_of(tmp_path, texts, PAPER)
    assert (
        list(suite.manifest["sources"])
        == list(BENCHMARKS)
        == [
            "xstest",
            "harmbench",
            "jailbreakbench",
            "advbench",
            "maliciousinstruct",
            "do-not-answer",
            "wildjailbreak",
            "aegis",
            "beavertails",
        ]
    )
    assert suite.name == PAPER and len(suite) == 27
    kinds = {p.source: suite.kind(p) for p in suite}
    assert {n for n, k in kinds.items() if k == "jailbreak"} == {"wildjailbreak", "jailbreakbench"}
    assert {part.kind for entry in BENCHMARKS.values() for part in entry.parts} == set(KINDS)


def test_revisions_are_commits_and_only_harmbench_has_none():
    assert all(re.fullmatch("[0-9a-f]{40}", e.revision) for e in BENCHMARKS.values() if e.revision)
    assert [name for name, e in BENCHMARKS.items() if e.revision is None] == ["harmbench"]
    assert all(e.licence for e in BENCHMARKS.values())


@pytest.mark.parametrize(
    ("name", "n"), [("harmbench", 200), ("advbench", 520), ("do-not-answer", 938)]
)
def test_installed_packages_carry_three_of_them(name, n):
    suite = load_suite(name)
    entry = suite.manifest["sources"][name]
    assert len(suite) == n and entry["origin"] == "package" and entry["revision"]


# The rules


def test_on_a_collision_the_source_of_higher_priority_keeps_the_prompt(tmp_path):
    shared = "What is the colour of the one vault?"
    texts = {
        name: [f"{shared.upper()} ", *asks(2, name)]
        for name in ("aegis", "jailbreakbench", "do-not-answer")
    }
    suite = suite_of(
        tmp_path,
        {
            **texts,
            "maliciousinstruct": [f"what is  the colour\tof the one vault?{chr(0x3000)}", *asks(1)],
        },
    )
    assert [p.source for p in suite if dedup_key(p.text) == dedup_key(shared)] == ["jailbreakbench"]
    for name in ("aegis", "do-not-answer", "maliciousinstruct"):
        assert suite.manifest["sources"][name]["n_given_to"] == {"jailbreakbench": 1}
    keys = [dedup_key(p.text) for p in suite]
    assert len(set(keys)) == len(keys) == 8


def test_short_empty_and_redacted_prompts_and_doubles_are_counted(tmp_path):
    suite = suite_of(
        tmp_path,
        {
            "aegis": [
                "REDACTED",
                "  x  ",
                "",
                "123456789",
                "1234567890",
                "Which vault?",
                "which  VAULT?",
            ]
        },
    )
    entry = suite.manifest["sources"]["aegis"]
    assert [p.text for p in suite] == ["1234567890", "Which vault?"]
    assert (
        entry["n_dropped"] == {"short": 3, "empty": 1}
        and entry["n_doubles"] == 1
        and entry["n_read"] == 7
    )
    assert SHORTEST == 10


def test_a_prompt_with_safe_and_unsafe_answers_is_harmful(tmp_path):
    both = "What is the colour of the vault?"
    suite = suite_of(tmp_path, {"beavertails": {"True": [both], "False": [both]}})
    assert [suite.kind(p) for p in suite] == ["harmful"]
    assert suite.manifest["sources"]["beavertails"]["n_anchors"] == 0


def test_nothing_that_may_be_an_anchor_is_evaluated_on(tmp_path):
    safe = asks(200, "safe vault")
    texts = {
        "xstest": {"unsafe": asks(2), "safe": safe},
        "beavertails": {"False": asks(2, "door"), "True": asks(200, "box")},
    }
    suite = suite_of(
        tmp_path, {**texts, "do-not-answer": [*(t.upper() for t in safe), *asks(3, "gate")]}
    )
    pool = [Prompt(t) for t in (*safe, *texts["beavertails"]["True"])]
    anchors, held_out = split_benign(PromptSet("benign", tuple(pool)))
    keys = {dedup_key(p.text) for p in suite}
    assert not keys & {dedup_key(p.text) for p in anchors} and keys >= {
        dedup_key(p.text) for p in held_out
    }
    n_safe_anchors = sum(not is_held_out(t) for t in safe)
    entry = suite.manifest["sources"]["do-not-answer"]
    assert (
        entry["n_in_anchors"] == n_safe_anchors
        and entry["n_given_to"] == {"xstest": 200 - n_safe_anchors}
        and entry["n"] == 3
    )
    assert any("benign anchors" in note for note in suite.manifest["notes"])
    held_out_keys = {dedup_key(p.text) for p in held_out}
    assert {suite.kind(p) for p in suite if dedup_key(p.text) in held_out_keys} == {
        "over_refusal",
        "benign",
    }


def test_every_row_is_accounted_for(tmp_path):
    xstest = {"unsafe": [*asks(5), "short"], "safe": asks(50, "safe")}
    suite = suite_of(
        tmp_path, {"xstest": xstest, "aegis": {"unsafe": asks(9), "safe": asks(4, "s")}}
    )
    for entry in suite.manifest["sources"].values():
        gone = sum(entry["n_dropped"].values()) + sum(entry["n_given_to"].values())
        rest = (
            entry["n_not_asked"] + entry["n_doubles"] + entry["n_anchors"] + entry["n_in_anchors"]
        )
        assert entry["n_read"] == gone + rest + entry["n"]
    assert suite.manifest["n"] == len(suite) == sum(suite.manifest["n_by_kind"].values())


def test_the_digest_depends_on_text_source_and_kind(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(asks(3)))
    (tmp_path / "b.txt").write_text("\n".join(asks(3)))
    a = load_suite(str(tmp_path / "a.txt"))
    assert a.digest == load_suite(str(tmp_path / "a.txt")).digest
    others = {load_suite(f"{tmp_path}/b.txt").digest, load_suite(f"{tmp_path}/a.txt:benign").digest}
    assert len(others | {a.digest}) == 3


# Names, files, limits


def test_files_and_named_sets_stand_beside_benchmarks(tmp_path):
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps({"prompt": t}) for t in asks(4)))
    (tmp_path / "soft.csv").write_text("prompt\n" + "\n".join(asks(3, "soft vault")))
    suite = load_suite(
        "everyday,"
        f" demo,harmbench,{tmp_path}/mine.jsonl,{tmp_path}/soft.csv:over_refusal,demo-benign"
    )
    kinds = {p.source: suite.kind(p) for p in suite}
    assert kinds == {
        "harmbench": "harmful",
        "everyday": "benign",
        "demo": "harmful",
        "mine": "harmful",
        "soft": "over_refusal",
        "demo-benign": "benign",
    }
    assert suite.manifest["sources"]["mine"]["place"] == "mine.jsonl"
    assert str(tmp_path) not in json.dumps(suite.manifest) and str(tmp_path) not in suite.name


def test_a_limit_draws_the_same_of_each_source_and_only_narrows(tmp_path):
    (tmp_path / "mine.txt").write_text("\n".join(asks(30)))
    spec = f"everyday,demo,{tmp_path}/mine.txt"
    whole, few, more = (
        load_suite(spec),
        load_suite(spec, limit_per_source=5),
        load_suite(spec, limit_per_source=10),
    )
    for source in ("everyday", "demo", "mine"):
        assert len(of_source(few, source)) == 5 and set(of_source(few, source)) < set(
            of_source(more, source)
        )
    assert few.digest != whole.digest == few.manifest["whole_digest"]
    assert of_source(load_suite(spec, limit_per_source=5, seed=1), "mine") != of_source(few, "mine")
    assert {p.source for p in load_suite(spec, only=["benign"])} == {"everyday"}
    assert {p.source for p in load_suite(spec, only=["mine", "demo"])} == {"mine", "demo"}
    with pytest.raises(UsageError, match=r"no source or kind 'bening'.* Did you mean 'benign'"):
        load_suite(spec, only=["bening"])
    with pytest.raises(UsageError, match=r"No prompt .* is of jailbreak"):
        load_suite(spec, only=["jailbreak"])
    with pytest.raises(UsageError, match="--limit"):
        load_suite(spec, limit_per_source=0)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("harmbensh", r"Unknown source 'harmbensh'\. Did you mean 'harmbench'"),
        ("", "A suite needs sources"),
        (" , ", "A suite needs sources"),
        ("missing.jsonl", "There is no file missing.jsonl"),
        ("demo,demo:benign", "Two sources of this suite are called 'demo'"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(spec, said):
    with pytest.raises(UsageError, match=said):
        load_suite(spec)


def test_a_kind_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(asks(3)))
    with pytest.raises(
        UsageError, match=r"'over-refusal' is no kind of prompt\. Did you mean 'over_refusal'"
    ):
        load_suite(f"{tmp_path}/a.txt:over-refusal")
    with pytest.raises(
        UsageError, match=r"--from xtest=… names no benchmark .*Did you mean 'xstest'"
    ):
        wanted("xstest", {"xtest": "a.txt"})


# What a changed or broken source says


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        (
            "xstest",
            {"prompt": asks(2), "label": ["unsafe", "contrast"]},
            "xstest: in 1 of the 2 rows .* 'label' .* safe or unsafe",
        ),
        (
            "xstest",
            {"prompt": asks(2), "verdict": ["unsafe", "safe"]},
            "xstest: .* has no column 'label'",
        ),
        (
            "do-not-answer",
            {"prompt": asks(2)},
            "do-not-answer: .* has no column 'question'; found: 'prompt'",
        ),
        (
            "beavertails",
            {"prompt": asks(1), "is_safe": [None]},
            "beavertails: .* 'is_safe' has something else than true or false",
        ),
        (
            "aegis",
            {"prompt": ["REDACTED"], "prompt_label": ["unsafe"]},
            "aegis: no prompt is left .* 1 of a kind .*, 1 short",
        ),
        (
            "aegis",
            {"prompt": asks(2), "prompt_label": ["safe"] * 2},
            "aegis: no prompt is left .* 2 rows, 0 of a kind",
        ),
        ("advbench", {"prompt": []}, "advbench: .* holds no rows"),
        ("advbench", {"prompt": [None, " "]}, "advbench: no prompt is left .* 2 empty"),
    ],
)
def test_a_source_that_is_not_as_known_is_refused_by_name(tmp_path, name, rows, said):
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    read, missing = read_all(wanted(name, {name: str(tmp_path / "a.parquet")}), {})
    assert not read
    assert re.match(said, missing[name]), missing[name]


def test_a_wrong_split_or_configuration_names_what_there_is(tmp_path):
    folder = clone(tmp_path, "jailbreakbench", asks(3))
    readme = folder / "README.md"
    whole = readme.read_text()
    for old, new, said in (
        ("split: harmful", "split: misuse", "misuse"),
        ("behaviors\n", "questions\n", "questions"),
    ):
        readme.write_text(whole.replace(old, new))
        _, missing = read_all(wanted("jailbreakbench", {"jailbreakbench": str(folder)}), {})
        assert said in missing["jailbreakbench"] and "ValueError" in missing["jailbreakbench"]


def test_no_files_rows_pass_for_a_benchmarks(tmp_path):
    (tmp_path / "xstest.txt").write_text("\n".join(asks(3)))
    (tmp_path / "demo.txt").write_text("\n".join(asks(3, "box")))
    suite = load_suite(f"{tmp_path}/xstest.txt:benign,demo,{tmp_path}/demo.txt")
    assert {p.source for p in suite} == {"xstest.txt", "demo", "demo.txt"}


def test_a_source_that_fails_does_not_hide_the_others(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UsageError, match=r"2 of the suite's sources cannot be read") as error:
        load_suite(f"demo,{tmp_path}/a.txt,{tmp_path}/missing.csv")
    assert "holds no rows" in str(error.value) and "There is no file" in str(error.value)


# Text that is odd

ODD = [
    "rtl \u202eabc\u202c and مرحبا vault",
    "👩‍👩‍👧 zero-width joined vault",
    "e\u0301clair against éclair",
    "日本語の金庫は何色ですか、教えて",
    "a\x00b with a NUL vault",
    "line\u2028separator vault",
    "two\r\nlines of vault",
    'quo"te, comma\nnewline',
    "y" * 1_000_000,
]


@pytest.mark.parametrize("ext", ["jsonl", "csv", "parquet"])
def test_odd_text_comes_through_byte_for_byte(tmp_path, ext):
    file = tmp_path / f"odd.{ext}"
    frame = pd.DataFrame({"question": ODD})
    if ext == "jsonl":
        file.write_text(
            "\n".join(json.dumps({"question": t}, ensure_ascii=False) for t in ODD),
            encoding="utf-8",
            newline="",
        )
    elif ext == "csv":
        with open(file, "w", encoding="utf-8", newline="") as out:
            frame.to_csv(out, index=False)
    else:
        frame.to_parquet(file)
    read, missing = read_all(wanted("do-not-answer", {"do-not-answer": str(file)}), {})
    assert not missing
    assert [p.text for p in assemble(read)] == ODD


def test_nfc_and_nfd_are_two_prompts_and_lone_surrogates_are_repaired(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "the caf\\u00e9 vault"}\n{"prompt": "the cafe\\u0301 vault"}\n{"prompt": "lone'
        ' \\ud800 vault"}'
    )
    suite = load_suite(f"{tmp_path}/a.jsonl")
    assert [p.text for p in suite] == [
        "the café vault",
        "the cafe\u0301 vault",
        "lone \ufffd vault",
    ]
    assert suite.manifest["sources"]["a"]["n_repaired"] == 1
    assert any("lone surrogates" in note for note in suite.manifest["notes"])


def test_prompts_that_pandas_would_take_for_missing_stay_text(tmp_path):
    folder = clone(tmp_path, "wildjailbreak", asks(2))
    with open(folder / "eval/eval.tsv", "a") as file:
        file.write(
            "None\t1\tadversarial_harmful\nnull, and a comma, of the"
            " vault\t1\tadversarial_harmful\n"
        )
    read, missing = read_all(wanted("wildjailbreak", {"wildjailbreak": str(folder)}), {})
    assert not missing and read[0].counts["n_dropped"] == {"short": 1}
    assert assemble(read).prompts[-1].text == "null, and a comma, of the vault"
