"""The GGUF judge at TinyLlama-1.1B's shape, with 32,000 pieces and random weights."""

import json

import pytest

from benchmarks.tinyllama_shape import LAYERS, NAME, SHAPE, make_file, measure, tinyllama_tokenizer
from lm.loading import load_model
from reward_model.templates import TEMPLATES
from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer, _Model
from tests.helpers.transformers_judge import step_scores

PROMPT = "Mia has 12 apples. She buys 3 zyzzyva boxes. How many apples does Mia have now? 🙂"
STEPS = ["Step 1: 12 + 3 = 15, qwzx", "Answer: 15"]


@pytest.mark.process
def test_the_tokenizer_is_like_tinyllamas():
    tokenizer = tinyllama_tokenizer()
    assert len(tokenizer) == SHAPE["vocab_size"] == 32000
    message = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>\nHi</s>\n<|assistant|>\n"
    assert tokenizer(text, add_special_tokens=False)["input_ids"].count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(tokenizer(PROMPT)["input_ids"], skip_special_tokens=True) == PROMPT


@pytest.mark.slow
@pytest.mark.process
def test_two_layers_score_as_in_transformers(tmp_path):
    """The same ids with a vocabulary of this size, and the same scores at this width, with 32 heads
    and 4 heads of keys and values."""
    path, _ = make_file(tmp_path, layers=2, quantization="Q8_0")
    tokenizer, template = tinyllama_tokenizer(), TEMPLATES["zephyr"]
    with TinyLlamaRewardScorer(path, threads=1) as judge:
        assert (judge.template_name, judge.context_length) == ("zephyr", 2048)
        scores = judge.score_steps([(PROMPT, STEPS)])[0]
        native = _Model(judge._settings)
        ids = native._ids(judge._text.control(template.before, PROMPT, is_start=True))
    assert ids == tokenizer(template.before.format(prompt=PROMPT))["input_ids"]
    model, _ = load_model(str(tmp_path / NAME), "float32")
    expected = step_scores(model, tokenizer, PROMPT, STEPS, template)
    assert scores == pytest.approx(expected, abs=0.01)
    assert abs(scores[0] - scores[1]) > 1e-4


@pytest.mark.slow
@pytest.mark.process
def test_the_real_shape(tmp_path, capsys):
    """All 22 layers in Q4_0, within the memory of a machine of 8 GB. Prints the figures."""
    path, figures = make_file(tmp_path, LAYERS, "Q4_0")
    scoring_figures, scores = measure(path, count=1, threads=None)
    figures |= scoring_figures
    with capsys.disabled():
        print("", *(f"{name:28}{value:10.2f}" for name, value in figures.items()), sep="\n")
    config = json.loads((tmp_path / NAME / "config.json").read_text())
    shape = ("num_hidden_layers", "hidden_size", "num_key_value_heads")
    assert [config[name] for name in shape] == [22, 2048, 4]
    assert 600 < figures["file, MB"] < 650  # 1.1 billion weights at 4.5 bits
    assert figures["export, peak memory, GB"] < 8
    assert figures["worker, peak memory, GB"] < 2
    assert all(0 < score < 1 for score in scores[0]) and len(set(scores[0])) > 1
