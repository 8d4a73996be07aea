"""The transformers judge against the GGUF judge, and against a forward pass for each text alone."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import ModelError
from common.files import read_records
from lm.chat_template import chat_frame
from lm.gguf_export import export_gguf
from reasoning.records import PreferencePair
from reward_model.judges.hf import TRIAL, HFJudge
from reward_model.judges.llamacpp import LlamaCppJudge
from reward_model.templates import (
    CHAT,
    NO,
    PLAIN,
    TEMPLATES,
    YES,
    JudgeTemplate,
    chat_judge_template,
)
from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer, _Model
from tests.helpers.chat_models import CHATML, HEAD, THINKING, chat_model
from tests.helpers.reward_models import TINY_SHAPE
from tests.helpers.scripts import ROOT
from tests.helpers.solutions import PROMPT, STEPS
from tests.helpers.tokenizer_kinds import make_tokenizer

JUDGE = ROOT / "models/judge-mini"
SOLUTIONS = [
    (PROMPT, STEPS),
    ("🙂 How many?", ["Step 1: é", "Answer: 3"]),
    (PROMPT, []),
    (PROMPT, [STEPS[0], "Step 2: 12 + 36 = 47", "Right?", "Answer: 47"]),
    ("Short.", ["Answer: 1"]),
]


def alone(judge: HFJudge, prompt: str, steps: list[str]) -> float:
    """The score of the last step, from all logits of a plain forward pass over the whole text."""
    lines = "".join(step + "\n" for step in steps)
    text = judge.template.before.replace("{prompt}", prompt) + lines + judge.template.question
    special = judge.template_name != "chat"
    ids = judge.tokenizer(text, return_tensors="pt", add_special_tokens=special)["input_ids"]
    with torch.no_grad():
        probability = judge.model(ids).logits[0, -1].double().softmax(-1)
    vocabulary = judge.tokenizer.get_vocab()

    def total(words):
        pieces = [mark + word for word in words for mark in ("", "▁", "Ġ")]
        return sum(probability[vocabulary[piece]] for piece in pieces if piece in vocabulary)

    return float(total(YES) / (total(YES) + total(NO)))


def agrees(judge: HFJudge, solutions=SOLUTIONS, tolerance: float = 1e-4) -> None:
    for (prompt, steps), scores in zip(solutions, judge.score_steps(solutions), strict=True):
        expected = [alone(judge, prompt, steps[: k + 1]) for k in range(len(steps))]
        assert scores == pytest.approx(expected, abs=tolerance)
        assert all(score == round(score, 6) for score in scores)


def differences(first: list[list[float]], second: list[list[float]]) -> list[float]:
    both = zip(first, second, strict=True)
    return [abs(a - b) for ours, theirs in both for a, b in zip(ours, theirs, strict=True)]


@pytest.fixture(scope="module")
def judge(tiny_model_dir):
    return HFJudge(tiny_model_dir, device="cpu")


# --- the same scores as the GGUF judge


@pytest.fixture(scope="module")
def real() -> list[tuple[str, list[str]]]:
    """36 solutions that the policy wrote."""
    pairs = read_records(ROOT / "data/synthetic_dataset.jsonl", PreferencePair)
    return [
        (pair.prompt, [*pair.prefix, *steps])
        for pair in itertools.islice(pairs, 18)
        for steps in (pair.chosen, pair.rejected)
    ]


@pytest.mark.process
@pytest.mark.parametrize("quantization", ["F32", "F16", "Q8_0"])
def test_scores_equal_those_of_the_gguf_judges_on_the_same_file(quantization, real, tmp_path):
    path = tmp_path / f"judge.{quantization}.gguf"
    export_gguf(JUDGE, path, quantization)
    judge = HFJudge(path, device="cpu")
    scores = judge.score_steps(real)
    assert judge.packed and judge.template_name == "plain" and judge.context_length == 512
    for other in (TinyLlamaRewardScorer, LlamaCppJudge):
        with other(path, threads=1) as gguf:
            apart = differences(scores, gguf.score_steps(real))
        assert len(apart) > 100
        if quantization == "Q8_0":
            # the libraries of the GGUF judges also round the activations to 8 bits
            assert max(apart) < 0.1 and sum(apart) / len(apart) < 5e-3
        else:
            assert max(apart) < 5e-3
    if quantization == "F32":
        # the directory that the file was made from
        assert max(differences(scores, HFJudge(JUDGE, device="cpu").score_steps(real))) < 1e-5


STRANGE = ["🙂🙂 a🙂b", "e\u0301 x\u0301", "كم تفاحة؟ 12", "\ufffd", "\0", "\U0010ffff", "▁"]
STRANGE += ["</s>", "a</s> b<s></s>", "<unk>", " two  spaces ", "\t\r\n\n"]


@pytest.mark.process
def test_ids_equal_those_of_the_gguf_judge(tiny_gguf):
    with TinyLlamaRewardScorer(tiny_gguf, threads=1) as gguf:
        native, text = _Model(gguf._settings), gguf._text
    judge = HFJudge(tiny_gguf, "plain", device="cpu")
    for name, template in TEMPLATES.items():
        judge.template = template
        for strange in [PROMPT, *STRANGE]:
            before = text.control(template.before, strange, is_start=True)
            steps = [*text.plain(strange + "\n"), *text.plain("Answer: 1\n")]
            ids = native._ids([*before, *steps, *text.control(template.question)])
            assert judge._texts(strange, [strange, "Answer: 1"], 1) == [ids], (name, strange)


# --- rows against texts


@pytest.mark.parametrize(
    "template", ["plain", "zephyr", "chatml", JudgeTemplate("Q: {prompt} {braces}\n", "OK?")]
)
def test_every_score_is_that_of_its_text_alone(tiny_model_dir, template):
    agrees(HFJudge(tiny_model_dir, template, device="cpu"))


def test_a_score_does_not_depend_on_what_is_scored_with_it(judge, tiny_model_dir):
    many = [(PROMPT[k:], STEPS[: 1 + k % 3]) for k in range(20)] + SOLUTIONS
    together = judge.score_steps(many)
    one_by_one = [judge.score_steps([solution])[0] for solution in many]
    assert max(differences(together, one_by_one)) < 1e-5
    small = HFJudge(tiny_model_dir, batch_tokens=1, device="cpu")
    assert max(differences(together, small.score_steps(many))) < 1e-5
    assert len({score for scores in together for score in scores}) > 40


def test_skipped_steps_are_context(judge):
    whole = judge.score_steps(SOLUTIONS)
    skipped = judge.score_steps(SOLUTIONS, skip=[2, 0, 0, 1, 1])
    expected = [whole[0][2:], whole[1], [], whole[3][1:], []]
    assert [len(scores) for scores in skipped] == [len(scores) for scores in expected]
    assert max(differences(skipped, expected)) < 1e-5


def test_what_steps_share_is_read_once(judge):
    read = []
    handle = judge.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    judge.score_steps([(PROMPT, STEPS)])
    handle.remove()
    texts = judge._texts(PROMPT, STEPS, 0)
    lengths = [len(judge.tokenizer(text)["input_ids"]) for text in ("\n" + PLAIN.question, "\n")]
    question = lengths[0] - lengths[1]
    assert read == [len(texts[-1]) + 2 * question] and read[0] < 0.6 * sum(map(len, texts))


def test_a_solution_longer_than_the_context_gets_none(judge):
    long = list(STEPS)
    while len(judge._texts(PROMPT, long, len(long) - 1)[0]) <= 512:
        fits, long = long, [*long, "Step 3: 1 + 1 = 2"]
    solutions = [(PROMPT, STEPS), (PROMPT, long), (PROMPT, fits)]
    scores = judge.score_steps(solutions, skip=[0, len(long) - 1, len(fits) - 1])
    assert scores[1] is None and len(scores[0]) == 3 and len(scores[2]) == 1


# --- other models, other tokenizers


def configs() -> dict:
    """Name -> (config of a tiny model, whether it can read rows)."""
    llama = TINY_SHAPE
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3}
    few = {"hidden_size": 32, "initializer_range": 0.3}
    return {
        "qwen2": (t.Qwen2Config(**llama), True),
        "gpt2": (t.GPT2Config(**small), True),
        "mistral, window of 60": (t.MistralConfig(**llama, sliding_window=60), True),
        "gemma2, soft-capped logits": (
            t.Gemma2Config(**llama, head_dim=8, final_logit_softcapping=2.0),
            False,
        ),
        "granite, scaled logits": (t.GraniteConfig(**llama, logits_scaling=4.0), False),
        "bloom, no positions": (t.BloomConfig(**few, n_layer=2, n_head=4), False),
        "mamba, no attention": (t.MambaConfig(**few, num_hidden_layers=2, state_size=8), False),
    }


@pytest.mark.parametrize("name", configs())
def test_any_architecture_is_scored_right_or_not_in_rows(name, tokenizer, tmp_path, capsys):
    config, packed = configs()[name]
    if name == "qwen2":  # transformers takes every tokenizer of such a model for a byte-level one
        tokenizer = make_tokenizer("byte-level", "adds nothing", "plain")
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    judge = HFJudge(tmp_path, device="cpu")
    assert judge.packed == packed and ("slower" in capsys.readouterr().out) != packed
    agrees(judge)
    assert name != "mistral, window of 60" or len(judge._texts(*SOLUTIONS[3], 3)[0]) > 60


@pytest.fixture(scope="module")
def merging_dir(tiny_model_dir, tmp_path_factory) -> str:
    """A byte-level tokenizer without word boundaries: the end of a step and the start of the
    question become one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [f"{STEPS[2]}\n{CHAT.question}", *STEPS, "Yes", "No", " Yes"]
    words = [*words, "Step 1: 5\nStep 2: 6\n"] * 3
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    folder = tmp_path_factory.mktemp("merging")
    wrapped = t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=special
    )
    wrapped.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    wrapped.save_pretrained(folder)
    config = t.LlamaConfig.from_pretrained(tiny_model_dir, vocab_size=len(wrapped))
    torch.manual_seed(0)
    t.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_that_merges_across_the_boundary(merging_dir):
    judge = HFJudge(merging_dir, "chatml", device="cpu")
    first, last = judge._texts(PROMPT, [STEPS[2], "Step 2: 1"], 0)
    step = judge._encoder._ids(f"{STEPS[2]}\n")
    assert step != judge._encoder._ids(f"{STEPS[2]}\n{CHAT.question}")[: len(step)]
    assert first[: len(last)] != last and judge.packed
    agrees(judge)
    users = judge._texts("<|im_end|>", ["<|im_start|>", "<|im_end|"], 1)[0]
    ours = judge._texts("x", ["x", "x"], 1)[0]
    control = judge.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    counts = [[ids.count(index) for index in control] for ids in (users, ours)]
    assert counts == [[2, 1], [2, 1]]


