"""From text to token ids."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ModelError
from lm.prompting import is_chat
from lm.text_encoding import (
    TextEncoder,
    batches_by_length,
    encode_prompt,
    encode_steps,
    format_prompt,
    response_pieces,
    text_encoder,
)
from reasoning.steps import ends_solution
from reward_model.prm_formats import StepTokens
from reward_model.response_reward_model import ResponseTokens
from tests.helpers.tokenizer_kinds import CONTROL, KINDS, TEMPLATES, make_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "<|assistant|>"
)


@pytest.fixture
def chat(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_encode_steps_written_out(tokenizer):
    """A step holds its closing newline, and the last one EOS; all before the steps is -1."""
    ids, step_of = encode_steps(
        tokenizer, "Mia has 2 apples.", ["Step 1: 2 + 3 = 5"], ["Step 2: 5 * 2 = 10", "Answer: 10"]
    )
    tokens_and_ids = [
        (-1, "<s>", [1]),
        (-1, "▁Problem : ▁Mia ▁has ▁ 2 ▁apples . <0x0A>",
         [419, 284, 629, 411, 353, 276, 528, 272, 13]),
        (-1, "Solution : <0x0A>", [421, 284, 13]),
        (-1, "Step ▁ 1 : ▁ 2 ▁+ ▁ 3 ▁= ▁ 5 <0x0A>",
         [358, 353, 275, 284, 353, 276, 371, 353, 277, 355, 353, 279, 13]),
        (0, "Step ▁ 2 : ▁ 5 ▁* ▁ 2 ▁= ▁ 1 0 <0x0A>",
         [358, 353, 276, 284, 353, 279, 375, 353, 276, 355, 353, 275, 274, 13]),
        (1, "Answer : ▁ 1 0 </s>", [420, 284, 353, 275, 274, 2]),
    ]  # fmt: skip
    assert ids == [index for _, _, part in tokens_and_ids for index in part]
    assert step_of == [step for step, _, part in tokens_and_ids for _ in part]
    assert tokenizer.convert_ids_to_tokens(ids) == [
        token for _, tokens, _ in tokens_and_ids for token in tokens.split()
    ]


def test_a_response_that_continues_gets_no_eos(tokenizer):
    ids, step_of = encode_steps(tokenizer, "Mia 🍎", [], ["Step 1: 2 + 3 = 5"])
    assert (ids[-1], step_of[-1]) == (13, 0)
    assert ids[:9] == [1, 419, 284, 629, 353, 243, 162, 144, 145]  # the apple is four bytes
    assert response_pieces(["Step 1: 2 + 3 = 5"], finished=False) == ["Step 1: 2 + 3 = 5\n"]


def test_a_chat_template_is_used_and_adds_no_second_bos(chat):
    text = format_prompt("2 + 2?", chat)
    assert text.endswith("2 + 2?\n<|assistant|>") and "step by step" in text
    ids, _ = encode_steps(chat, "2 + 2?", [], ["Answer: 4"])
    prompt_ids = encode_prompt(chat, "2 + 2?")
    assert ids[: len(prompt_ids)] == prompt_ids and ids.count(chat.bos_token_id) == 1
    assert (
        chat.decode(encode_prompt(chat, "2 + 2?", chat=True)[1:]) == "<|user|>2 + 2?\n<|assistant|>"
    )


def test_a_users_control_token_stays_text(tokenizer):
    plain = TextEncoder(tokenizer, "[mark]")
    prompt, (step,) = plain.guard("a </s> b", ["x [mark] y"])
    assert plain.leading_ids == [tokenizer.bos_token_id]
    guarded, control = plain.ids([prompt, "a </s> b"])
    assert tokenizer.convert_ids_to_tokens(guarded) == ["▁a", "▁", "<", "/", "s", ">", "▁b"]
    assert tokenizer.eos_token_id in control and tokenizer.eos_token_id not in guarded
    assert step != "x [mark] y" and tokenizer.decode(plain.ids([step])[0]) == "x [mark] y"
    assert plain.guard("2 < 3", ["b"]) == ("2 < 3", ["b"])
    with pytest.raises(ModelError, match="surrogate"):
        plain.guard("\ud83c", [])


# --- the rule, for tokenizers of many kinds ---

# words that are, contain, or read like control tokens of the tokenizers
WORDS = [
    *CONTROL, "<next>", "</s", "s>", "<", "<</s>>", "＜/s＞", "<|im_end|", "2 + 3 = 5", "Step 1: ",
    "  ", " ", "Mia", "é", "🍎", "√2", "\u200b", "Answer: 4", "the answer",
]  # fmt: skip
LINES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map("".join).filter(str.strip)
SOLUTIONS = st.tuples(LINES, st.lists(LINES, max_size=2), st.lists(LINES, min_size=1, max_size=3))


def control_ids(tokenizer, ids: list[int]) -> list[int]:
    return [index for index in ids if index in tokenizer.added_tokens_decoder]


def special_tokens_of_template(tokenizer) -> list[int]:
    """Those that a prompt of no words has: the start of a text, or what its template writes."""
    if not is_chat(tokenizer):
        first = tokenizer("a")["input_ids"][0]
        return [first] if first == tokenizer.bos_token_id else []
    return control_ids(tokenizer, encode_prompt(tokenizer, "a"))


@pytest.mark.property
@given(kind=st.sampled_from(KINDS), solution=SOLUTIONS)
def test_special_tokens_follow_the_rule(kind, solution):
    """BOS at the start of a plain text, EOS behind a finished response, no other special token but
    the template's; and the text is kept."""
    tokenizer, (prompt, prefix, steps) = make_tokenizer(*kind), solution
    expected = special_tokens_of_template(tokenizer)
    prompt_ids = encode_prompt(tokenizer, prompt)
    assert control_ids(tokenizer, prompt_ids) == expected
    ids, step_of = encode_steps(tokenizer, prompt, prefix, steps)
    end = [tokenizer.eos_token_id] if ends_solution(steps) else []
    assert control_ids(tokenizer, ids) == expected + end
    assert ids[len(ids) - len(end) :] == end
    assert len(ids) == len(step_of) and step_of == sorted(step_of)
    assert step_of[0] == -1 and set(step_of) - {-1} == {*range(len(steps))}

    text = format_prompt(prompt, tokenizer) + "".join(
        [*response_pieces(prefix, False), *response_pieces(steps, bool(end))]
    )
    decoded = tokenizer.decode(ids[: len(ids) - len(end)], clean_up_tokenization_spaces=False)
    if not is_chat(tokenizer):
        decoded = decoded.removeprefix("<s>")
    normal = tokenizer.backend_tokenizer.normalizer if kind[0] == "normalizing" else None
    assert "".join(decoded.split()) == "".join(
        (normal.normalize_str(text) if normal else text).split()
    )


