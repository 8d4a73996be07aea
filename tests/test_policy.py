"""The policy: its samples, states and log-probs."""

import itertools
import json
import shutil
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare
from transformers import AutoTokenizer

from common.errors import ModelError, PromptTooLong
from common.files import ROOT
from lm.policy import Policy
from lm.text_encoding import encode_prompt, encode_steps, format_prompt
from reasoning.problems import problems
from reasoning.steps import shared_prefix, split_steps
from tests.helpers.chat_models import CHATML, HEAD, THINKING, chat_model

PROMPTS = [
    "Mia has 3 apples.",
    "Tom has 14 books. He buys 3 more books. How many books does Tom have now?",
    "🍎?",
    "x",
]


@pytest.fixture(scope="module")
def policy(tiny_model_dir):
    return Policy.load(tiny_model_dir)


@pytest.fixture
def mini():
    return Policy.load(str(ROOT / "models/policy-mini"))


def test_greedy_equals_transformers_generate(policy):
    """One prompt at a time through `generate`: batching, padding and the cache change nothing."""
    batched = policy.generate(PROMPTS, max_new_tokens=40)
    for prompt, (response,) in zip(PROMPTS, batched, strict=True):
        ids = policy.tokenizer(format_prompt(prompt), return_tensors="pt")["input_ids"]
        written = policy.model.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :]
        text = policy.tokenizer.decode(written, skip_special_tokens=True)
        lines = [" ".join(line.split()) for line in text.split("\n") if line.strip()]
        assert (response.steps, response.tokens) == (lines, len(written))
        assert response.finished == (written[-1].item() == policy.tokenizer.eos_token_id)
        if "�" not in text:  # random weights write half characters
            assert "".join(policy.stream(prompt, max_new_tokens=40)) == text


def test_sampling_is_repeatable_and_varies(policy):
    first = policy.generate(PROMPTS, n=3, temperature=1.0, max_new_tokens=10, seed=5)
    assert first == policy.generate(PROMPTS, n=3, temperature=1.0, max_new_tokens=10, seed=5)
    assert first != policy.generate(PROMPTS, n=3, temperature=1.0, max_new_tokens=10, seed=6)
    assert len({tuple(response.steps) for response in first[0]}) > 1


def test_rows_that_end_leave_and_others_enter(policy, monkeypatch):
    """A row is the same alone and where other rows end early and are replaced in the cache."""
    alone = [policy.generate([prompt], max_new_tokens=30)[0] for prompt in PROMPTS]
    (first,) = next(policy.decoder.decode([policy.start(PROMPTS[0]).ids], 1, 0.0, 1, 0))[0].ids
    monkeypatch.setattr(policy.decoder, "eos_ids", policy.decoder.eos_ids | {first})
    monkeypatch.setattr("lm.decoding.MAX_ROWS", 3)
    together = policy.generate([PROMPTS[0]] * 4 + PROMPTS[1:] + [PROMPTS[0]], max_new_tokens=30)
    assert [group[0].tokens for group in together if group[0].finished] == [1] * 5
    assert [group for group in together if not group[0].finished] == alone[1:]


@pytest.mark.parametrize("method", ["next_steps", "rollouts"])
def test_a_state_alone_and_among_many_has_the_same_samples(mini, monkeypatch, method):
    monkeypatch.setattr("lm.decoding.MAX_ROWS", 40)
    sample = getattr(mini, method)
    states = [
        mini.start(problem.prompt, problem.steps[: k % 3])
        for k, problem in enumerate(itertools.islice(problems("validation"), 16))
    ]
    together = sample(states, n=7, seed=3)  # 112 samples
    assert all(len(group) == 7 for group in together)
    assert len({state.steps for group in together for state in group}) > 20
    for k in (0, 1, 2, 15):
        assert sample([states[k]], n=7, seed=3) == [together[k]]
    assert sample(states[:1], n=2, seed=3) == [together[0][:2]]
    assert sample(states[:1], n=7, seed=4) != [together[0]]


@pytest.fixture
def shapes_read(mini, monkeypatch) -> list[torch.Size]:
    """The shapes (rows, tokens) of all ids that `mini` reads."""
    shapes, read = [], mini.decoder._read

    def recording(cache, lengths, ids):
        shapes.append(ids.shape)
        return read(cache, lengths, ids)

    monkeypatch.setattr(mini.decoder, "_read", recording)
    return shapes