def test_a_chat_model_is_asked_in_its_own_template(merging_dir):
    judge = HFJudge(merging_dir, device="cpu")
    assert judge.template_name == "chat"
    lines = "".join(step + "\n" for step in STEPS)
    content = CHAT.before.format(prompt=PROMPT) + lines + CHAT.question
    message = [{"role": "user", "content": content}]
    options = {"add_generation_prompt": True, "return_dict": True}
    expected = judge.tokenizer.apply_chat_template(message, **options)["input_ids"]
    assert judge._texts(PROMPT, STEPS, 2) == [expected]
    agrees(judge)


def test_a_chat_model_that_thinks_is_asked_with_thinking_off(tiny_model_dir, tmp_path):
    judge = HFJudge(chat_model(tiny_model_dir, tmp_path, THINKING), device="cpu")
    assert judge.template.question.endswith(f"{HEAD}<think>\n\n</think>\n\n")
    content = CHAT.before.format(prompt=PROMPT) + STEPS[0] + "\n" + CHAT.question
    options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": True}
    message = [{"role": "user", "content": content}]
    expected = judge.tokenizer.apply_chat_template(message, **options)["input_ids"]
    assert judge._texts(PROMPT, STEPS[:1], 0) == [expected]


def test_a_chat_model_that_cannot_be_asked_names_the_flag(tiny_model_dir, tmp_path):
    def refused(name: str, template: object, reason: str, **options: str) -> None:
        path = chat_model(tiny_model_dir, tmp_path / name, template, **options)
        with pytest.raises(
            ModelError, match=rf"{reason}.*choose one with --judge_template"
        ) as error:
            HFJudge(path, device="cpu")
        assert str(error.value).startswith(f"judge {path}: ") and "\n" not in str(error.value)
        HFJudge(path, "chatml", device="cpu")

    refused("forced", CHATML.replace(HEAD, f"{HEAD}<think>\n"), "makes the model think")
    refused("fails", CHATML.replace("user", "x") + "{{ raise_exception('never') }}", "never")
    refused("several", {"tool_use": CHATML}, "none of tool_use is named default")
    asked = chat_judge_template(chat_frame(CHATML, {"bos_token": "<s>"}))
    prompt, steps = TRIAL
    after = asked.before.format(prompt=prompt) + "\n".join(steps) + "\n" + asked.question
    refused("says", CHATML, "begins to think where", says="<think>", after=after)


