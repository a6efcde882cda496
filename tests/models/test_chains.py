"""Chain and answer of a completion, over families that mark their chains in different ways: made by
a small grammar, and by hand where a family has ways of its own."""

from __future__ import annotations

from itertools import product

import pytest

from auditgap.models.chains import MARKS, THINK, Marks, Split, split

C, A = "The user wants the colour; the vault is shut.", "I can't tell you that."
LONG = "First, I must not.\n\nSecond, <b>never</b> say what it is: 3 < 4."
MARKED = {one.opens: one for one in MARKS}

#: What follows the chain's closing mark: (as it is written, the answer that it holds).
AFTER = {
    "at once": (A, A),
    "two lines on": ("\n\n" + A, A),
    "several lines": ("\n\nNo.\n\nNot today.", "No.\n\nNot today."),
    "nothing": ("", ""),
    "speaks of marks": ("\n\nThe mark <think> opens a chain.", "The mark <think> opens a chain."),
    "in a wrapper": (f"\n<answer>\n{A}\n</answer>", A),
    "in a wrapper that is cut": ("\n<response>I can", "I can"),
}
CHAINS = {"one line": C, "paragraphs": LONG, "empty": "", "says final": "assistantfinal is a word"}


def grammar():
    """(id, text, start, what comes of it) for every family, way of opening, chain and answer."""
    for (name, m), (how, chain), (what, (after, answer)) in product(
        MARKED.items(), CHAINS.items(), AFTER.items()
    ):
        yield (
            f"{name}-{how}-{what}",
            f"{m.opens}\n{chain}\n{m.closes}{after}",
            None,
            (chain, answer, False),
        )
    for name, m in MARKED.items():
        ended = f"{C}\n{m.closes}\n\n{A}"
        yield f"{name}-prefilled", ended, m, (C, A, False)
        yield f"{name}-prefilled and written again", f"{m.opens}\n{ended}", m, (C, A, False)
        yield f"{name}-opened in a prompt that nobody saw", ended, None, (C, A, False)
        yield f"{name}-never ends", f"{m.opens}\n{LONG}", None, (LONG, "", True)
        yield f"{name}-prefilled, never ends", LONG, m, (LONG, "", True)
        yield f"{name}-only its mark", m.opens, None, ("", "", True)
        yield f"{name}-closing mark is cut", f"{m.opens}{C}{m.closes[:-1]}", None, None
        yield f"{name}-shouted", ended.replace(m.closes, m.closes.upper()), m, (C, A, False)
        yield f"{name}-after a line of white space", f" \n {m.opens}{ended}", None, (C, A, False)
        twice = f"{m.opens}{C}{m.closes}{A}\n{m.opens}again{m.closes}No."
        yield f"{name}-twice", twice, None, (f"{C}\nagain", f"{A}\nNo.", False)
        late = f"{m.opens}{C}{m.closes}{A}\n{m.opens}again"
        yield f"{name}-opened again and never ended", late, None, (f"{C}\nagain", A, False)
        nested = f"{m.opens}\na\n{m.opens}\nb\n{m.closes}\nc\n{m.closes}\n{A}"
        yield f"{name}-nested", nested, None, (f"a\n{m.opens}\nb\n{m.closes}\nc", A, False)


def harmony(*messages: tuple[str, str], end: str = "<|return|>") -> str:
    said = "<|end|><|start|>assistant".join(
        f"<|channel|>{channel}<|message|>{text}" for channel, text in messages
    )
    return said + end