@pytest.mark.process
def test_steps_add_up_to_what_transformers_writes(mini, shapes_read):
    """Greedy steps, each continued from the kept cache, are the ids of one greedy `generate`."""
    states = [mini.start(problem.prompt) for problem in itertools.islice(problems("validation"), 5)]
    whole = [state for (state,) in mini.rollouts(states, temperature=0)]
    reached = states
    shapes_read.clear()
    for _ in range(12):
        is_open = [state for state in reached if state.status == "open"]
        longer = iter(mini.next_steps(is_open, temperature=0) if is_open else [])
        reached = [next(longer)[0] if state.status == "open" else state for state in reached]
    assert reached == whole and {state.status for state in whole} == {"finished"}
    # the prompts are read once; all else is one token at a time
    assert sum(columns > 1 for _, columns in shapes_read) == 1
    for state in whole:
        ids = torch.tensor([mini.start(state.prompt).ids])
        generated = mini.model.generate(ids, do_sample=False, max_new_tokens=256)
        assert state.ids == tuple(generated[0].tolist())
        text = mini.tokenizer.decode(state.ids[state.ends[0] :], skip_special_tokens=True)
        assert list(state.steps) == split_steps(text)
        part = state.first(2)
        assert (part.steps, part.status) == (state.steps[:2], "open")
        assert part.ids == mini.start(state.prompt, part.steps).ids
        assert mini.start(state.prompt, state.steps) == state == state.first(len(state.steps))


@pytest.mark.process
def test_samples_share_a_row_until_they_differ(mini, shapes_read, monkeypatch):
    """A row is read while its samples agree. Where they differ it is split, into free places, into
    new places or, above MAX_ROWS, into the queue; the samples stay the same."""
    states = [mini.start(problem.prompt) for problem in itertools.islice(problems("validation"), 3)]
    together = mini.rollouts(states, n=32, seed=3)
    distinct = [{state.ids for state in group} for group in together]
    assert min(map(len, distinct)) > 1 and sum(map(len, distinct)) < 32 * 3 / 2
    written = {
        (k, ids[:end])
        for k, group in enumerate(distinct)
        for ids in group
        for end in range(len(states[k].ids), len(ids))
    }
    # the others are rows that have ended and not left yet
    assert len(written) <= sum(rows for rows, _ in shapes_read) < 1.34 * len(written)
    for most, count in ((1, 1), (4, 2), (9, 3)):
        monkeypatch.setattr("lm.decoding.MAX_ROWS", most)
        shapes_read.clear()
        assert mini.rollouts(states[:count], n=32, seed=3) == together[:count]
        assert max(rows for rows, _ in shapes_read) <= most
        assert not mini.decoder._kept and not mini.decoder._kept_bytes
    monkeypatch.setattr("lm.decoding.KEPT_BYTES", 0)  # waiting rows are read again
    assert mini.rollouts(states[:2], n=32, seed=3) == together[:2]


def test_kept_caches_have_a_limit(mini, monkeypatch):
    monkeypatch.setattr("lm.decoding.KEPT_BYTES", 400_000)
    states = mini.next_steps([mini.start(PROMPTS[1])], n=8)[0]
    assert 0 < mini.decoder._kept_bytes <= 400_000 and len(mini.decoder._kept) < 8
    again = Policy(mini.model, mini.tokenizer)
    states = [state for state in states if state.status == "open"]
    assert mini.next_steps(states, n=2) == again.next_steps(states, n=2)


def test_where_sampling_stops(policy):
    (state,) = policy.next_steps([policy.start(PROMPTS[0])], max_new_tokens=3)[0]
    assert state.status == "cut" and len(state.ids) == state.ends[0] + 3
    for method in (policy.next_steps, policy.rollouts):
        with pytest.raises(ValueError, match="cut cannot be continued"):
            method([state])
    near_the_end = policy.start("apple " * 120)
    room = policy.context - len(near_the_end.ids)
    (group,) = policy.rollouts([near_the_end], 4, 1.0, room + 50)
    assert {len(state.ids) for state in group} == {policy.context}


