"""The exact, the random and the shuffled judge."""

from itertools import chain

import pytest

from common.errors import JudgeError
from reasoning.records import Problem
from reward_model.controls import ExactJudge, RandomJudge, ShuffledJudge
from tests.helpers.judges import FixedJudge

MIA = Problem("Mia has 2 apples.", "10", ["Step 1: 2 + 3 = 5", "Step 2: 5 * 2 = 10", "Answer: 10"])
WRONG = ["Step 1: 2 + 3 = 5", "Step 2: 5 + 2 = 7", "Answer: 10"]


def test_the_exact_judge_grades_and_reads_no_further_than_it_must():
    def problems():
        yield MIA
        yield Problem("Ann?", "1")
        raise AssertionError("read too far")

    judge = ExactJudge(problems())
    assert judge.score_steps([(MIA.prompt, MIA.steps), (MIA.prompt, WRONG), (MIA.prompt, [])]) == [
        [1, 1, 1],
        [1, 0, 0],
        [],
    ]
    assert judge.score_steps([(MIA.prompt, WRONG)] * 3, skip=[1, 2, 3]) == [[0, 0], [0], []]
    with pytest.raises(JudgeError, match=r"'Ann[?]' ... has no reference steps"):
        judge.score_steps([("Ann?", ["Answer: 1"])])
    with pytest.raises(
        JudgeError, match=r"no reference for the problem 'Bob[?]'.*--judge_problems"
    ):
        ExactJudge([MIA]).score_steps([("Bob?", ["Answer: 1"])])


def test_the_random_judge_scores_a_step_alike_whatever_else_it_is_asked():
    solutions = [(f"p {k}", [f"{k}.{j}" for j in range(3)]) for k in range(200)]
    scores = RandomJudge(1).score_steps(solutions)
    assert RandomJudge(1).score_steps(solutions[7:8], skip=[1]) == [scores[7][1:]]
    assert (
        RandomJudge(1).score_steps([("p 7", ["7.0", "another", "7.2"])])[0][0]
        == scores[7][0]
        != scores[8][0]
    )
    assert RandomJudge(2).score_steps(solutions) != scores
    drawn = sorted(chain(*scores))
    assert len({*drawn}) > 590 and all(abs(drawn[k] - k / 600) < 0.08 for k in range(600))


def test_the_shuffled_judge_gives_the_same_scores_elsewhere():
    solutions = [(f"p {k}", [f"{k}.{j}" for j in range(k % 4)]) for k in range(40)] + [
        ("long", ["long"])
    ]
    inner = FixedJudge(lambda prompt, step, previous: None if step == "long" else float(step) / 100)
    scores = inner.score_steps(solutions)
    shuffled = ShuffledJudge(inner, seed=1).score_steps(solutions)
    assert [of and len(of) for of in shuffled] == [of and len(of) for of in scores] and shuffled[
        -1
    ] is None
    assert sorted(chain(*shuffled[:-1])) == sorted(chain(*scores[:-1])) and shuffled != scores
    again = ShuffledJudge(inner, seed=1)
    again.score_steps(solutions[:5])  # what was scored before does not matter
    assert (
        again.score_steps(solutions)
        == shuffled
        != ShuffledJudge(inner, seed=2).score_steps(solutions)
    )
    skipped = again.score_steps([("p", ["1", "2", "3"])], skip=[1])[0]
    assert sorted(skipped) == [0.02, 0.03]
