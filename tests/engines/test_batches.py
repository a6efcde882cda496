"""Batches against a real server on loopback that takes files and gives files back, and counts what it
was asked: nothing that was paid for is dropped or asked for twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from batch_server import Handler, Server, running

from auditgap.engines import Question, Sampling, Serving
from auditgap.engines.openai import OpenAIEngine, Patience, record_of
from auditgap.engines.openai.batches import check_none_waits
from auditgap.errors import UsageError

QUICK = Patience(tries=2, deadline=5.0, first_pause=0.01, longest_pause=0.02, polls=(0.01, 0.02))
HOW = Sampling(max_new_tokens=8)
QUESTIONS = [Question.of(f"What is {i}?") for i in range(12)]


@pytest.fixture
def server() -> Iterator[Server]:
    with running() as made:
        yield made


def ask(server: Server, journal: Path, questions: list[Question] = QUESTIONS) -> list[str]:
    serving = Serving(engine="openai", base_url=server.url, batched=True)
    with OpenAIEngine("smollm2", serving, patience=QUICK) as engine:
        engine.journal = journal
        return [reply.text for reply in engine.ask(questions, HOW)]


RIGHT = [f"about What is {i}?" for i in range(12)]


def test_all_but_the_first_go_in_one_file_and_come_back_in_order(server, tmp_path):
    server.takes = 3
    assert ask(server, tmp_path / "j.jsonl") == RIGHT
    assert server.alone == 1 and len(server.batches) == 1 and server.looks == 3
    assert set(server.asked.values()) == {1} and len(server.asked) == 12
    assert ask(server, tmp_path / "j.jsonl") == RIGHT and sum(server.asked.values()) == 12
    assert (record_of(tmp_path / "j.jsonl").stat().st_mode & 0o777) == 0o600


def test_a_process_that_ended_while_it_waited_finds_its_batch(server, tmp_path):
    server.ends, server.takes = "in_progress", 1
    serving = Serving(engine="openai", base_url=server.url, batched=True)
    engine = OpenAIEngine("smollm2", serving, patience=QUICK)
    engine.journal = tmp_path / "j.jsonl"
    asking = threading.Thread(target=engine.ask, args=(QUESTIONS, HOW), daemon=True)
    asking.start()
    while server.looks < 2:
        time.sleep(0.01)
    engine._loop.call_soon_threadsafe(engine._loop.stop)  # as a kill leaves it
    server.ends = "completed"
    # three more are wanted now: they alone are handed in
    more = [Question.of(f"What else is {i}?") for i in range(3)]
    assert ask(server, tmp_path / "j.jsonl", [*QUESTIONS, *more])[:12] == RIGHT
    assert set(server.asked.values()) == {1} and len(server.batches) == 2
    assert server.alone == 2, "one a sitting, to learn the options"


def test_a_batch_that_was_made_and_not_written_down_is_found(server, tmp_path):
    server.dies = ["/batches"]
    with pytest.raises(UsageError, match="What it has is found again"):
        ask(server, tmp_path / "j.jsonl")
    assert len(server.batches) == 1, "not made a second time"
    with pytest.raises(UsageError, match=r"^11 questions .* are paid for\. Add --judge-batch"):
        check_none_waits(tmp_path / "j.jsonl")
    assert ask(server, tmp_path / "j.jsonl") == RIGHT
    assert set(server.asked.values()) == {1} and len(server.batches) == 1
    check_none_waits(tmp_path / "j.jsonl")


def test_what_never_came_to_be_is_handed_in(server, tmp_path):
    server.dies = ["/files", "/files"]
    with pytest.raises(UsageError, match="did not take a batch"):
        ask(server, tmp_path / "j.jsonl")
    assert not server.batches
    assert ask(server, tmp_path / "j.jsonl") == RIGHT and set(server.asked.values()) == {1}


def test_questions_without_an_answer_are_asked_alone(server, tmp_path):
    server.silent = ("is 3?", "is 7?")
    assert ask(server, tmp_path / "j.jsonl") == RIGHT
    assert server.alone == 3 and server.asked["What is 3?"] == 2


def test_a_batch_out_of_time_keeps_what_it_answered_and_the_rest_goes_again(server, tmp_path):
    server.ends, server.silent = "expired", ("is 3?", "is 7?", "is 9?")
    with pytest.raises(UsageError, match=r"expired.*kept"):
        ask(server, tmp_path / "j.jsonl")
    server.ends, server.silent = "completed", ()
    assert ask(server, tmp_path / "j.jsonl") == RIGHT
    assert {w for w, n in server.asked.items() if n == 2} == {f"What is {i}?" for i in (3, 7, 9)}
    assert max(server.asked.values()) == 2 and server.alone == 2


def test_what_a_batch_answered_is_not_asked_one_by_one_nor_the_other_way_about(server, tmp_path):
    ask(server, tmp_path / "together.jsonl", QUESTIONS[:8])
    serving = Serving(engine="openai", base_url=server.url)
    with OpenAIEngine("smollm2", serving, patience=QUICK) as engine:
        engine.journal = tmp_path / "alone.jsonl"
        assert [reply.text for reply in engine.ask(QUESTIONS[4:], HOW)] == RIGHT[4:]
    assert ask(server, tmp_path / "together.jsonl") == RIGHT
    assert set(server.asked.values()) == {1} and len(server.asked) == 12


def test_a_server_without_batches_is_a_sentence(server, tmp_path, monkeypatch):
    monkeypatch.setattr(Handler, "do_POST", _without_batches(Handler.do_POST))
    with pytest.raises(UsageError, match=r"has no batches.*Leave --judge-batch out"):
        ask(server, tmp_path / "j.jsonl")
    check_none_waits(tmp_path / "j.jsonl")  # nothing was handed in


def _without_batches(do_post: Any) -> Any:
    def instead(self: Handler) -> None:
        if self.path.endswith("/files"):
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(404)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")
        else:
            do_post(self)

    return instead


def test_a_large_set_goes_in_several_files(server, tmp_path, monkeypatch):
    monkeypatch.setattr("auditgap.engines.openai.batches.MOST", 4)
    assert ask(server, tmp_path / "j.jsonl") == RIGHT
    assert len(server.batches) == 3 and set(server.asked.values()) == {1}
