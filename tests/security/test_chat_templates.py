"""A chat template is run within bounds: it cannot loop for ever, fill the memory, reach out, or see
a secret; and it is fast."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny

from auditgap import models
from auditgap.errors import Refused, UsageError
from auditgap.models import Chat, template
from auditgap.models.turns import fill_turns
from auditgap.types import Message, Prompt

TURNS = [{"role": "user", "content": "What colour is the vault?"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def fill(text: str) -> str:
    return template.fill(text, {"messages": TURNS}, "toy")


REFUSED = {
    "100 MB in a loop": (
        "{% for i in range(99999) %}{{ 'a' * 1024 }}{% endfor %}",
        "writes more than",
    ),
    "two gigabytes at once": ("{{ 'a' * (2 * 10**9) }}", "needs more than"),
    "more than there is": ("{{ 'a' * 10**13 }}", "needs more than"),
    "doubled and doubled": (
        (
            "{% set n = namespace(x='ab') %}{% for i in range(64) %}{% set n.x = n.x ~ n.x %}{%"
            " endfor %}"
        ),
        "needs more than",
    ),
    "padded by a format": ("{{ '%99999999999d' % 1 }}", None),
    "classes": ("{{ ().__class__.__base__.__subclasses__() }}", "sandbox"),
    "globals": ("{{ joiner.__init__.__globals__ }}", "sandbox"),
    "by str.format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "sandbox"),
    "by a filter": ("{{ (messages | map(attribute='__class__') | first).mro() }}", None),
    "changing what it was given": ("{{ messages.append(1) }}", "sandbox"),
    "a million characters of template": (
        "{# " + "a" * 1_000_000 + " #}",
        "has 1,000,006 characters",
    ),
}


class TestBounds:
    @pytest.fixture(autouse=True)
    def soon(self):
        started = time.monotonic()
        yield
        assert time.monotonic() - started < 60

    @pytest.mark.parametrize("case", REFUSED)
    def test_it_is_stopped_with_a_sentence(self, case):
        text, said = REFUSED[case]
        with pytest.raises(
            (Refused, UsageError) if said is None else Refused, match=said
        ) as caught:
            fill(text)
        sentence = str(caught.value)
        assert (
            "chat template of toy" in sentence
            and "--chat-template FILE" in sentence
            and "\n" not in sentence
        )
        assert len(sentence) < 400 and (said is None or caught.value.exit_code == 4)
        assert fill("{{ messages[0]['content'] }}") == TURNS[0]["content"], (
            "and the next one is served"
        )

    def test_an_endless_loop_is_ended_by_the_kernel_and_leaves_nothing_running(self):
        child = template._Child()
        with pytest.raises(Refused, match="more than 3 seconds"):
            _ask(child, ENDLESS)
        assert child._process is None

    def test_one_step_that_never_ends_is_ended_too(self):
        """No bytecode passes here that could look at a clock."""
        child = template._Child()
        with pytest.raises(Refused, match=r"more than 3 seconds|needs more than"):
            _ask(child, "{{ 7 ** (10 ** 9) }}")

    def test_a_macro_that_calls_itself(self):
        with pytest.raises(UsageError, match="RecursionError"):
            fill("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")

    def test_a_long_prompt_is_no_hostile_template(self):
        words = "colour " * 500_000
        assert (
            template.fill(
                "<{{ messages[0].content }}>", {"messages": [{"role": "user", "content": words}]}
            )
            == f"<{words}>"
        )

    def test_a_hostile_folder_is_refused_when_it_is_spoken_to(self, tmp_path):
        folder = tiny.save(
            "llama", tmp_path / "model", chat_template=REFUSED["more than there is"][0]
        )
        outline = models.outline(str(folder))
        for speak in (
            lambda: outline.chat.render(Prompt("the door")),
            lambda: outline.chat.write([Message("user", "the door")]),
            lambda: outline.chat.converse(Prompt("the door"), "is shut"),
        ):
            with pytest.raises(Refused, match="needs more than"):
                speak()


def _ask(child: template._Child, text: str) -> None:
    """`fill` with a child of its own, so that its death is this test's."""
    kept, template._CHILD = template._CHILD, child
    try:
        fill(text)
    finally:
        template._CHILD = kept


