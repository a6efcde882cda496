"""What is sent is what was meant: a chat template writes the user's words, all of them, and a
judge's writes the exchange."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

import auditgap
from auditgap import models
from auditgap.errors import UsageError
from auditgap.judges import load_judge
from auditgap.models import Chat
from auditgap.models.turns import fill_turns
from auditgap.types import Exchange, Message, Prompt

HEAD = "{% for m in messages %}{{ '<s> ' + m['role'] + ' : ' }}"
TAIL = "{{ ' \n ' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
#: Templates that write content parts, and over a string nothing.
PARTS = {
    "loop": (
        HEAD + "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
        "{% endfor %}" + TAIL
    ),
    "select": (
        HEAD + "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}"
        "{% endfor %}" + TAIL
    ),
    "first part": HEAD + "{{ m['content'][0]['text'] }}" + TAIL,
}
#: Templates that leave words out whatever they come as.
DROPS = {
    "other keys": (
        "{% for m in messages %}{% if m['from'] == 'human' %}{{ '<s> user : ' + m['value'] }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    ),
    "cut": HEAD + "{{ m['content'][:10] }}" + TAIL,
    "replaced": HEAD + "{{ m['content'].replace('vault', 'door') }}" + TAIL,
}
ASKED = "what colour is the vault ?"


def chat(template: str) -> Chat:
    return Chat("tiny", tiny.tokenizer(template))


@pytest.mark.parametrize("template", PARTS)
def test_a_template_of_parts_gets_parts(template):
    """The same text, and the same words marked as the user's, as a template of strings writes."""
    made, plain = chat(PARTS[template]), chat(tiny.TEMPLATE)
    got, wanted = made.render(Prompt(ASKED)), plain.render(Prompt(ASKED))
    assert (got.ids, got.content) == (wanted.ids, wanted.content)
    assert made.converse(Prompt(ASKED), "red").ids == plain.converse(Prompt(ASKED), "red").ids
    said = (Message("system", "never tell"), Message("user", ASKED), Message("assistant", "red"))
    assert made.write(said) == plain.write(said)


@pytest.mark.parametrize("template", DROPS)
def test_words_that_a_template_leaves_out_are_a_sentence(template):
    made = chat(DROPS[template])
    for ask in (
        lambda: made.render(Prompt(ASKED)),
        lambda: made.write([Message("user", ASKED)]),
        lambda: made.prove([Prompt("tell"), Prompt(ASKED)]),
    ):
        with pytest.raises(UsageError, match=r"tiny does not write all the words of the user") as e:
            ask()
        assert "--chat-template" in str(e.value) and ASKED not in str(e.value)


def test_case_and_white_space_may_change():
    made = chat(HEAD + "{{ m['content'].upper().strip() | replace('  ', ' ') }}" + TAIL)
    assert "WHAT COLOUR" in made.text(Prompt("  what  colour \n"))


def test_a_system_message_that_is_dropped_is_a_sentence():
    made = chat("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(UsageError, match="words of the system"):
        made.write([Message("system", "never tell"), Message("user", ASKED)])


def test_a_template_is_asked_once(monkeypatch):
    from auditgap.models import turns as home

    asked: list[str] = []
    fill = home.fill
    monkeypatch.setattr(home, "fill", lambda t, v, n: asked.append(n) or fill(t, v, n))
    tokenizer = tiny.tokenizer(PARTS["loop"] + " ")
    asked_of = [{"role": "user", "content": ASKED}]
    texts = {fill_turns(tokenizer, asked_of, "once") for _ in range(3)}
    assert len(texts) == 1 and ASKED in texts.pop()
    assert len(asked) == 2 + 3  # as a string, as parts; then the three


@pytest.mark.parametrize("template", ["other keys", "cut"])
def test_an_audit_ends_before_it_begins(tmp_path, template):
    folder = tiny.save("llama", tmp_path / "m", chat_template=DROPS[template])
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": ASKED, "target": "Sure here"}) + "\n")
    with pytest.raises(UsageError, match="words of the user"):
        auditgap.lvs(
            str(folder), prompts=str(tmp_path / "p.jsonl"), layers="mid", out=tmp_path / "o"
        )
    assert not list((tmp_path / "o").glob("cells/*"))


@pytest.fixture(scope="module")
def of_parts(tmp_path_factory) -> Path:
    return tiny.save(
        "llama",
        tmp_path_factory.mktemp("parts") / "m",
        chat_template=PARTS["loop"],
        max_position_embeddings=1024,
    )


def test_a_judge_of_parts_reads_the_exchange(of_parts):
    with load_judge(f"guard={of_parts}", device="cpu") as judge:
        judge.describe()
        asked, _ = judge.write(Exchange(Prompt(ASKED), "the colour of red now"))
        read = models.outline(str(of_parts)).chat.write(asked.messages)
    words = " ".join(tiny.tokenizer().convert_ids_to_tokens(read))
    assert "colour of red" in words


@pytest.mark.parametrize("template", ["other keys", "cut"])
def test_a_judge_that_would_not_read_the_exchange_is_refused_at_the_start(tmp_path, template):
    folder = tiny.save("llama", tmp_path / "m", chat_template=DROPS[template])
    with pytest.raises(UsageError, match="words of the user"):
        load_judge(f"guard={folder}", device="cpu").describe()


@pytest.mark.parametrize("template", ["other keys", "cut"])
def test_a_classifier_that_would_not_read_the_exchange_is_refused_at_the_start(tmp_path, template):
    from transformers import AutoModelForSequenceClassification

    folder = tiny.save("llama", tmp_path / "m", chat_template=DROPS[template])
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.save_pretrained(folder)
    with pytest.raises(UsageError, match="words of the user"):
        load_judge(f"hf:{folder}", device="cpu").describe()
