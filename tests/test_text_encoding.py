"""From text to token ids."""

import copy

import pytest

from common.errors import ModelError
from lm.text_encoding import (
    PlainText,
    batches_by_length,
    encode_prompt,
    encode_steps,
    format_prompt,
    response_pieces,
)

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
    plain = PlainText(tokenizer, "[mark]")
    prompt, (step,) = plain.guard("a </s> b", ["x [mark] y"])
    assert plain.leading_ids == [tokenizer.bos_token_id]
    guarded, control = plain.ids([prompt, "a </s> b"])
    assert tokenizer.convert_ids_to_tokens(guarded) == ["▁a", "▁", "<", "/", "s", ">", "▁b"]
    assert tokenizer.eos_token_id in control and tokenizer.eos_token_id not in guarded
    assert step != "x [mark] y" and tokenizer.decode(plain.ids([step])[0]) == "x [mark] y"
    assert plain.guard("2 < 3", ["b"]) == ("2 < 3", ["b"])
    with pytest.raises(ModelError, match="surrogate"):
        plain.guard("\ud83c", [])


def test_batches_hold_similar_lengths_within_their_limit():
    rows = ["aaa", "a" * 9, "a", "aa", "aaaa"]
    assert list(batches_by_length(rows, 6)) == [["a", "aa"], ["aaa"], ["aaaa"], ["a" * 9]]
    assert list(batches_by_length([0, 1, 2], 6, [5, 2, 3].__getitem__)) == [[1, 2], [0]]
    assert list(batches_by_length([], 6)) == []