def test_blank_lines_end_no_step(policy):
    """A model may write an empty line between steps, or blanks after the last."""
    ids = policy.tokenizer("Step 1: a\n\n \nStep 2: b\n\n", add_special_tokens=False)["input_ids"]
    ends = policy.decoder.step_ends(ids)
    steps = [policy.decoder.text(ids[a:b]) for a, b in itertools.pairwise([0, *ends])]
    assert steps == ["Step 1: a", "Step 2: b"]
    assert ends[-1] == len(ids) and policy.decoder.step_ends(ids[:0]) == []


def first_tokens(policy, ids, **more) -> Counter:
    counts = Counter()
    for row in next(policy.decoder.decode([ids], 2000, 1.0, 1, seed=0, **more)):
        counts[row.ids[0]] += len(row.samples)
    assert counts.total() == 2000
    return counts


def test_sampled_frequencies_are_the_models(policy):
    """The first token of 2,000 samples has the model's probabilities: a chi-square test over tokens
    that are expected more than 20 times."""
    prompt_ids = policy.start(PROMPTS[0]).ids
    with torch.inference_mode():
        expected = policy.model(torch.tensor([prompt_ids])).logits[0, -1].softmax(-1) * 2000
    counts = first_tokens(policy, prompt_ids)
    often = [i for i in range(len(expected)) if expected[i] > 20]
    observed = [counts[i] for i in often] + [2000 - sum(counts[i] for i in often)]
    wanted = [expected[i].item() for i in often]
    assert chisquare(observed, [*wanted, 2000 - sum(wanted)]).pvalue > 1e-3


def test_top_p_draws_the_nucleus_alone(policy):
    """The first token of 2,000 samples is one of the likeliest that together reach 0.6, with its
    share of their probability. With a top_p below the likeliest's it is the greedy one."""
    ids = policy.start(PROMPTS[0]).ids
    with torch.inference_mode():
        expected = policy.model(torch.tensor([ids])).logits[0, -1].softmax(-1).tolist()
    nucleus = []
    for token in sorted(range(len(expected)), key=lambda token: -expected[token]):
        nucleus.append(token)
        if sum(expected[token] for token in nucleus) >= 0.6:
            break
    assert 1 < len(nucleus) < len(expected) / 2
    drawn = first_tokens(policy, ids, top_p=0.6)
    assert set(drawn) <= set(nucleus)
    often = [token for token in nucleus if expected[token] > 0.01]
    rest = [
        sum(expected[token] for token in nucleus if token not in often),
        2000 - sum(drawn[token] for token in often),
    ]
    wanted = [expected[token] for token in often] + ([rest[0]] if rest[0] else [])
    scale = 2000 / sum(wanted)
    observed = [drawn[token] for token in often] + ([rest[1]] if rest[0] else [])
    assert chisquare(observed, [share * scale for share in wanted]).pvalue > 1e-3
    narrow = policy.texts(PROMPTS, temperature=1.0, top_p=1e-6, max_new_tokens=10)
    assert narrow == policy.texts(PROMPTS, temperature=0, max_new_tokens=10)


def test_texts_are_the_responses_and_do_not_depend_on_each_other(policy):
    arguments = {"temperature": 1.0, "max_new_tokens": 30, "seed": 3}
    texts = policy.texts(PROMPTS, **arguments)
    responses = [response for (response,) in policy.generate(PROMPTS, **arguments)]
    assert [(split_steps(" ".join(text.split())), ended) for text, ended in texts] == [
        (split_steps(" ".join(response.steps)), response.finished) for response in responses
    ]
    narrow = policy.texts(PROMPTS, top_p=0.7, **arguments)
    alone = [policy.texts([prompt], top_p=0.7, **arguments)[0] for prompt in PROMPTS]
    assert narrow == alone != texts
    with pytest.raises(PromptTooLong, match="512"):
        policy.texts(["apple " * 600])