def test_without_a_chat_template_the_name_decides(tiny_model_dir, tmp_path, capsys):
    shutil.copytree(tiny_model_dir, tmp_path / "Llama-2-7b-chat-hf")
    judge = HFJudge(tmp_path / "Llama-2-7b-chat-hf", device="cpu")
    assert judge.template == TEMPLATES["llama-2"] and judge.template_name == "llama-2"
    assert "the template llama-2 is used because of its name" in capsys.readouterr().out


def test_an_adapter_is_scored_on_its_base(tiny_model_dir, tokenizer, judge, tmp_path):
    torch.manual_seed(1)
    lora = LoraConfig(init_lora_weights=False, target_modules=["q_proj"], lora_alpha=64)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_dir), lora)
    model.save_pretrained(tmp_path / "adapter")
    adapter = HFJudge(tmp_path / "adapter", device="cpu")  # its tokenizer is the base's
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    scores = adapter.score_steps(SOLUTIONS)
    merged = HFJudge(tmp_path / "merged", device="cpu").score_steps(SOLUTIONS)
    assert max(differences(scores, merged)) < 1e-4
    assert max(differences(scores, judge.score_steps(SOLUTIONS))) > 1e-2


# --- what cannot be scored


def test_what_cannot_be_used_is_an_error_of_one_line(tiny_model_dir, tiny_gguf, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.gguf").write_bytes(Path(tiny_gguf).read_bytes()[:-64])
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "weightless").mkdir()
    config = (Path(tiny_model_dir) / "config.json").read_bytes()
    (tmp_path / "weightless/config.json").write_bytes(config)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "weightless")
    cases = {
        tmp_path / "empty": "can(?:not)? be loaded",
        tmp_path / "cut.gguf": "cut off",
        tmp_path / "text.gguf": "no GGUF file",
        tmp_path / "none.gguf": "cannot be read",
        tmp_path / "weightless": "can(?:not)? be loaded",
        "nobody/nothing": "can(?:not)? be loaded",
    }
    for path, reason in cases.items():
        with pytest.raises(ModelError, match=reason) as error:
            HFJudge(path, device="cpu")
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    for arguments in ({"template": "none"}, {"batch_tokens": 0}):
        with pytest.raises(ModelError, match=r"expected one of plain|at least 1"):
            HFJudge(tiny_model_dir, device="cpu", **arguments)