class TestTheChild:
    def test_it_sees_no_secret_and_ends_with_its_parent(self, tmp_path):
        """Killed in the middle of an endless loop, the parent leaves a child that the kernel ends
        within its seconds."""
        code = (
            "import sys\nfrom auditgap.models import template\n"
            "template.fill('{{ 1 }}', {}); print(template._CHILD._process.pid, flush=True)\n"
            "template.fill(sys.argv[1], {})"
        )
        environment = {**os.environ, "HF_TOKEN": "hf_canarycanarycanary"}
        parent = subprocess.Popen(
            [sys.executable, "-c", code, ENDLESS],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        pid = int(parent.stdout.readline())
        assert b"canary" not in Path(f"/proc/{pid}/environ").read_bytes()
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
        parent.stdout.close()
        deadline = time.monotonic() + 60
        while (
            Path(f"/proc/{pid}").exists()
            and "zombie" not in Path(f"/proc/{pid}/status").read_text()
        ):
            assert time.monotonic() < deadline, "the child outlived its parent"
            time.sleep(0.2)

    def test_one_that_was_killed_is_started_anew(self):
        fill("{{ 1 }}")
        os.kill(template._CHILD._process.pid, signal.SIGKILL)
        assert fill("{{ 2 }}") == "2"

    def test_threads_get_their_own_answers(self):
        wrong: list[str] = []

        def ask(n: int) -> None:
            for i in range(100):
                if (got := template.fill(f"{{{{ x }}}} of {n}", {"x": i})) != f"{i} of {n}":
                    wrong.append(got)

        threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_a_fork_has_one_of_its_own(self):
        fill("{{ 1 }}")
        here, (reading, writing) = template._CHILD._process.pid, os.pipe()
        pid = os.fork()
        if pid == 0:
            said = f"{fill('{{ 3 }}')} {template._CHILD._process.pid != here}"
            os.write(writing, said.encode())
            template._CHILD.close()
            os._exit(0)
        os.waitpid(pid, 0)
        assert os.read(reading, 100) == b"3 True"
        assert fill("{{ 4 }}") == "4" and template._CHILD._process.pid == here

    def test_it_is_asked_over_a_pipe_and_not_started_each_time(self):
        fill("{{ 1 }}")
        pid = template._CHILD._process.pid
        for i in range(200):
            fill("{{ " + str(i % 3) + " }}")
        assert template._CHILD._process.pid == pid


# -- the same words as transformers'
# ---------------------------------------------------------------------------------------

REAL = {
    "tiny": tiny.TEMPLATE,
    "white space": (
        "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n{%"
        " endfor %}\nend\n"
    ),
    "stripped": (
        "{%- for m in messages -%}\n {{- m.role | upper + ': ' + m.content | trim -}} \n{%-"
        " endfor %}"
    ),
    "for training": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    ),
    "json": (
        "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ {'b': '<é>', 'a': 1} |"
        " tojson(sort_keys=true) }}"
    ),
    "breaks": (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{%"
        " endfor %}"
    ),
    "backwards": (
        "{% for m in messages[::-1] %}{{ loop.index0 }}{{ m['content'].split('?')[0] }}{% endfor %}"
    ),
    "names": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor"
        " %}{{ ns.n }}"
    ),
    "macro": (
        "{% macro turn(m, end='!') %}<{{ m.role }}>{{ m.content }}{{ end }}{% endmacro %}{{"
        " turn(messages[0]) }}"
    ),
    "special tokens": (
        "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ nothing_such }}"
    ),
    "flags": (
        "{{ add_generation_prompt }} {{ enable_thinking }} {{ tools is none }} {{ documents is none"
        " }} {{ tools is defined }}"
    ),
    "the date": "{{ strftime_now('%d %b %Y') }}",
    "tests and filters": (
        "{{ messages is iterable }}{{ messages | length }}{{ messages[0].content is string }}{{ 'é'"
        " | upper }}"
    ),
    "letters": "{{ messages[0].content }}\u2028\ud800\x00鍵🚪",
}
CONVERSATIONS = [
    TURNS,
    [
        {"role": "system", "content": "Be brief."},
        *TURNS,
        {"role": "assistant", "content": " I can't <tell>. \n"},
    ],
    [{"role": "user", "content": 'e\u0301 \u202e 🚪\r\n\x00 {{ 7*7 }} {% raw %} "quoted"'}],
]


@pytest.mark.parametrize("opening", [True, False])
@pytest.mark.parametrize("case", REAL)
def test_it_writes_what_transformers_writes(case, opening):
    tokenizer = tiny.tokenizer(REAL[case])
    for turns in CONVERSATIONS:
        wanted = tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=opening,
            enable_thinking=False,
            strftime_now=template.TEMPLATE_DATE.strftime,
        )
        assert fill_turns(tokenizer, turns, "toy", opening=opening, enable_thinking=False) == wanted
    assert wanted


def test_what_transformers_refuses_is_refused():
    for own in (
        "{% for %}",
        "{{ raise_exception('no') }}",
        "{{ 1 + 'a' }}",
        "{{ nothing.such }}",
        "{{ 1 / 0 }}",
    ):
        with pytest.raises(UsageError, match="cannot be run"):
            fill_turns(tiny.tokenizer(own), TURNS, "toy")
    with pytest.raises(UsageError, match="at least one message"):
        fill_turns(tiny.tokenizer(), [], "toy")
    several = tiny.tokenizer()
    several.chat_template = {"rag": "a", "tool_use": "b"}
    with pytest.raises(UsageError, match="cannot be told"):
        fill_turns(several, TURNS, "toy")


def test_nothing_in_the_package_renders_a_template_otherwise():
    package = Path(models.__file__).parents[1]
    call = re.compile(r"(?<!`tokenizer)\.apply_chat_template\(")
    calls = [p.name for p in package.rglob("*.py") if call.search(p.read_text(encoding="utf-8"))]
    assert calls == []


def test_none_runs_no_template():
    assert Chat("toy", tiny.tokenizer("{{ 'a' * 10**9 }}"), "none").render(Prompt("the door")).ids
