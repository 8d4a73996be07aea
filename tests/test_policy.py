from pathlib import Path

import pytest
import torch

from reasoning.problems import problems
from reasoning.records import RecordError
from reasoning.steps import encode_steps, format_prompt
from reward_model.base import PromptTooLong
from search.policy import Policy

PROMPTS = ["Mia has 3 apples.", "Tom has 14 books. He buys 3 more books. How many books does Tom have now?", "🍎?", "x"]


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    return Policy.load(tiny_model_dir)


def test_greedy_equals_transformers_generate(policy):
    """One prompt at a time through `generate` without padding: batching, padding and the compacted cache change nothing."""
    batched = policy.generate(PROMPTS, max_new_tokens=40)
    for prompt, (response,) in zip(PROMPTS, batched, strict=True):
        ids = policy.tokenizer(format_prompt(prompt), return_tensors="pt")["input_ids"]
        written = policy.model.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :]
        text = policy.tokenizer.decode(written, skip_special_tokens=True)
        assert response.steps == [line.strip() for line in text.splitlines() if line.strip()]
        assert response.tokens == len(written) and response.finished == (written[-1].item() == policy.tokenizer.eos_token_id)
        if "�" not in text:  # random weights write half characters
            assert "".join(policy.stream(prompt, max_new_tokens=40)) == text


def test_sampling_is_repeatable_and_varies(policy):
    first = policy.generate(PROMPTS, n=3, temperature=1.0, max_new_tokens=10, seed=5)
    assert first == policy.generate(PROMPTS, n=3, temperature=1.0, max_new_tokens=10, seed=5)
    assert first != policy.generate(PROMPTS, n=3, temperature=1.0, max_new_tokens=10, seed=6)
    assert len({tuple(response.steps) for response in first[0]}) > 1


def test_rows_that_end_leave_the_cache(policy, monkeypatch):
    """Where other rows end early and are taken out of the cache, a row goes on as if it were alone."""
    alone = policy.generate(PROMPTS[1:2], max_new_tokens=30)
    (first,) = next(policy._decode([policy._prompt_ids(PROMPTS[0])], 1, 0.0, 1, None))[1]
    monkeypatch.setattr(policy, "eos_ids", policy.eos_ids | {first})
    together = policy.generate([PROMPTS[0]] * 4 + PROMPTS[1:2], max_new_tokens=30)
    assert [group[0].tokens for group in together[:4]] == [1] * 4 and together[4:] == alone


def test_sampled_frequencies_are_the_models(policy):
    """The first token of 2,000 samples against the model's probabilities (chi-square over tokens expected more than 20 times)."""
    from collections import Counter

    from scipy.stats import chisquare

    prompt_ids = policy._prompt_ids(PROMPTS[0])
    with torch.inference_mode():
        expected = policy.model(torch.tensor([prompt_ids])).logits[0, -1].softmax(-1) * 2000
    generator = torch.Generator().manual_seed(0)
    _, tokens = next(policy._decode([prompt_ids], 2000, 1.0, 1, generator))
    counts = Counter(tokens)
    often = [i for i in range(len(expected)) if expected[i] > 20]
    observed = [counts[i] for i in often] + [2000 - sum(counts[i] for i in often)]
    wanted = [expected[i].item() for i in often]
    assert chisquare(observed, [*wanted, 2000 - sum(wanted)]).pvalue > 1e-3


def test_logps_by_hand(policy):
    rows = [(PROMPTS[0], ["Step 1: 3 + 1 = 4"], ["Answer: 4"]), (PROMPTS[1], [], ["Step 1: 14 + 3 = 17"])]
    for row, value in zip(rows, policy.logps(rows), strict=True):
        ids, step_of = encode_steps(policy.tokenizer, *row)
        with torch.inference_mode():
            logps = policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        token_logps = [logps[i - 1, ids[i]].item() for i in range(len(ids)) if step_of[i] >= 0]
        assert value == pytest.approx(sum(token_logps) / len(token_logps), abs=1e-4)


def test_what_cannot_be_done_is_one_line(policy, tmp_path):
    with pytest.raises(PromptTooLong, match="512"):
        policy.generate(["apple " * 600])
    with pytest.raises(RecordError, match="no model can be loaded"):
        Policy.load(str(tmp_path))


def test_missing_or_unfitting_weights_are_no_model(tiny_model_dir, tmp_path):
    """transformers would fill what is missing with random numbers, and go on."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecordError, match="weights are missing"):
        Policy.load(str(folder))
    shutil.copy(f"{tiny_model_dir}/model.safetensors", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(RecordError, match="no model can be loaded"):
        Policy.load(str(folder))


def test_step_logps_tell_what_greedy_decoding_writes():
    """A greedy answer is greedy at every step; a step changed by hand is not."""
    policy = Policy.load(str(Path(__file__).parents[1] / "models/policy-mini"))
    prompt = next(iter(problems("validation"))).prompt
    steps = policy.generate([prompt])[0][0].steps
    wrong = [*steps[1:-1], "Answer: 999"]
    first, second = policy.step_logps([(prompt, [], steps), (prompt, steps[:1], wrong)])
    assert [step.greedy for step in first] == [True] * len(steps) and min(step.tokens for step in first) > 1
    assert [step.greedy for step in second] == [True] * (len(steps) - 2) + [False]
    total = sum(step.logp for step in second) / sum(step.tokens for step in second)
    assert policy.logps([(prompt, steps[:1], wrong)]) == [pytest.approx(total)]