def test_a_chat_is_the_prompt_in_the_models_template(tiny_model_dir):
    policy = Policy.load(tiny_model_dir)
    policy.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    ids = encode_prompt(policy.tokenizer, "Tell a story", chat=True)
    assert policy.tokenizer.decode(ids) == "[Tell a story]:"
    with_instruction = policy.texts(["Tell a story"], max_new_tokens=5)
    assert policy.texts(["Tell a story"], max_new_tokens=5, chat=True) != with_instruction


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_start_that_all_prompts_share_is_read_once(tiny_model_dir, temperature):
    """The samples are those of every prompt alone, where nothing is shared."""
    policy = Policy.load(tiny_model_dir)
    policy.tokenizer.chat_template = CHATML
    prompts = [*PROMPTS, "Why?", f"{PROMPTS[0]} Say it in words."]
    texts = [encode_prompt(policy.tokenizer, prompt) for prompt in prompts]
    head = shared_prefix(min(texts), max(texts))
    assert head > 40
    read: list[int] = []
    embeddings = policy.model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))
    options = {"n": 3, "temperature": temperature, "max_new_tokens": 30, "seed": 5}
    together = policy.generate(prompts, **options)
    assert read[:2] == [head, len(texts) * (max(map(len, texts)) - head)]
    assert together == [policy.generate([prompt], **options)[0] for prompt in prompts]


def test_a_model_that_thinks_first_is_refused(tiny_model_dir, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = CHATML
    after = format_prompt(PROMPTS[0], tokenizer)
    path = chat_model(tiny_model_dir, tmp_path / "thinks", CHATML, says="<think>", after=after)
    policy = Policy.load(path)
    for sample in (policy.generate, policy.texts):
        with pytest.raises(ModelError, match=r"thinks before it answers \('<think>") as error:
            sample(PROMPTS[:1], max_new_tokens=5)
        assert path in str(error.value)
    forced = CHATML.replace(HEAD, f"{HEAD}<think>\n")
    policy = Policy.load(chat_model(tiny_model_dir, tmp_path / "forced", forced))
    with pytest.raises(ModelError, match="makes the model think before it answers"):
        policy.generate(PROMPTS[:1], max_new_tokens=5)
    policy = Policy.load(chat_model(tiny_model_dir, tmp_path / "off", THINKING))
    tokens = policy.tokenizer.convert_ids_to_tokens(policy.start(PROMPTS[0]).ids)
    assert [token for token in tokens if "think" in token] == ["<think>", "</think>"]
    assert format_prompt(PROMPTS[0], policy.tokenizer).endswith(f"{HEAD}<think>\n\n</think>\n\n")


def test_logps_by_hand(policy):
    rows = [
        (PROMPTS[0], ["Step 1: 3 + 1 = 4"], ["Answer: 4"]),
        (PROMPTS[1], [], ["Step 1: 14 + 3 = 17"]),
    ]
    for row, value in zip(rows, policy.logps(rows), strict=True):
        ids, step_of = encode_steps(policy.tokenizer, *row)
        with torch.inference_mode():
            logps = policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        token_logps = [logps[i - 1, ids[i]].item() for i in range(len(ids)) if step_of[i] >= 0]
        assert value == pytest.approx(sum(token_logps) / len(token_logps), abs=1e-4)


def test_what_cannot_be_done_is_one_line(policy, tmp_path):
    with pytest.raises(PromptTooLong, match="512"):
        policy.generate(["apple " * 600])
    with pytest.raises(ModelError, match="no model can be loaded"):
        Policy.load(str(tmp_path))


def test_missing_or_unfitting_weights_are_no_model(tiny_model_dir, tmp_path):
    """transformers would initialize missing weights at random."""

    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="weights are missing"):
        Policy.load(str(folder))
    shutil.copy(f"{tiny_model_dir}/model.safetensors", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(ModelError, match="no model can be loaded"):
        Policy.load(str(folder))


def test_step_logps_recognize_greedy_steps(mini):
    """A greedy answer is greedy at every step; a step changed by hand is not."""
    prompt = next(iter(problems("validation"))).prompt
    steps = mini.generate([prompt])[0][0].steps
    wrong = [*steps[1:-1], "Answer: 999"]
    first, second = mini.step_logps([(prompt, [], steps), (prompt, steps[:1], wrong)])
    assert [step.greedy for step in first] == [True] * len(steps)
    assert min(step.tokens for step in first) > 1
    assert [step.greedy for step in second] == [True] * (len(steps) - 2) + [False]
    total = sum(step.logp for step in second) / sum(step.tokens for step in second)
    assert mini.logps([(prompt, steps[:1], wrong)]) == [pytest.approx(total)]
