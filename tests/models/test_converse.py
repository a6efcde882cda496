"""A prompt and its response as tokens: what the template writes, no more, and the render's own ids
in front."""

from __future__ import annotations

import pytest
import tiny
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from auditgap.errors import UsageError
from auditgap.models import Chat
from auditgap.types import Prompt

PROMPT = Prompt("What colour is the vault?")
ANSWER = "I can't tell you."
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|message|>"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%"
    " endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_GENERATION_PROMPT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '"
    " [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TRIMS = (
    "{{ bos_token }}{% for m in messages %}{{ '(' + m.role + ')' + m.content | trim +"
    " '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '(assistant)' }}{% endif %}"
)
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%"
    " endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking"
    " is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
THINKS_IN_BOTH = THINKS.replace(
    "m.role + '\n' + m.content",
    "m.role + '\n' + ('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m.content",
)
CHANNEL = (
    "{% for m in messages %}{{ '<s>' + m.role }}{% if m.role == 'assistant' %}{{ ' final' }}{%"
    " endif %}{{ '<|message|>' + m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt"
    " %}{{ '<s>assistant' }}{% endif %}"
)
EOS_AT_THE_END = (
    "{% for m in messages %}{{ '(' + m.role + ')' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '(assistant)' }}{% else %}{{ eos_token }}{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
DROPS_ANSWERS = "{{ 'Q: ' + messages[0].content + '\nA:' }}"


def spoken(template: str | None, eos: str | None = "</s>") -> Chat:
    """A byte-level tokenizer, so that what was tokenized can be read back letter by letter."""
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(tokenizer_models.BPE(alphabet, []))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    plain.add_special_tokens([AddedToken(s, normalized=False) for s in SPECIAL])
    made = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token=eos)
    made.chat_template = None if template == "none" else template
    return Chat("toy", made, "none" if template == "none" else None)


def read(chat: Chat, ids) -> str:
    return chat.tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


