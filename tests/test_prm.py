"""The process reward model: its text, its values against a plain forward pass, what it refuses."""

import copy
import json
import shutil

import pytest
import torch
import transformers as t
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from common.errors import ModelError
from common.files import write_records
from reasoning.records import PreferencePair
from reward_model import evaluate_steps
from reward_model.prm_formats import StepTokens
from reward_model.process_reward_model import ProcessRewardModel, _SolutionText, from_causal_lm
from reward_model.registry import JudgeArgs, check_judge, judge_name, open_judge
from tests.helpers.mains import call_main
from tests.helpers.reward_models import TINY_SHAPE, make_prm
from tests.helpers.solutions import PROMPT, STEPS

SOLUTIONS = [
    (PROMPT, STEPS),
    ("🙂 How many?", ["Step 1: é", "Answer: 3"]),
    (PROMPT, []),
    (PROMPT, [STEPS[0], "Step 2: 12 + 36 = 47", "<next>", "Answer: 47 </s>"]),
    ("Short. <next>", ["Answer: 1"]),
]


@pytest.fixture(scope="module")
def prm_dir(tiny_model_dir, tmp_path_factory) -> str:
    return make_prm(tiny_model_dir, tmp_path_factory.mktemp("prm") / "tiny-prm")


@pytest.fixture(scope="module")
def judge(prm_dir):
    return ProcessRewardModel(prm_dir, device="cpu")


def differences(first: list[list[float]], second: list[list[float]]) -> list[float]:
    both = zip(first, second, strict=True)
    return [abs(a - b) for ours, theirs in both for a, b in zip(ours, theirs, strict=True)]


# --- the text


def test_ids_written_out(judge):
    ((ids, places),) = judge.format.encode([("1 + 1?", ["1 + 1 = 2", "Answer: 2"])])
    # <s> Problem : _ 1 _+ _ 1 ? newline Solution : newline
    context = [1, 419, 284, 353, 275, 371, 353, 275, 289, 13, 421, 284, 13]
    # <next> _ 1 _+ _ 1 _= _ 2 newline
    first = [649, 353, 275, 371, 353, 275, 355, 353, 276, 13]
    # <next> _ Answer : _ 2 newline
    second = [649, 353, 420, 284, 353, 276, 13]
    assert ids == context + first + second
    assert places == [len(context + first) - 1, len(ids) - 1]


def test_what_reads_like_a_control_token_stays_text(judge):
    tokenizer, encoded = judge.format.tokenizer, judge.format.encode(SOLUTIONS)
    for (prompt, steps), (ids, places) in zip(SOLUTIONS, encoded, strict=True):
        assert ids.count(judge.format.tag_id) == len(steps) == len(places)
        assert tokenizer.eos_token_id not in ids
        lines = "".join(f"<next>{step}\n" for step in steps)
        expected = f"<s>Problem: {prompt}\nSolution:\n{lines}"
        assert tokenizer.decode(ids).replace(" ", "") == expected.replace(" ", "")


def test_a_chat_model_reads_its_own_template(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.add_tokens(["<next>"], special_tokens=True)
    chat.chat_template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    ((ids, _),) = StepTokens(chat).encode([("1 + 1?", ["Answer: 2"])])
    text = chat.decode(ids).replace("> ", ">")
    assert text.startswith("[Solve the problem step by step.")
    assert text.endswith("\n\n1 + 1?]><next>Answer: 2\n")


# --- the values


def alone(prm_dir: str, prompt: str, steps: list[str]) -> float:
    """The value of the last step, from a plain forward pass over the whole text."""
    model = AutoModelForTokenClassification.from_pretrained(prm_dir).double()
    tokenizer = AutoTokenizer.from_pretrained(prm_dir)
    text = f"Problem: {prompt}\nSolution:\n" + "".join(f"<next>{step}\n" for step in steps)
    with torch.no_grad():
        logits = model(**tokenizer(text, return_tensors="pt")).logits
    return float(logits[0, -1, 0].sigmoid())


def test_a_value_is_that_of_a_plain_forward_pass(judge, prm_dir):
    (scores,) = judge.score_steps([(PROMPT, STEPS)])
    expected = [alone(prm_dir, PROMPT, STEPS[: k + 1]) for k in range(3)]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert max(scores) - min(scores) > 0.01 and all(score == round(score, 6) for score in scores)


def test_alone_in_a_batch_and_step_by_step_the_values_are_the_same(judge, prm_dir):
    many = [(PROMPT[k:], STEPS[: 1 + k % 3]) for k in range(20)] + SOLUTIONS
    together = judge.score_steps(many)
    one_by_one = [judge.score_steps([solution])[0] for solution in many]
    assert max(differences(together, one_by_one)) < 1e-5
    by_step = [
        [judge.score_steps([(prompt, steps[: k + 1])])[0][k] for k in range(len(steps))]
        for prompt, steps in many
    ]
    assert max(differences(together, by_step)) < 1e-5
    small = ProcessRewardModel(prm_dir, batch_tokens=1, device="cpu")
    assert max(differences(together, small.score_steps(many))) < 1e-5
    assert len({score for scores in together for score in scores}) > 40


def test_all_steps_are_scored_in_one_pass_and_skipped_ones_are_context(judge):
    judge._kept.clear()
    read = []
    handle = judge.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(tuple(args[0].shape)), with_kwargs=True
    )
    whole = judge.score_steps(SOLUTIONS)
    skipped = judge.score_steps(SOLUTIONS, skip=[2, 0, 0, 1, 1])
    assert judge.score_steps(SOLUTIONS[:1], skip=[len(SOLUTIONS[0][1])]) == [[]]
    handle.remove()
    # the first two share a row; what has nothing to be scored is not read
    assert [rows for rows, _ in read] == [3, 2]
    expected = [whole[0][2:], whole[1], [], whole[3][1:], []]
    assert [len(scores) for scores in skipped] == [len(scores) for scores in expected]
    assert max(differences(skipped, expected)) < 1e-5


