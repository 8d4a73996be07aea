"""Best of n by a response reward model: in the search, and as --scorer of inference.py."""

import sys

import pytest

import inference
from common.files import read_rows, write_records
from lm.policy import Policy
from reward_model.protocols import ResponseScorer
from reward_model.response_reward_model import ResponseRewardModel
from search.candidates import SearchBudget
from search.strategies import STRATEGIES
from tests.helpers.reward_models import make_llama

PROMPTS = ["Mia has 12 apples. She buys 3 more.", "1 + 1?"]


class ByLength(ResponseScorer):
    """A longer answer has a higher score; scores are below 0 and above 1, as rewards are."""

    def __init__(self):
        self.asked = []

    def score(self, pairs):
        self.asked += pairs
        return [len(response) - 40.0 for _, response in pairs]


def test_the_answer_with_the_highest_score_wins(tiny_model_dir):
    policy, scorer = Policy.load(tiny_model_dir), ByLength()
    budget = SearchBudget(n=6, max_new_tokens=12)
    answers = STRATEGIES["best_of_n"](PROMPTS, policy, scorer, budget, 0)
    for answer in answers:
        (candidates,) = answer.rounds
        found = [candidate for candidate, _ in candidates]
        scores = [candidate.scores for candidate in found]
        assert scores == [[len("\n".join(candidate.state.steps)) - 40.0] for candidate in found]
        finished = [candidate for candidate in found if not candidate.note] or found
        assert answer.scores[0] == max(candidate.scores[0] for candidate in finished)
        assert len({*scores[0]} | {s for (s,) in scores}) > 1
    assert len(scorer.asked) == len(set(scorer.asked))  # the same text is asked once


def run_here(monkeypatch, *args: object) -> None:
    monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, args)])
    inference.main()


def test_inference_with_a_scorer(tiny_model_dir, tmp_path, monkeypatch, capsys):
    scorer = make_llama(tiny_model_dir, tmp_path / "scorer")
    options = ["--model_name_or_path", tiny_model_dir, "--search", "best_of_n"]
    options += ["--n", 4, "--max_new_tokens", 12, "--scorer", scorer, "--show_scores"]
    run_here(monkeypatch, *options, "--prompt", PROMPTS[0])
    said = capsys.readouterr()
    assert "by the scorer" in said.out and "score " in said.err
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / "in.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    run_here(monkeypatch, *options, "--input", "in.jsonl", "--output", "out.jsonl")
    rows = [row for _, row in read_rows(tmp_path / "out.jsonl")]
    answers = [(row["prompt"], "\n".join(row["steps"])) for row in rows]
    scores = ResponseRewardModel(scorer, device="cpu").score(answers)
    assert [row["score"] for row in rows] == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [[], ["--search", "beam"], ["--search", "best_of_n", "--judge", "random"]],
    ids=["no search", "beam", "judge"],
)
def test_a_scorer_goes_with_best_of_n_alone(monkeypatch, capsys, options):
    with pytest.raises(SystemExit) as stopped:
        run_here(monkeypatch, "--prompt", "1 + 1?", "--scorer", "models/reward-mini", *options)
    assert stopped.value.code == 2 and "argument --scorer" in capsys.readouterr().err
