"""Judges for comparison: exact, outcome, random and shuffled."""

from itertools import chain

import pytest

from common.errors import JudgeError
from reasoning.records import Problem
from reward_model.controls import ExactJudge, OutcomeJudge, RandomJudge, ShuffledJudge
from tests.helpers.judges import FixedJudge

MIA = Problem("Mia has 2 apples.", "10", ["Step 1: 2 + 3 = 5", "Step 2: 5 * 2 = 10", "Answer: 10"])
WRONG = ["Step 1: 2 + 3 = 5", "Step 2: 5 + 2 = 7", "Answer: 10"]


def test_the_exact_judge_grades_and_reads_no_more_problems_than_needed():
    def problems():
        yield MIA
        yield Problem("Ann?", "1")
        raise AssertionError("read too far")

    judge = ExactJudge(problems())
    solutions = [(MIA.prompt, steps) for steps in (MIA.steps, WRONG, [])]
    assert judge.score_steps(solutions) == [[1, 1, 1], [1, 0, 0], []]
    assert judge.score_steps([(MIA.prompt, WRONG)] * 3, skip=[1, 2, 3]) == [[0, 0], [0], []]
    with pytest.raises(JudgeError, match=r"'Ann[?]' ... has no reference steps"):
        judge.score_steps([("Ann?", ["Answer: 1"])])
    reason = r"no reference for the problem 'Bob[?]'.*--judge_problems"
    with pytest.raises(JudgeError, match=reason):
        ExactJudge([MIA]).score_steps([("Bob?", ["Answer: 1"])])


def test_the_outcome_judge_looks_at_the_last_step_alone():
    lucky = ["Step 1: 2 + 3 = 6", "Answer: 10"]
    unanswered = MIA.steps[:2]
    judge = OutcomeJudge([Problem(MIA.prompt, "10")])
    solutions = [(MIA.prompt, steps) for steps in (MIA.steps, lucky, unanswered, ["Answer: 7"])]
    assert judge.score_steps(solutions) == [[1, 1, 1], [1, 1], [0, 0], [0]]
    assert judge.score_steps(solutions[:1], skip=[2]) == [[1]]
    with pytest.raises(JudgeError, match="judge outcome: no reference for the problem 'Bob"):
        judge.score_steps([("Bob?", ["Answer: 1"])])


def test_a_random_score_depends_only_on_seed_prompt_and_steps():
    solutions = [(f"p {k}", [f"{k}.{j}" for j in range(3)]) for k in range(200)]
    scores = RandomJudge(1).score_steps(solutions)
    assert RandomJudge(1).score_steps(solutions[7:8], skip=[1]) == [scores[7][1:]]
    ((first, *_),) = RandomJudge(1).score_steps([("p 7", ["7.0", "another", "7.2"])])
    assert first == scores[7][0] != scores[8][0]
    assert RandomJudge(2).score_steps(solutions) != scores
    drawn = sorted(chain(*scores))
    assert len({*drawn}) > 590 and all(abs(drawn[k] - k / 600) < 0.08 for k in range(600))


def test_the_shuffled_judge_gives_the_same_scores_to_other_steps():
    solutions = [(f"p {k}", [f"{k}.{j}" for j in range(k % 4)]) for k in range(40)]
    solutions.append(("long", ["long"]))
    inner = FixedJudge(lambda prompt, step, previous: None if step == "long" else float(step) / 100)
    scores = inner.score_steps(solutions)
    shuffled = ShuffledJudge(inner, seed=1).score_steps(solutions)
    assert scores[-1] is None and shuffled[-1] is None
    assert [len(found) for found in shuffled[:-1]] == [len(found) for found in scores[:-1]]
    assert sorted(chain(*shuffled[:-1])) == sorted(chain(*scores[:-1])) and shuffled != scores
    again = ShuffledJudge(inner, seed=1)
    again.score_steps(solutions[:5])  # earlier calls do not matter
    assert again.score_steps(solutions) == shuffled
    assert ShuffledJudge(inner, seed=2).score_steps(solutions) != shuffled
    skipped = again.score_steps([("p", ["1", "2", "3"])], skip=[1])[0]
    assert sorted(skipped) == [0.02, 0.03]
