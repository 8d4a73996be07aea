"""The response reward model: the text it reads, the same score alone and in a batch, its errors."""

import json
import math
import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from common.errors import ModelError
from lm.prompting import PLAIN_TEMPLATE
from reward_model.response_reward_model import (
    ResponseJudge,
    ResponseRewardModel,
    ResponseTokens,
    from_causal_lm,
)
from tests.helpers.reward_models import make_distilbert, make_llama

PROMPT = "Mia has 12 apples. She buys 3 more. How many apples does Mia have now?"
RESPONSES = [
    "Step 1: 12 + 3 = 15\nAnswer: 15",
    "Step 1: 12 * 3 = 36\nAnswer: 36",
    "?",
    "Answer: 15 </s> [SEP]",
    "é 🙂\n\n" * 20,
]
PAIRS = [(PROMPT, response) for response in RESPONSES]
PAIRS += [("Short?", "Yes."), ("Short?", "No. " * 60)]
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def folders(tiny_model_dir, tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reward")
    made = {
        "question": make_llama(tiny_model_dir, folder / "question"),
        "eos": make_llama(tiny_model_dir, folder / "eos", ""),
        "no_pad": str(folder / "no_pad"),
        "distilbert": make_distilbert(folder / "distilbert"),
    }
    shutil.copytree(made["eos"], made["no_pad"])  # a tokenizer without a padding token: EOS pads
    for name, key in (("config.json", "pad_token_id"), ("tokenizer_config.json", "pad_token")):
        content = json.loads((folder / "no_pad" / name).read_text())
        (folder / "no_pad" / name).write_text(json.dumps(content | {key: None}))
    return made


@pytest.mark.parametrize("name", ["question", "eos", "no_pad", "distilbert"])
def test_the_same_score_alone_in_a_batch_and_beside_longer_ones(folders, name):
    scorer = ResponseRewardModel(folders[name], device="cpu")
    together = scorer.score(PAIRS)
    assert len({round(score, 4) for score in together}) == len(PAIRS)  # it reads the texts
    assert [scorer.score_response(*pair) for pair in PAIRS] == pytest.approx(together, abs=1e-5)
    assert scorer.score(PAIRS[::-1])[::-1] == pytest.approx(together, abs=1e-5)
    small = ResponseRewardModel(folders[name], batch_tokens=100, device="cpu")
    assert small.score(PAIRS) == pytest.approx(together, abs=1e-5)
    assert scorer.score([]) == []


def test_as_a_step_judge_it_gives_each_step_the_score_of_the_whole(folders):
    with ResponseJudge(ResponseRewardModel(folders["question"], device="cpu")) as judge:
        whole = 1 / (1 + math.exp(-judge.scorer.score_response(PROMPT, RESPONSES[0])))
        prefix = 1 / (1 + math.exp(-judge.scorer.score_response(PROMPT, "Step 1: 12 + 3 = 15")))
        steps = RESPONSES[0].split("\n")
        solutions = [(PROMPT, part) for part in (steps, steps[:1], [], steps, steps)]
        scores = judge.score_steps(solutions, skip=[0, 0, 0, 1, 2])
        assert prefix != pytest.approx(whole, abs=1e-3)
        expected = [[whole, whole], [prefix], [], [whole], []]
        for ours, theirs in zip(scores, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)
        assert judge.score_steps(solutions[1:2])[0] == pytest.approx([prefix], abs=1e-6)


def test_a_score_is_that_of_a_plain_forward_pass(folders):
    for name, end in (("question", "\nRight?"), ("eos", "</s>")):
        path = folders[name]
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).eval()
        text = PLAIN_TEMPLATE.format(prompt=PROMPT) + RESPONSES[0] + end
        ids = AutoTokenizer.from_pretrained(path)(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = model(input_ids=ids).logits.item()
        score = ResponseRewardModel(path, device="cpu").score_response(PROMPT, RESPONSES[0])
        assert score == pytest.approx(expected, abs=1e-5)


def test_what_each_kind_of_model_reads(tokenizer, folders):
    (ids, over), *_ = ResponseTokens(tokenizer).encode([("1 + 1?", "Answer: 2")])
    assert tokenizer.decode(ids) == "<s> Problem: 1 + 1?\nSolution:\nAnswer: 2</s>" and over == 0
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    (ids, _), *_ = ResponseTokens(tokenizer, question="Right?").encode([("1 + 1?", "Answer: 2")])
    assert tokenizer.decode(ids) == "<s> Problem: 1 + 1?\nSolution:\nAnswer: 2\nRight?"

    bert = AutoTokenizer.from_pretrained(folders["distilbert"])
    (ids, _), *_ = ResponseTokens(bert).encode([("1 + 1?", "2 [SEP]")])
    assert ids[: len(bert("1 + 1?", "2")["input_ids"]) - 1] == bert("1 + 1?", "2")["input_ids"][:-1]
    assert ids.count(bert.sep_token_id) == 2  # the one in the response is plain text
    assert ResponseTokens(bert).encode([("1 + 1?", "2")])[0][0] == bert("1 + 1?", "2")["input_ids"]

    chat = AutoTokenizer.from_pretrained(folders["eos"])
    chat.chat_template = CHAT
    tokens = ResponseTokens(chat, question="Right?")
    (ids, _), (written, _) = tokens.encode([("Hi", "Ho"), ("Hi", "Ho</s>")])
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    text = chat.apply_chat_template(messages, tokenize=False)
    assert ids == chat(text, add_special_tokens=False)["input_ids"]
    assert "Right?" not in chat.decode(ids)
    assert written.count(chat.eos_token_id) == ids.count(chat.eos_token_id) == 2


@pytest.mark.parametrize("name", ["question", "eos", "distilbert"])
def test_a_text_that_is_too_long_loses_the_start_of_its_prompt(folders, name):
    tokenizer = AutoTokenizer.from_pretrained(folders[name])
    question = "Right?" if name == "question" else None

    def encode(max_length):
        tokens = ResponseTokens(tokenizer, max_length, question)
        return tokens.encode([("word " * 30 + "end?", "Yes.")])[0]

    (whole, none), (ids, over) = encode(None), encode(24)
    assert none == 0 and over == len(whole) - 24 and len(ids) == 24
    assert ids[:1] == whole[:1] and ids[1:] == whole[-23:]
    assert encode(len(whole)) == (whole, 0)


def test_a_model_cuts_at_its_own_context_and_counts(tiny_model_dir, tmp_path):
    short = make_llama(tiny_model_dir, tmp_path / "short", context=48)
    scorer = ResponseRewardModel(short, device="cpu")
    assert scorer.format.max_length == 48
    prompts = ("One. " * 40 + "End?", "Two. " * 30 + "One. " * 30 + "End?")
    a, b = scorer.score([(prompt, "Yes.") for prompt in prompts])
    # they differ only in the part that was cut off
    assert a == pytest.approx(b, abs=1e-5) and scorer.cut == 2


def test_the_head_starts_as_the_logits_of_yes_and_no(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    lm = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    text = PLAIN_TEMPLATE.format(prompt=PROMPT) + RESPONSES[0] + "\nRight?"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    yes, no = (tokenizer(f"Right? {word}")["input_ids"][-1] for word in ("Yes", "No"))
    with torch.inference_mode():
        logits = lm(input_ids=ids).logits[0, -1]
        reward = from_causal_lm(lm, tokenizer, "Right?").eval()(input_ids=ids).logits.item()
    assert reward == pytest.approx((logits[yes] - logits[no]).item(), abs=1e-5) and reward != 0
    with torch.inference_mode():
        assert from_causal_lm(lm, tokenizer).eval()(input_ids=ids).logits.item() == 0


def test_what_is_no_reward_model_is_refused_in_one_line(folders, tiny_model_dir, tmp_path):
    def changed(name: str, **config) -> str:
        shutil.copytree(folders["eos"], tmp_path / name)
        content = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(content | config))
        return str(tmp_path / name)

    two = changed("two", id2label={"0": "NO", "1": "YES"}, label2id={"NO": 0, "YES": 1})
    lost = changed("lost")
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "headless")
    shutil.copy(tmp_path / "headless/model.safetensors", tmp_path / "lost/model.safetensors")
    (tmp_path / "empty").mkdir()
    command = "`.*python.* .*train.py reward --model_name_or_path .* --output_dir"
    for path, message in (
        (tiny_model_dir, f"is no reward model but LlamaForCausalLM; {command}"),
        (two, "2 labels; a reward model has one"),
        (lost, "weights are missing, for example score.weight"),
        (str(tmp_path / "empty"), "empty"),
    ):
        with pytest.raises(ModelError, match=message) as error:
            ResponseRewardModel(path, device="cpu")
        assert "\n" not in str(error.value)
    assert AutoConfig.from_pretrained(folders["eos"]).num_labels == 1


def test_text_that_is_not_unicode_and_scores_that_are_not_numbers(folders):
    scorer = ResponseRewardModel(folders["eos"], device="cpu")
    with pytest.raises(ModelError, match="surrogate"):
        scorer.score([(PROMPT, "\ud83d")])
    torch.nn.init.constant_(scorer.model.score.weight, float("nan"))
    with pytest.raises(ModelError, match="is not a number"):
        scorer.score([(PROMPT, "Answer: 1")])