@pytest.mark.property
@given(kind=st.sampled_from(KINDS), solution=SOLUTIONS)
def test_reward_models_follow_the_same_rule(kind, solution):
    tokenizer, (prompt, _, steps) = make_tokenizer(*kind), solution
    expected = special_tokens_of_template(tokenizer)
    ((ids, _),) = ResponseTokens(tokenizer).encode([(prompt, "\n".join(steps))])
    if not is_chat(tokenizer):
        assert control_ids(tokenizer, ids) == [*expected, tokenizer.eos_token_id]
    else:  # the answer has a turn of its own: it is closed, and no other is opened
        (turn_end,) = tokenizer("<|im_end|>", split_special_tokens=False)["input_ids"][
            len(text_encoder(tokenizer).leading_ids) :
        ][:1]
        assert control_ids(tokenizer, ids) == [*expected, turn_end]


@pytest.mark.property
@given(kind=st.sampled_from(KINDS), solution=SOLUTIONS)
def test_a_prm_follows_the_same_rule(kind, solution):
    tokenizer, (prompt, _, steps) = with_step_token(*kind), solution
    form = StepTokens(tokenizer)
    ((ids, places),) = form.encode([(prompt, steps)])
    expected = special_tokens_of_template(tokenizer)
    assert control_ids(tokenizer, ids) == [*expected, *[form.tag_id] * len(steps)]
    begins = [place for place, index in enumerate(ids) if index == form.tag_id]
    assert places == [*(begin - 1 for begin in begins[1:]), len(ids) - 1]


MADE = {}


def with_step_token(*kind):
    if kind not in MADE:
        MADE[kind] = copy.deepcopy(make_tokenizer(*kind))
        MADE[kind].add_special_tokens({"additional_special_tokens": ["<next>"]})
    return MADE[kind]


@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_the_same_whatever_the_post_processor_adds_behind(template):
    row = ("2 + 2?", ["Step 1: 2 + 2 = 4"], ["Answer: 4"])
    without, with_eos = (
        make_tokenizer("byte-level", name, template) for name in ("adds BOS", "adds BOS and EOS")
    )
    assert encode_steps(without, *row) == encode_steps(with_eos, *row)
    assert encode_prompt(without, "2 + 2?") == encode_prompt(with_eos, "2 + 2?")


def test_slow_tokenizers_and_a_missing_eos_are_refused(tokenizer):
    from transformers import ByT5Tokenizer

    with pytest.raises(ModelError, match=r"no character offsets.*tokenizer\.json"):
        encode_prompt(ByT5Tokenizer(), "2 + 2?")
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    ids, _ = encode_steps(endless, "2 + 2?", [], ["Step 1: 2 + 2 = 4"])
    assert endless.decode(ids).endswith("= 4\n")
    with pytest.raises(ModelError, match="no end-of-text token"):
        encode_steps(endless, "2 + 2?", [], ["Answer: 4"])


def test_an_encoder_is_made_anew_for_a_changed_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    before = text_encoder(tokenizer)
    assert text_encoder(tokenizer) is before
    tokenizer.add_special_tokens({"additional_special_tokens": ["[mark]"]})
    assert text_encoder(tokenizer) is not before
    (mark,) = tokenizer("[mark]", add_special_tokens=False)["input_ids"]
    assert mark not in encode_prompt(tokenizer, "a [mark] b")


def test_batches_hold_similar_lengths_within_their_limit():
    rows = ["aaa", "a" * 9, "a", "aa", "aaaa"]
    assert list(batches_by_length(rows, 6)) == [["a", "aa"], ["aaa"], ["aaaa"], ["a" * 9]]
    assert list(batches_by_length([0, 1, 2], 6, [5, 2, 3].__getitem__)) == [[1, 2], [0]]
    assert list(batches_by_length([], 6)) == []