def test_what_proposals_share_is_read_once(judge, prm_dir):
    """As in a search: several next steps of two prefixes of one problem, and another problem
    between them."""
    next_steps = [f"Step 3: 47 - 5 = {k}" for k in range(40, 46)] + ["Answer: 47", STEPS[1]]
    proposals = [
        (PROMPT, [*prefix, step])
        for prefix in (STEPS[:2], [STEPS[0], "Step 2: 1 + 1 = 2"])
        for step in next_steps
    ]
    proposals.insert(3, ("Short?", ["Answer: 1"]))
    texts = judge.format.encode(proposals)
    judge._kept.clear()
    read = []

    def count(_, args, kwargs):
        read.append(int((kwargs["attention_mask"][:, 0].sum(-1) > 0).sum()))

    handle = judge.model.model.register_forward_pre_hook(count, with_kwargs=True)
    skip = [len(steps) - 1 for _, steps in proposals]
    scores = judge.score_steps(proposals, skip)
    handle.remove()
    assert len(read) == 1 and read[0] < 0.5 * sum(len(ids) for ids, _ in texts)
    expected = [[alone(prm_dir, prompt, steps)] for prompt, steps in proposals]
    assert max(differences(scores, expected)) < 1e-5
    assert len({score for (score,) in scores}) == len(proposals)
    small = ProcessRewardModel(prm_dir, batch_tokens=100, device="cpu")
    assert max(differences(scores, small.score_steps(proposals, skip))) < 1e-5
    wanted = [
        _SolutionText(k, ids, places, 0, None, False) for k, (ids, places) in enumerate(texts)
    ]
    rows = small._rows(wanted)
    assert all(len(row) <= 100 or len(row.reads) == 1 for row in rows)


def rounds() -> list[list[tuple[str, list[str]]]]:
    """The proposals of a search, round by round: next steps of several prefixes of two problems, in
    any order, and answers that nothing follows."""
    first = [
        (prompt, [f"Step 1: {k} + 1 = {k + 1}"])
        for k in (12, 3, 36)
        for prompt in (PROMPT, "Short?")
    ]
    second = [
        (prompt, [*steps, f"Step 2: {k} - 1 = 0"]) for prompt, steps in first[:5] for k in (1, 2)
    ]
    second.append((PROMPT, ["Answer: 5"]))
    ends = ("Answer: 4", "Step 3: 4 * 4 = 16", "Answer: 40")
    third = [(prompt, [*steps, end]) for prompt, steps in second[:8:3] for end in ends]
    fourth = [(prompt, [*steps, "Answer: 16"]) for prompt, steps in third if steps[-1] == ends[1]]
    return [first, second, third, fourth]


