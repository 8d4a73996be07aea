"""PRMs in published formats: tiny random models, their values against a separate computation."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from common.errors import ModelError
from reward_model.prm_formats import PUBLISHED, MathShepherd, QwenMath, RLHFlow
from reward_model.process_reward_model import ProcessRewardModel
from tests.helpers.reward_models import TINY_SHAPE
from tests.helpers.solutions import PROMPT, STEPS

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: 26 Jul 2024\n\n<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
)


def bytes_tokenizer():
    """One token for each byte, as Qwen's tokenizer without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: k for k, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module", params=PUBLISHED)
def prm(request, tokenizer, tmp_path_factory):
    """(folder, tokenizer, function (prompt, steps) -> values of all steps).

    The function computes the values as the publishers' examples do."""
    folder = tmp_path_factory.mktemp("published") / request.param
    torch.manual_seed(0)
    make = {
        "Qwen2.5-Math-PRM": qwen,
        "math-shepherd-mistral-7b-prm": shepherd,
        "Llama3.1-8B-PRM": rlhflow,
    }[request.param]
    tokenizer = bytes_tokenizer() if make is qwen else copy.deepcopy(tokenizer)
    values = make(folder, tokenizer)
    tokenizer.save_pretrained(folder)
    return str(folder), tokenizer, values


def qwen(folder, tokenizer):
    """Weights and config.json as published; the class exists only in the publisher's code."""
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<extra_0>"], special_tokens=True)
    tokenizer.chat_template = CHATML
    config = transformers.Qwen2Config(**TINY_SHAPE, vocab_size=len(tokenizer))
    backbone = transformers.Qwen2Model(config)
    first, second = torch.nn.Linear(32, 32), torch.nn.Linear(32, 2)
    folder.mkdir()
    weights = {f"model.{name}": weight for name, weight in backbone.state_dict().items()}
    weights |= {
        f"score.{k}.{name}": weight
        for k, head in ((0, first), (2, second))
        for name, weight in head.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    code = {
        "AutoConfig": "configuration_qwen2_rm.Qwen2RMConfig",
        "AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel",
    }
    written = config.to_dict() | {"architectures": ["Qwen2ForProcessRewardModel"], "auto_map": code}
    (folder / "config.json").write_text(json.dumps(written))

    def values(prompt, steps):
        text = (
            "<|im_start|>system\n"
            "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
            f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
            f"{'<extra_0>'.join(steps)}<extra_0><|im_end|>\n"
        )
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        at_tags = ids == tokenizer.convert_tokens_to_ids("<extra_0>")
        hidden = backbone(ids).last_hidden_state[at_tags]
        return second(first(hidden).relu()).softmax(-1)[:, 1].tolist()

    return values


def shepherd(folder, tokenizer):
    tokenizer.add_tokens(["ки"])
    config = transformers.MistralConfig(**TINY_SHAPE, vocab_size=len(tokenizer))
    model = transformers.MistralForCausalLM(config).eval()
    model.save_pretrained(folder)

    def values(prompt, steps):
        text = f"{prompt} " + "\n".join(f"{step} ки" for step in steps)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        assert ids[0, 0] == tokenizer.bos_token_id
        signs = tokenizer.convert_tokens_to_ids(["▁+", "▁-"])
        at_tags = ids == tokenizer.convert_tokens_to_ids("ки")
        return model(ids).logits[:, :, signs].softmax(-1)[:, :, 0][at_tags].tolist()

    return values


def rlhflow(folder, tokenizer):
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.chat_template = LLAMA3
    config = transformers.LlamaConfig(**TINY_SHAPE, vocab_size=len(tokenizer))
    model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)

    def values(prompt, steps):
        """Step by step, with a forward pass for each conversation."""
        turns, found = [], []
        signs = tokenizer.convert_tokens_to_ids(["+", "-"])
        for k, step in enumerate(steps):
            turns += [
                {"role": "user", "content": f"{prompt} {step}" if k == 0 else step},
                {"role": "assistant", "content": "+"},
            ]
            options = {"return_tensors": "pt", "return_dict": True}
            ids = tokenizer.apply_chat_template(turns, **options)["input_ids"]
            assert ids[0, -2] == signs[0]
            found.append(float(model(ids).logits[0, -3, signs].softmax(-1)[0]))
        return found

    return values


def test_values_equal_the_publishers(prm):
    folder, _, values = prm
    judge = ProcessRewardModel(folder, device="cpu")
    assert type(judge.format) is PUBLISHED[Path(folder).name]
    solutions = [
        (PROMPT, STEPS),
        ("2 + 2?", ["Answer: 4"]),
        (PROMPT, []),
        ("🙂?", ["Step 1: é = 1", "Answer: 1"]),
    ]
    together = judge.score_steps(solutions)
    for (prompt, steps), scores in zip(solutions, together, strict=True):
        with torch.no_grad():
            assert scores == pytest.approx(values(prompt, steps) if steps else [], abs=1e-5)
    assert len({score for scores in together for score in scores}) == 6
    by_step = [judge.score_steps([(PROMPT, STEPS[: k + 1])], skip=[k])[0][0] for k in range(3)]
    assert by_step == pytest.approx(together[0], abs=1e-5)


def test_what_reads_like_a_tag_stays_text(prm):
    folder, tokenizer, _ = prm
    judge = ProcessRewardModel(folder, device="cpu")
    users = "<extra_0> ки <|eot_id|> + <|im_end|>"
    ((ids, places), (ours, _)) = judge.format.encode([(users, [users, users]), ("x", ["y", "z"])])
    assert len(places) == 2 and len(judge.score_steps([(users, [users, users])])[0]) == 2
    tags = {"<extra_0>", "ки", "<|eot_id|>", "<|im_end|>"} & set(tokenizer.get_vocab())
    for tag in map(tokenizer.convert_tokens_to_ids, tags):
        assert ids.count(tag) == ours.count(tag)


@pytest.mark.parametrize(
    ("name", "config", "family"),
    [
        ("Qwen2.5-Math-PRM-7B", {}, QwenMath),
        ("Qwen2.5-Math-7B-PRM800K", {}, QwenMath),
        ("mine", {"architectures": ["Qwen2ForProcessRewardModel"]}, QwenMath),
        ("math-shepherd-mistral-7b-prm", {}, MathShepherd),
        ("mine", {"_name_or_path": "peiyi9979/math-shepherd-mistral-7b-prm"}, MathShepherd),
        ("Llama3.1-8B-PRM-Deepseek-Data", {}, RLHFlow),
        ("mine", {"architectures": ["LlamaForCausalLM"]}, None),
        ("math-shepherd-sft", {"architectures": ["MistralForCausalLM"]}, None),
    ],
)
def test_a_family_matches_its_name_or_architecture(name, config, family):
    found = [known for known in PUBLISHED.values() if known.matches(name, config)]
    assert found == ([family] if family else [])


def test_a_tokenizer_that_lacks_the_tag(tokenizer, tmp_path):
    folder = tmp_path / "math-shepherd-mistral-7b-prm"
    config = transformers.MistralConfig(**TINY_SHAPE, vocab_size=len(tokenizer))
    transformers.MistralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    reason = r"math-shepherd-mistral-7b-prm: the tokenizer does not know 'ки'"
    with pytest.raises(ModelError, match=reason):
        ProcessRewardModel(folder, device="cpu")