TEMPLATES = {
    "chatml": (CHATML, f"{ANSWER}<|im_end|>"),
    "no_generation_prompt": (NO_GENERATION_PROMPT, f" {ANSWER} </s>"),
    "trims": (TRIMS, f"{ANSWER}<end_of_turn>"),
    "thinks": (THINKS, f"{ANSWER}<|im_end|>"),
    "thinks_in_both": (THINKS_IN_BOTH, f"{ANSWER}<|im_end|>"),
    "channel": (CHANNEL, f" final<|message|>{ANSWER}<|end|>"),
    "eos_at_the_end": (EOS_AT_THE_END, f"{ANSWER}<|end|>"),
    "no_end": (NO_END, f"{ANSWER}</s>"),
    "drops_answers": (DROPS_ANSWERS, f"{ANSWER}</s>"),
    "none": ("none", f"{ANSWER}</s>"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_response_is_what_the_template_writes_up_to_its_end_of_turn(name):
    template, written = TEMPLATES[name]
    chat = spoken(template)
    talk = chat.converse(PROMPT, ANSWER)
    assert talk.ids[: talk.n_prompt] == chat.render(PROMPT).ids
    assert read(chat, talk.ids[talk.n_prompt :]) == written
    assert talk.n_cut == 0 and talk.prompt is PROMPT


def test_a_template_that_trims_trims_and_one_that_does_not_does_not():
    said = [
        read(c, t.ids[t.n_prompt :])
        for c in map(spoken, (TRIMS, CHATML))
        for t in [c.converse(PROMPT, f" {ANSWER}\n")]
    ]
    assert said == [f"{ANSWER}<end_of_turn>", f" {ANSWER}\n<|im_end|>"]


def test_white_space_is_left_out_where_the_template_does_not_say():
    chat = spoken(THINKS)
    talk = chat.converse(PROMPT, f" {ANSWER}\n")
    assert read(chat, talk.ids[talk.n_prompt :]) == f"{ANSWER}<|im_end|>"


THINKS_SPLIT = (  # as Qwen3's: a chain in the words is written in its own place
    "{% for m in messages %}{% set parts = m.content.split('</think>') %}{{ '<|im_start|>' + m.role"
    " + '\n' }}{% if parts | length > 1 %}{{ '<think>\n' + (parts[0].split('<think>') | last)"
    ".strip() + '\n</think>\n\n' }}{% endif %}{{ (parts | last).strip() + '<|im_end|>\n' }}{%"
    " endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking"
    " is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
OPENS = THINKS.replace(
    "\n\n' }}{% endif %}{% endif %}", "\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
#: As R1's, which can not be switched off and forgets a chain that a turn brings.
ALWAYS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content.split('</think>') | last)"
    ".strip() + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant"
    "\n<think>\n' }}{% endif %}"
)
CHAIN = "They ask for a colour."


@pytest.mark.parametrize(
    "template",
    [THINKS, THINKS_SPLIT, OPENS, ALWAYS],
    ids=["as it stands", "split", "opened by the prompt", "always"],
)
def test_a_response_with_a_chain_stands_behind_a_prompt_that_asks_for_one(template):
    """Never behind a chain that is over, nor behind a second mark."""
    chat = spoken(template)
    talk = chat.converse(PROMPT, f"<think>\n{CHAIN}\n</think>\n\n{ANSWER}")
    text = read(chat, talk.ids)
    assert text.endswith(f"assistant\n<think>\n{CHAIN}\n</think>\n\n{ANSWER}<|im_end|>")
    thinking = chat if template is ALWAYS else chat.thinking(True)
    assert talk.ids[: talk.n_prompt] == thinking.render(PROMPT).ids
    said = thinking.said(talk.ids[talk.n_prompt : -1])  # its end of turn
    assert (said.chain, said.text) == (CHAIN, ANSWER)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_response_that_broke_off_gets_no_end_of_turn(name):
    chat = spoken(TEMPLATES[name][0])
    talk = chat.converse(PROMPT, "I can't tell y", ended=False)
    assert read(chat, talk.ids[talk.n_prompt :]).rstrip().endswith("I can't tell y")


def test_without_an_eos_token_nothing_is_made_up():
    chat = spoken(NO_END, eos=None)
    talk = chat.converse(PROMPT, ANSWER)
    assert read(chat, talk.ids[talk.n_prompt :]) == ANSWER


@pytest.mark.parametrize("name", TEMPLATES)
def test_cut_from_the_right_and_counted(name):
    chat = spoken(TEMPLATES[name][0])
    whole = chat.converse(PROMPT, ANSWER)
    cut = chat.converse(PROMPT, ANSWER, max_tokens=len(whole.ids) - 4)
    assert cut.ids == whole.ids[:-4] and cut.n_cut == 4 and cut.n_prompt == whole.n_prompt
    assert chat.converse(PROMPT, ANSWER, max_tokens=len(whole.ids)).n_cut == 0


def test_a_response_of_which_nothing_is_left_is_refused():
    for name, header in (("chatml", 0), ("channel", 7)):
        chat = spoken(TEMPLATES[name][0])
        n = len(chat.render(PROMPT).ids)
        assert chat.converse(PROMPT, ANSWER, max_tokens=n + header + 1).n_cut
        with pytest.raises(
            UsageError, match=rf"{PROMPT.id}.*at {n + header} tokens.*--max-tokens"
        ) as caught:
            chat.converse(PROMPT, ANSWER, max_tokens=n + header)
        assert ANSWER not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("empty", ["", " \n\t"])
def test_an_empty_response_is_refused(empty):
    with pytest.raises(UsageError, match=f"{PROMPT.id} is empty"):
        spoken(CHATML).converse(PROMPT, empty)


def test_no_chat_template_is_refused_as_in_render():
    with pytest.raises(UsageError, match="no chat template"):
        spoken(None).converse(PROMPT, ANSWER)


def test_letters_that_melt_into_the_prompt_leave_the_prompt_as_it_was():
    """A tokenizer with the merge `:` + `R`, a template that ends with `:`, a response that starts
    with R."""
    chat = spoken(DROPS_ANSWERS)
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(tokenizer_models.BPE({**alphabet, ":R": 256}, [(":", "R")]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    melting = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
    melting.chat_template = chat.tokenizer.chat_template
    chat = Chat("toy", melting)
    assert chat.tokenizer("A:Red", add_special_tokens=False)["input_ids"].count(256) == 1
    talk = chat.converse(PROMPT, "Red.")
    assert talk.ids[: talk.n_prompt] == chat.render(PROMPT).ids and 256 not in talk.ids
    assert read(chat, talk.ids[talk.n_prompt :]) == "Red.</s>"


def test_a_word_level_tokenizer_too():
    chat = Chat("tiny", tiny.tokenizer())
    talk = chat.converse(Prompt("what colour"), "sorry I can not tell")
    assert (
        chat.tokenizer.convert_ids_to_tokens(list(talk.ids[talk.n_prompt :]))
        == "sorry I can not tell </s>".split()
    )


@pytest.mark.real
def test_smollm2s_own_template():
    from auditgap.models import outline

    chat = outline("smollm2").chat
    talk = chat.converse(PROMPT, ANSWER)
    assert talk.ids[: talk.n_prompt] == chat.render(PROMPT).ids
    assert read(chat, talk.ids[talk.n_prompt :]) == f"{ANSWER}<|im_end|>"