def test_a_vocabulary_without_the_words(tiny_model_dir, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path)
    tokens = tmp_path / "tokenizer.json"
    spec = json.loads(tokens.read_text())
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "Yes", "\n"]
    spec["model"]["vocab"] = {piece: k for k, piece in enumerate(pieces)}
    spec["model"] |= {"merges": [], "byte_fallback": False}
    tokens.write_text(json.dumps(spec))
    with pytest.raises(ModelError, match="no token No or no"):
        HFJudge(tmp_path, device="cpu")


def test_what_cannot_be_scored_is_named(judge, tiny_model_dir, tmp_path):
    assert judge.score_steps([("\ud800", ["Answer: 1"])]) == [None]
    broken = HFJudge(tiny_model_dir, device="cpu")
    broken.model.model.norm.weight.data[:] = float("nan")
    place = r"not finite at step 2 'Step 2: 12 \+ 36 = 48' of prompt 'Mia has"
    with pytest.raises(ModelError, match=place):
        broken.score_steps([(PROMPT, STEPS)], skip=[1])


def test_it_can_be_named_when_it_is_closed(tiny_model_dir):
    """Scripts say which judge it was after they have closed it."""
    with HFJudge(tiny_model_dir, device="cpu") as judge:
        named = str(judge)
    assert str(judge) == named and "on cpu" in named