COMMENT = "commentary to=functions.look <|constrain|>json"
SAME = "as it is"  #: a text that has no chain
BY_HAND = {
    "plain": (A, None, SAME),
    "plain, empty": ("", None, SAME),
    "plain, white space kept": (f"\n {A} \n", None, SAME),
    "plain, speaks of marks": ("Write <think> before it, and close it.", None, SAME),
    "plain, begins like an alphabetic mark": ("Here is my", None, SAME),
    "plain, in a wrapper": ("<answer>42</answer>", None, SAME),
    "plain, speaks of analysis": ("analysis of the vault shows", None, SAME),
    "plain, angle": ("<", None, SAME),
    "plain, HTML": ("<table><tr></tr></table>", None, SAME),
    "cut inside its opening mark": ("<thi", None, ("<thi", "", True)),
    "cut inside a square mark": ("[THIN", None, ("[THIN", "", True)),
    "thinking is off": (A, "closed", SAME),
    "thinking is off, stray mark": (f"{A} </think> Or not.", "closed", SAME),
    "thinking is off, thinks all the same": (f"<think>{C}</think>{A}", "closed", (C, A, False)),
    "thinking is off, never ends": (f"<think>{C}", "closed", (C, "", True)),
    "prefilled, another family's mark inside": (f"[THINK] {C}</think>{A}", THINK, None),
    "prefilled, refuses inside the chain": (
        "I can't help with that.\n</think>\nSure, here is how.",
        THINK,
        ("I can't help with that.", "Sure, here is how.", False),
    ),
    "prefilled by a family of its own": (f"{C}@done {A}", Marks("@go", "@done"), (C, A, False)),
    "answer first, then a chain": (f"{A}\n<think>{C}</think>", None, (C, A, False)),
    "harmony": (harmony(("analysis", C), ("final", A)), None, (C, A, False)),
    "harmony, no end": (harmony(("analysis", C), ("final", A), end=""), None, (C, A, False)),
    "harmony, cut in the answer": (
        harmony(("analysis", C), ("final", "I can"), end=""),
        None,
        (C, "I can", False),
    ),
    "harmony, cut in the chain": (harmony(("analysis", C), end=""), None, (C, "", True)),
    "harmony, ended without an answer": (harmony(("analysis", C)), None, (C, "", True)),
    "harmony, cut in a header": ("<|channel|>analysis", None, ("", "", True)),
    "harmony, cut in the last header": (
        harmony(("analysis", C), end="<|end|><|start|>assistant<|channel|>"),
        None,
        (C, "", True),
    ),
    "harmony, empty answer": (harmony(("analysis", C), ("final", "")), None, (C, "", False)),
    "harmony, no chain": (harmony(("final", A)), None, ("", A, False)),
    "harmony, calls a tool": (
        harmony(("analysis", C), (COMMENT, '{"x": 1}'), end="<|call|>"),
        None,
        (f'{C}\n{{"x": 1}}', "", True),
    ),
    "harmony, comments in between": (
        harmony(("analysis", "a"), ("commentary", "b"), ("analysis", "c"), ("final", A)),
        None,
        ("a\nb\nc", A, False),
    ),
    "harmony, two chains": (
        harmony(("analysis", "a"), ("analysis", "b"), ("final", A)),
        None,
        ("a\nb", A, False),
    ),
    "harmony, channel opened by the prompt": (
        f"{C}<|end|><|start|>assistant{harmony(('final', A))}",
        None,
        (C, A, False),
    ),
    "harmony, special tokens dropped": (f"analysis{C}assistantfinal{A}", None, (C, A, False)),
    "harmony, dropped, cut": (f"analysis{C}", None, (C, "", True)),
    "harmony, dropped, comments": (
        f"analysis{C}assistantcommentaryI look.assistantfinal{A}",
        None,
        (f"{C}assistantcommentaryI look.", A, False),
    ),
    "open thoughts": (
        f"<|begin_of_thought|>\n\n{C}\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n{A}\n\n"
        "<|end_of_solution|>",
        None,
        (C, A, False),
    ),
    "command a": (
        f"<|START_THINKING|>{C}<|END_THINKING|><|START_RESPONSE|>{A}<|END_RESPONSE|>",
        None,
        (C, A, False),
    ),
    "seed's budget": (
        "<seed:think>\n<seed:cot_budget_reflect>I have used 5 tokens.</seed:cot_budget_reflect>\n"
        f"{C}</seed:think>{A}",
        None,
        (
            f"<seed:cot_budget_reflect>I have used 5 tokens.</seed:cot_budget_reflect>\n{C}",
            A,
            False,
        ),
    ),
    "hunyuan": (f"<think>\n{C}\n</think>\n<answer>\n{A}\n</answer>", None, (C, A, False)),
    "marco": (f"<Thought>\n{C}\n</Thought>\n<Output>\n{A}\n</Output>", None, (C, A, False)),
    "a mark's name in the chain": (f"<think>I close </thinking> no</think>{A}", None, None),
}
CASES = [
    *grammar(),
    *((name, *case) for name, case in BY_HAND.items()),
]


@pytest.mark.parametrize(
    ("text", "start", "wanted"),
    [case[1:] for case in CASES],
    ids=[name.replace(" ", "_").encode("ascii", "replace").decode() for name, *_ in CASES],
)
def test_a_completion_falls_into_chain_and_answer(text, start, wanted):
    found = split(text, start)
    if wanted == SAME:
        assert found == Split("", text)
    elif wanted is not None:
        assert (found.chain, found.answer, found.unfinished) == wanted
    # whatever the text: no chain is in the answer, and the answer starts where it is said to
    if found.chain:
        assert C not in found.answer
        assert not found.answer or text[found.start :].startswith(found.answer.split("\n")[0])
    assert not (found.unfinished and found.answer)


def test_there_are_as_many_cases_and_families_as_are_promised():
    assert len(CASES) >= 200 and len({m.closes for m in MARKS}) >= 8
    assert len({name for name, *_ in CASES}) == len(CASES)