@pytest.mark.parametrize("running_min", [False, True])
def test_prefixes_are_not_read_again(prm_dir, tmp_path, monkeypatch, running_min):
    path = changed(prm_dir, tmp_path / "prm", running_min=running_min)
    judge, forgetful = (ProcessRewardModel(path, device="cpu") for _ in range(2))
    read = []
    judge.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(args[0].shape), with_kwargs=True
    )
    for number, proposals in enumerate(rounds()):
        skip = [len(steps) - 1 for _, steps in proposals]
        read.clear()
        scores = judge.score_steps(proposals, skip)
        forgetful._kept.clear()
        assert max(differences(scores, forgetful.score_steps(proposals, skip))) < 1e-5
        assert [len(values) for values in scores] == [1] * len(proposals)
        if number > 1:  # every proposal continues one of the round before
            length = len(judge.format.encode(proposals[:1])[0][0])
            assert max(columns for _, columns in read) < 40 < length
    kept = len(judge._kept)
    judge.score_steps([(PROMPT, ["Step 1: 1 + 1 = 2", "Answer: 2"])])
    assert len(judge._kept) == kept  # the cache of a finished solution is not kept
    monkeypatch.setattr("reward_model.process_reward_model.KEPT_BYTES", 0)
    judge.score_steps(rounds()[0])
    assert not judge._kept


def test_the_least_value_so_far_if_the_config_asks_for_it(judge, prm_dir, tmp_path):
    """With relative labels a solution that lost its value does not get it back, whatever is
    skipped."""
    least = ProcessRewardModel(changed(prm_dir, tmp_path / "least", running_min=True), device="cpu")
    both = zip(judge.score_steps(SOLUTIONS), least.score_steps(SOLUTIONS), strict=True)
    for values, scores in both:
        assert scores == pytest.approx([min(values[: k + 1]) for k in range(len(values))], abs=1e-5)
    skip = [k % 3 for k in range(len(SOLUTIONS))]
    cut = [scores[first:] for scores, first in zip(least.score_steps(SOLUTIONS), skip, strict=True)]
    assert max(differences(least.score_steps(SOLUTIONS, skip), cut)) < 1e-5
    assert least.score_steps(SOLUTIONS) != judge.score_steps(SOLUTIONS)


def test_a_solution_longer_than_the_context_gets_none(judge):
    fits, long = STEPS, STEPS
    while len(judge.format.encode([(PROMPT, long)])[0][0]) <= 512:
        fits, long = long, [*long, "Step 3: 1 + 1 = 2"]
    solutions = [(PROMPT, STEPS), (PROMPT, long), (PROMPT, fits), (PROMPT, long)]
    scores = judge.score_steps(solutions, skip=[0, 0, 1, len(long)])
    assert scores[1] is None and scores[3] == []
    assert len(scores[0]) == 3 and len(scores[2]) == len(fits) - 1


# --- how one is made


def test_a_new_prm_keeps_the_backbone_and_has_a_head_of_zeros(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = torch.tensor([[1, 419, 284, 353]])
    with torch.no_grad():
        hidden, rows = model.model(ids).last_hidden_state, model.model.embed_tokens.weight.clone()
    prm = from_causal_lm(model, tokenizer)
    assert type(prm).__name__ == "LlamaForTokenClassification" and prm.config.step_token == "<next>"
    assert tokenizer.convert_tokens_to_ids("<next>") == len(rows)
    assert prm.config.vocab_size == len(rows) + 1
    assert tokenizer.added_tokens_decoder[len(rows)].special
    with torch.no_grad():
        assert torch.equal(prm.model(ids).last_hidden_state, hidden)
        assert prm(ids).logits.abs().max() == 0
    torch.testing.assert_close(prm.get_input_embeddings().weight[-1], rows.mean(0))
    assert torch.equal(prm.get_input_embeddings().weight[:-1], rows)
    assert prm.dropout.p == 0


def test_a_vocabulary_with_free_rows_is_not_made_smaller(tiny_model_dir):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model.resize_token_embeddings(704, mean_resizing=False)
    known = model.get_input_embeddings().weight[:649].clone()
    weight = from_causal_lm(model, tokenizer).get_input_embeddings().weight
    assert weight.shape[0] == 704
    torch.testing.assert_close(weight[649], known.mean(0))


def backbones() -> dict:
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3}
    return {
        "qwen2, tied": t.Qwen2Config(**TINY_SHAPE, tie_word_embeddings=True),
        "mistral, window of 60": t.MistralConfig(**TINY_SHAPE, sliding_window=60),
        "gpt2": t.GPT2Config(**gpt2),
    }


@pytest.mark.parametrize("name", backbones())
def test_any_causal_lm_is_a_backbone(name, tokenizer, tmp_path):
    config = backbones()[name]
    config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    judge = ProcessRewardModel(make_prm(tmp_path / "lm", tmp_path / "prm"), device="cpu")
    together = judge.score_steps(SOLUTIONS)
    expected = [alone(judge.path, PROMPT, STEPS[: k + 1]) for k in range(3)]
    assert together[0] == pytest.approx(expected, abs=1e-5)
    one_by_one = [judge.score_steps([solution])[0] for solution in SOLUTIONS]
    assert max(differences(together, one_by_one)) < 1e-5
    # 10 steps, two of them the same first step
    assert len({score for scores in together for score in scores}) == 9


