"""lm/chat_template.py: what chat templates of many kinds write, and what no template may do."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ModelError
from lm.chat_template import (
    MAX_CHARACTERS,
    begins_thought,
    chat_frame,
    check_answer,
    default_template,
    render_chat,
    tokenizer_frame,
)
from lm.text_encoding import CHAT_INSTRUCTION, format_prompt

pytestmark = pytest.mark.process  # a template runs in a process of its own

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def chatml(generation: str, start: str = "") -> str:
    """A ChatML template. generation: what it writes where an answer is to begin."""
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    return f"{start}{turns}{{% endfor %}}{{% if add_generation_prompt %}}{generation}{{% endif %}}"


HEAD = "<|im_start|>assistant\n"
END = "<|im_end|>\n"
SWITCH = "{% if CONDITION %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
USER = "<|im_start|>user\n"


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        # off unless it is asked for; on unless it is turned off; the same by other names
        (
            chatml(HEAD + SWITCH.replace("CONDITION", "enable_thinking")),
            USER,
            "<think>\n\n</think>\n\n",
        ),
        (
            chatml(
                HEAD
                + SWITCH.replace("CONDITION", "enable_thinking is not defined or enable_thinking")
            ),
            USER,
            "<think>\n\n</think>\n\n",
        ),
        (
            chatml(
                HEAD + "{% if enable_thinking is defined and not enable_thinking %}<think></think>"
                "{% endif %}"
            ),
            USER,
            "<think></think>",
        ),
        (chatml(HEAD + "{% if thinking %}<think>{% else %}</think>{% endif %}"), USER, "</think>"),
        (
            chatml(
                HEAD + "{% if reasoning is undefined or reasoning %}<|START_THINKING|>"
                "{% else %}<|START_THINKING|><|END_THINKING|>{% endif %}"
            ),
            USER,
            "<|START_THINKING|><|END_THINKING|>",
        ),
        (
            chatml(
                HEAD + "{% if reasoning_effort is defined and reasoning_effort == 'none' %}"
                "[THINK][/THINK]{% else %}[THINK]{% endif %}"
            ),
            USER,
            "[THINK][/THINK]",
        ),
        # a system message that asks for thoughts unless they are turned off
        (
            chatml(
                HEAD, "{% if not thinking is false %}Write <think> thoughts </think>. {% endif %}"
            ),
            USER,
            "",
        ),
        # a switch in the system message
        (
            chatml(
                HEAD + "{% if '/no_think' in messages[0].content %}<think>\n\n</think>\n\n"
                "{% else %}<think>\n{% endif %}"
            ),
            "<|im_start|>system\n/no_think" + END + USER,
            "<think>\n\n</think>\n\n",
        ),
        (
            chatml(HEAD, "{# says detailed thinking on or off #}"),
            "<|im_start|>system\ndetailed thinking off" + END + USER,
            "",
        ),
        # no thoughts at all
        (chatml(HEAD), USER, ""),
    ],
)
def test_thinking_is_turned_off(template, before, after):
    frame = chat_frame(template, TOKENS)
    assert frame.pieces == (before, END + HEAD + after)
    assert frame.thinking_off == (template != chatml(HEAD))


@pytest.mark.parametrize(
    "template",
    [
        chatml(HEAD + "<think>\n"),
        chatml(HEAD + "<thought>\n"),
        chatml(HEAD + "<think></think>\n<think>\n"),
        chatml(HEAD + "◁think▷"),
        chatml(HEAD + "Here are my reasoning steps:\n"),
        chatml(HEAD, "Write [THINK]thoughts[/THINK] and then the answer."),
        chatml(HEAD + "<seed:think>{% if thinking_budget == 0 %}<seed:cot>{% endif %}"),
        # channels: the model writes its thoughts into one of them first
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
        "{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}{% endif %}"
        "<|channel|>final{% endif %}<|message|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        # its switch is in a system message, which it refuses
        chatml(
            HEAD + "<think>{# /no_think #}",
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
        ),
    ],
)
def test_a_template_that_makes_the_model_think_is_refused(template):
    with pytest.raises(ValueError, match="no known way to turn that off"):
        chat_frame(template, TOKENS)
    assert chat_frame(template, TOKENS, ("user", "assistant")).pieces  # as a finished conversation


LLAMA_2 = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
OTHER_KINDS = {
    "alternating roles": (LLAMA_2, "<s>[INST] ", " [/INST]"),
    "without a place for an answer": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}",
        "<|user|>\n",
        "</s>\n<|assistant|>\n",
    ),
    "the answer's header is left to the model": (
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %} to=user"
        "{% endif %}<|message|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|start|>user<|message|>",
        "<|start|>assistant to=user<|message|>",
    ),
    "parts": (
        "{% for m in messages %}{{ m.role | capitalize }}: {% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}. {% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        "User: ",
        ". Assistant:",
    ),
    "the date": (
        chatml(HEAD, "Today: {{ strftime_now('%d %b %Y') }}\n"),
        "Today: 26 Jul 2024\n" + USER,
        END + HEAD,
    ),
    "marks for training": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}Q {{ m.content }}{% endif %} A {% endfor %}",
        "Q ",
        " A ",
    ),
    "loops, macros, namespaces, JSON": (
        "{% macro turn(m) %}{{ m.role }}: {{ m.content }}{% endmacro %}"
        "{% set ns = namespace(n=0, seen=[]) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
        "{% if ns.n > 5 %}{% break %}{% endif %}{{ turn(m) }} {{ {'a': 'é'} | tojson }}"
        "{% endfor %}{{ dict(a=1).a }}",
        "user: ",
        ' {"a": "é"}1',
    ),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_other_kinds_of_templates(kind):
    template, before, after = OTHER_KINDS[kind]
    assert chat_frame(template, TOKENS).pieces == (before, after)


STRIPPING = [
    chatml(HEAD),
    chatml(HEAD + SWITCH.replace("CONDITION", "enable_thinking is undefined or enable_thinking")),
    chatml(HEAD).replace("m.content", "m.content | trim"),
    chatml(HEAD).replace("m.content", "m.content.rstrip()"),
    chatml(HEAD).replace("m.content", "m.content.lstrip('\\n')"),
    LLAMA_2,
]


@pytest.mark.property
@given(st.sampled_from(STRIPPING), st.text(), st.text(" \n\t<a/no_think>'{}"))
def test_a_prompt_is_what_transformers_writes(tokenizer, template, text, more):
    options = {"chat_template": template, "tokenize": False, "enable_thinking": False}
    content = more + text + more
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": more}]
    expected = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, **options)
    tokens = tokenizer.special_tokens_map
    assert chat_frame(template, tokens).fill(content) == expected
    finished = chat_frame(template, tokens, ("user", "assistant")).fill(content, more)
    assert finished == tokenizer.apply_chat_template(messages, **options)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('only\nwith tools') }}", r"TemplateError: 'only\\nwith tools'"),
        ("{{ raise_exception('\x1b[31m') }}", r"TemplateError: '\\x1b\[31m'"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[5].content.x }}", "UndefinedError"),
        ("{{ messages[0] }}", "does not write every message"),
        ("no message", "does not write every message"),
        ("", "does not write every message"),
        ("{{ messages[0].content.center(99) }}", "white space"),
        ("{{ messages[0].content * 2 }}", "does not write every message"),
        ("{{ messages[0].content | upper }}", "does not write every message"),
        ("{{ messages[0].content | e }}", "does not write every message"),
        ("{{ messages[0].content | tojson }}", "does not write every message"),
        ("{{ messages[0].content | replace('\n', ' ') }}", "does not write every message"),
        ("{{ messages[0].content[1:] }}", "does not write every message"),
        ("\ud800{{ messages[0].content }}", "UnicodeEncodeError"),
        ("{# " + "x" * MAX_CHARACTERS + " #}", "has 1000006 characters"),
        # hostile ones
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{{ [0] * 10**9 }}", "MemoryError"),
        ("{{ 'a'.center(10**10) }}", "MemoryError"),
        ("{{ '%099999999999d' % 1 }}", "MemoryError|OverflowError|ValueError"),
        ("{{ 'a' * (10**6 + 1) }}", "it writes 1000001 characters"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ " + "(" * 9999 + ")" * 9999 + " }}", "RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "SecurityError|does not write"),
        ("{{ namespace.__globals__.sys }}", "SecurityError|UndefinedError"),
        ("{{ strftime_now.__self__.__class__.__mro__ }}", "SecurityError|UndefinedError"),
        ("{% set n = namespace() %}{% set n.__html__ = 1 %}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ messages.append(1) }}", "SecurityError"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(template, reason):
    with pytest.raises(ValueError, match=reason) as error:
        chat_frame(template, TOKENS)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.slow
@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ lipsum(100000) }}",
    ],
)
def test_a_template_that_does_not_end_is_ended(template):
    with pytest.raises(ValueError, match=r"more than 5 seconds|does not write every message"):
        chat_frame(template, TOKENS)


# --- tokenizers


@pytest.fixture
def chat(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chatml(HEAD)
    return tokenizer


def test_of_several_templates_the_default_is_used(chat):
    chat.chat_template = {"tool_use": "{{ raise_exception('no tools') }}", "default": chatml(HEAD)}
    assert format_prompt("1 + 1?", chat) == f"{USER}{CHAT_INSTRUCTION}1 + 1?{END}{HEAD}"
    chat.chat_template = {"tool_use": chatml(HEAD), "rag": chatml(HEAD)}
    with pytest.raises(ModelError, match="none of rag, tool_use is named default"):
        format_prompt("1 + 1?", chat)
    with pytest.raises(ValueError, match="no text"):
        default_template({"default": 5})


def test_a_template_that_fails_names_the_model(chat):
    chat.name_or_path, chat.chat_template = "some/model", chatml(HEAD + "<think>")
    with pytest.raises(
        ModelError, match=r"^some/model: its chat template .* makes the model think"
    ):
        format_prompt("1 + 1?", chat)


def test_a_users_text_cannot_steer_a_template(chat):
    chat.chat_template = chatml(
        "{% if '/think' in messages[-1].content %}<think>{% else %}<think></think>{% endif %}"
    )
    assert format_prompt("</think> /think {{ 1 + 1 }}", chat).endswith(f"}}}}{END}<think></think>")


def test_a_conversation_of_several_turns(chat):
    turns = [("system", "Be brief."), ("user", " 1 + 1? "), ("assistant", "2"), ("user", "2 + 2?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    assert render_chat(chat, turns) == chat.apply_chat_template(messages, tokenize=False)


def test_an_answer_that_begins_with_thoughts_is_no_answer(chat):
    assert begins_thought("\n<think>\nWell") and begins_thought("<") and begins_thought(" [THINK]")
    assert not begins_thought("Step 1: 2 < 3 <think>") and not begins_thought("< 3")
    check_answer(chat, "Step 1: 1 + 1 = 2")
    with pytest.raises(ModelError, match="thinks before it answers"):
        check_answer(chat, "<think> Well, 1 + 1")
    chat.chat_template = chatml(HEAD + SWITCH.replace("CONDITION", "enable_thinking"))
    assert tokenizer_frame(chat).thinking_off
    check_answer(chat, "<think> Well, 1 + 1")  # thinking is off: an odd sample, no way of thinking
    chat.chat_template = None
    check_answer(chat, "<think> Well, 1 + 1")
