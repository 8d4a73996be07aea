"""The GGUF judge at TinyLlama-1.1B's shape, with a SentencePiece-style vocabulary of 32,000 pieces and random weights."""

import json

import pytest
import torch

from benchmarks.tinyllama_shape import LAYERS, SHAPE, make_file, measure, tinyllama_tokenizer
from reward_model.templates import TEMPLATES
from reward_model.tinyllama_reward_model import NO, YES, TinyLlamaRewardScorer, _Model

PROMPT = "Mia has 12 apples. She buys 3 zyzzyva boxes. How many apples does Mia have now? 🙂"
STEPS = ["Step 1: 12 + 3 = 15, qwzx", "Answer: 15"]


def test_the_tokenizer_is_tinyllamas_in_kind():
    tokenizer = tinyllama_tokenizer()
    assert len(tokenizer) == SHAPE["vocab_size"] == 32000
    message = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>\nHi</s>\n<|assistant|>\n"
    assert tokenizer(text, add_special_tokens=False)["input_ids"].count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(tokenizer(PROMPT)["input_ids"], skip_special_tokens=True) == PROMPT


@pytest.mark.slow
def test_two_layers_score_as_in_transformers(tmp_path):
    """The same ids from a vocabulary of this size, and the same scores at this width: 32 heads on 4 pairs of keys and values."""
    from transformers import AutoModelForCausalLM

    path, _ = make_file(tmp_path, layers=2, quantization="Q8_0")
    tokenizer, template = tinyllama_tokenizer(), TEMPLATES["zephyr"]
    with TinyLlamaRewardScorer(path, threads=1) as judge:
        assert (judge.template_name, judge.context_length) == ("zephyr", 2048)
        scores = judge.score_steps([(PROMPT, STEPS)])[0]
        native = _Model(judge._settings)
        ids = native._ids(judge._text.control(template.before, PROMPT, is_start=True))
    assert ids == tokenizer(template.before.format(prompt=PROMPT))["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "tinyllama-1.1b-chat-v1.0", dtype=torch.float32
    ).eval()
    vocabulary = tokenizer.get_vocab()
    yes, no = (
        [vocabulary[p] for word in words for p in (word, "▁" + word) if p in vocabulary]
        for words in (YES, NO)
    )
    for k, score in enumerate(scores):
        text = (
            template.before.format(prompt=PROMPT)
            + "\n".join(STEPS[: k + 1])
            + "\n"
            + template.question
        )
        with torch.inference_mode():
            probability = (
                model(**tokenizer(text, return_tensors="pt")).logits[0, -1].double().softmax(-1)
            )
        expected = (
            probability[yes].sum() / (probability[yes].sum() + probability[no].sum())
        ).item()
        assert score == pytest.approx(expected, abs=0.01)
    assert abs(scores[0] - scores[1]) > 1e-4


@pytest.mark.slow
def test_the_real_shape(tmp_path, capsys):
    """All 22 layers in Q4_0: what it takes is printed (pytest -s); memory and size are what a machine of 8 GB can hold."""
    path, took = make_file(tmp_path, LAYERS, "Q4_0")
    figures, scores = measure(path, count=1, threads=None)
    with capsys.disabled():
        print(
            "\n" + "\n".join(f"{name:28}{value:10.2f}" for name, value in (took | figures).items())
        )
    config = json.loads((tmp_path / "tinyllama-1.1b-chat-v1.0/config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["num_key_value_heads"]) == (
        22,
        2048,
        4,
    )
    assert 600 < figures["file, MB"] < 650  # 1.1 billion weights at 4.5 bits
    assert took["export, most memory, GB"] < 8
    assert figures["worker, most memory, GB"] < 2
    assert all(0 < score < 1 for score in scores[0]) and len(set(scores[0])) > 1