# --- what cannot be used or scored


def changed(prm_dir: str, folder, **changes) -> str:
    """A copy of the PRM with other values in config.json; None removes a key."""
    shutil.copytree(prm_dir, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_what_cannot_be_used_is_an_error_of_one_line(prm_dir, tiny_model_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    bare = changed(prm_dir, tmp_path / "bare", step_token=None)
    unknown = changed(prm_dir, tmp_path / "unknown", step_token="<step>")
    two_labels = changed(prm_dir, tmp_path / "two", id2label={"0": "a", "1": "b"})
    headless = changed(tiny_model_dir, tmp_path / "headless", step_token="</s>")
    cases = {
        str(tmp_path / "empty"): "no config.json",
        str(tmp_path / "nowhere"): "cannot be loaded",
        tiny_model_dir: r"names no step_token.*train.py prm --model_name_or_path",
        bare: "names no step_token",
        unknown: "does not know .<step>. as one token",
        two_labels: "cannot be loaded",
        headless: "weights are missing, for example score",
    }
    for path, reason in cases.items():
        with pytest.raises(ModelError, match=reason) as error:
            ProcessRewardModel(path, device="cpu")
        assert path in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ModelError, match="at least 1"):
        ProcessRewardModel(prm_dir, batch_tokens=0)


def test_what_cannot_be_scored_is_named(judge, prm_dir):
    solutions = [(PROMPT, STEPS), (PROMPT, [*STEPS[:2], "\udcff"]), (PROMPT, STEPS)]
    whole, half, again = judge.score_steps(solutions, skip=[0, 2, 0])
    assert half is None and whole == again and len(whole) == 3
    with ProcessRewardModel(prm_dir, device="cpu") as broken:
        broken.model.model.norm.weight.data[:] = float("nan")
        place = r"not finite at step 2 'Step 2: 12 \+ 36 = 48' of prompt 'Mia has"
        with pytest.raises(ModelError, match=place):
            broken.score_steps([(PROMPT, STEPS)], skip=[1])
    # scripts print the judge after they have closed it
    assert "context 512, on cpu" in str(broken)


# --- the flag


def test_evaluate_steps_uses_it(prm_dir, judge, tmp_path, monkeypatch, capsys):
    rejected = ["Step 2: 12 + 36 = 47", "Answer: 47"]
    pair = PreferencePair(PROMPT, STEPS[1:], rejected, prefix=STEPS[:1])
    write_records(tmp_path / "pairs.jsonl", [pair])
    files = ["--input", tmp_path / "pairs.jsonl", "--output", tmp_path / "scored.jsonl"]
    options = ["--judge", "prm", "--judge_path", prm_dir, *files]
    call = call_main(evaluate_steps.main, *options, monkeypatch=monkeypatch, capsys=capsys)
    assert call[0] == 0, call
    row = json.loads((tmp_path / "scored.jsonl").read_text())
    (chosen,) = judge.score_steps([(PROMPT, STEPS)])
    assert row["chosen_scores"] == pytest.approx(chosen[1:], abs=1e-5)
    assert len(row["rejected_scores"]) == 2


def test_without_a_path_it_is_the_embedded_one(tmp_path):
    args = JudgeArgs(judge="prm", judge_path=str(tmp_path / "prm-mini"))
    assert judge_name(args) == "prm-mini"
    assert judge_name(JudgeArgs(judge="prm", judge_path="org/shepherd")) == "prm-shepherd"
    default = JudgeArgs(judge="prm")
    check_judge(default)
    assert default.judge_path.endswith("models/prm-mini")
    prompt = (
        "Ben has 48 pens. He gives away 12 pens. The pens become 2 times as many. "
        "How many pens does Ben have now?"
    )
    right = ["Step 1: 48 - 12 = 36", "Step 2: 36 * 2 = 72", "Answer: 72"]
    wrong = ["Step 1: 48 - 12 = 36", "Step 2: 36 + 2 = 38", "Answer: 38"]
    with open_judge(default) as judge:
        good, bad = judge.score_steps([(prompt, right), (prompt, wrong)])
    assert min(good) > 0.5 > bad[1] and bad[2] <= bad[1]
    assert good[0] == pytest.approx(bad[0], abs=1e-5)
