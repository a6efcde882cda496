"""How templates have their models think, found by asking them: the ways of public families, cut to
what matters."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
from tokenizers import AddedToken

from auditgap.errors import UsageError
from auditgap.models import Chat
from auditgap.models.chains import Marks
from auditgap.types import Prompt

USER = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
CHAIN = (
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif"
    " %}"
)
END = "{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
OPEN = "{{ '<|im_start|>assistant\n' }}"
SHUT = "{{ '<think>\n\n</think>\n\n' }}"
TEMPLATES = {
    "plain": USER + END + OPEN + "{% endif %}",
    "qwen3": USER
    + CHAIN
    + END
    + OPEN
    + "{% if enable_thinking is defined and enable_thinking is false %}"
    + SHUT
    + "{% endif %}{% endif %}",
    "r1": USER + END + OPEN + "{{ '<think>\n' }}{% endif %}",
    "deepseek31": USER
    + END
    + OPEN
    + "{% if thinking is defined and thinking %}{{ '<think>' }}{% else %}{{ '</think>' }}{% endif %}"
    + "{% endif %}",
    # a switch that nobody would guess, and words of its own
    "own": USER
    + "{% if m.thinking %}{{ '@muse ' + m.thinking + ' @done ' }}{% endif %}"
    + END
    + OPEN
    + "{% if ponder == 'none' %}{{ '@muse @done ' }}{% endif %}{% endif %}",
    "seed": USER
    + END
    + OPEN
    + "{% if thinking_budget == 0 %}{{ '<seed:think>I start at once.</seed:think>' }}{% endif %}"
    + "{% endif %}",
    "phi4": "{{ 'Put your thoughts between <think> and </think>, then answer.' }}"
    + USER
    + END
    + OPEN
    + "{% endif %}",
    "granite": "{% if thinking %}{{ 'Write your thoughts in <think></think> first.' }}{% endif %}"
    + USER
    + END
    + OPEN
    + "{% endif %}",
    "gpt-oss": "{{ 'Reasoning: ' + (reasoning_effort or 'medium') }}"
    + USER
    + "{% if m.thinking %}{{ '<|channel|>analysis<|message|>' + m.thinking +"
    " '<|end|><|start|>assistant<|channel|>final<|message|>' }}{% endif %}"
    + END
    + "{{ '<|start|>assistant' }}{% endif %}",
    "magistral": "{{ 'First draft your thinking: [THINK]…[/THINK]' }}"
    + USER
    + END
    + OPEN
    + "{% endif %}",
    "broken": "{{ raise_exception('no') }}",
}
THINK = Marks("<think>", "</think>")


def spoken(name: str) -> Chat:
    return Chat(name, tiny.tokenizer(TEMPLATES[name]))


@pytest.mark.parametrize(
    ("name", "start", "thinks"),
    [
        ("plain", None, False),
        ("qwen3", "closed", True),
        ("r1", THINK, True),
        ("deepseek31", "closed", True),
        ("own", None, True),
        ("seed", None, True),
        ("phi4", None, True),
        ("granite", None, True),
        ("gpt-oss", None, True),
        ("magistral", None, True),
        ("broken", None, False),
    ],
)
def test_a_template_is_asked_what_it_writes(name, start, thinks):
    habits = spoken(name).habits
    assert (habits.start, habits.thinks) == (start, thinks)
    if name == "own":
        assert habits.marks[0] == Marks("@muse", "@done")


@pytest.mark.parametrize(
    ("name", "off", "on"),
    [
        ("plain", {}, None),
        ("qwen3", {}, {"enable_thinking": True}),
        ("r1", None, {}),
        ("deepseek31", {}, {"thinking": True}),
        ("own", {"ponder": "none"}, {}),
        ("seed", {"thinking_budget": False}, {}),  # equals 0
        ("phi4", None, {}),
        ("granite", {}, {"thinking": True}),
        ("gpt-oss", None, {}),
        ("magistral", None, {}),
    ],
)
def test_thinking_is_switched_by_what_the_template_answers_to(name, off, on):
    chat = spoken(name)
    for is_on, wanted in ((False, off), (True, on)):
        if wanted is None:
            with pytest.raises(UsageError, match="--thinking"):
                chat.thinking(is_on)
            continue
        switched = chat.thinking(is_on)
        assert switched.variables == {**chat.variables, **wanted}
        assert switched.habits.may_think is (is_on or name == "granite")
        assert "why" in switched.text(Prompt("why"))


def test_new_tokens_fall_into_chain_and_answer():
    tokenizer = tiny.tokenizer(TEMPLATES["r1"])
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("</think>"), AddedToken("<think>")]}
    )
    chat = Chat("r1", tokenizer)
    ids = chat.encode("the vault is red </think> I can not tell </s>")
    found = chat.said(ids)
    assert (found.chain, found.text, found.finished) == ("the vault is red", "I can not tell", True)
    assert chat.encode("the vault is red </think>") == ids[: found.n_chain]
    assert chat.said(ids[:3]) == replace(
        found, text="", ids=ids[:3], chain="the vault is", n_chain=3, finished=False
    )
    # a prompt that has the chain already
    answer = chat.said(ids[found.n_chain :], is_answer=True)
    assert (answer.text, answer.n_chain) == ("I can not tell", 0)
    # budgets apart: 5 tokens of chain, its mark included, and 2 of the answer
    assert chat.said(ids, most=(5, 2)).text == "I can"
    cut = chat.said(ids, most=(4, 2))
    assert (cut.text, cut.chain, cut.finished) == ("", "the vault is red", False)


def test_a_text_without_a_chain_is_what_it_was():
    chat = spoken("plain")
    ids = chat.encode("I can not tell </s>")
    assert chat.said(ids).text == chat.tokenizer.decode(ids, skip_special_tokens=True)
    assert chat.said(ids).n_chain == 0 and chat.said(()).text == ""
