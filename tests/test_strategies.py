"""Guided search: what each strategy selects with known scores; a prompt has the same answer alone.

The last test runs all strategies on policy-mini and judge-mini.
"""

import inspect
import itertools
from pathlib import Path

import pytest

from common.errors import UserError
from lm.policy import Policy, State
from reasoning.problems import problems
from search.candidates import AT_ONCE, Candidate, SearchBudget, SearchResult
from search.strategies import STRATEGIES, beam, draw, mcts, pick_majority, pick_weighted, votes
from tests.helpers.judges import FixedJudge

ROOT = Path(__file__).parents[1]
STEPWISE = ("step_greedy", "beam", "dvts", "mcts")


class TablePolicy:
    """A policy with a table: prefix -> next steps, in the order of the samples.

    A step that ends with `!` is followed by EOS, a step that ends with `~` is cut, and `<eos>` is
    EOS without a step. `calls` are the calls."""

    def __init__(self, table: dict[tuple[str, ...], list[str]]):
        self.table, self.calls = table, []

    def start(self, prompt):
        return State(prompt, (), ())

    def next_steps(self, states, n, temperature, max_new_tokens, seed):
        self.calls.append((len(states), n, seed))
        return [
            [self._child(state, (self.table[state.steps] * n)[k]) for k in range(n)]
            for state in states
        ]

    def rollouts(self, states, n, temperature, max_new_tokens, seed):
        self.calls.append((len(states), n, seed))
        return [[self._whole(state, k) for k in range(n)] for state in states]

    def _child(self, state, step):
        assert state.status == "open", "only open states are continued"
        status = {"!": "finished", "~": "cut"}.get(step[-1:], "open")
        if step == "<eos>":
            return State(state.prompt, (), (), state.steps, "finished", 1)
        return State(state.prompt, (), (), (*state.steps, step.rstrip("!~")), status, 10)

    def _whole(self, state, k):
        sampled = 0
        while state.status == "open":
            options = self.table[state.steps]
            state = self._child(state, options[k % len(options)])
            sampled += state.sampled
        return State(state.prompt, (), (), state.steps, state.status, sampled)


def judge_by(scores: dict[str, float], asked: list | None = None) -> FixedJudge:
    """Scores by the text of a step, 0.5 for other steps. Each call is appended to `asked`."""
    judge = FixedJudge(lambda prompt, step, previous: scores.get(step, 0.5))
    score_steps = judge.score_steps

    def record(solutions, skip=None):
        if asked is not None:
            asked.append((solutions, skip))
        return score_steps(solutions, skip)

    judge.score_steps = record
    return judge


# "a" is the best first step, but "b" leads to better answers.
GARDEN = {
    (): ["a", "b", "c"],
    ("a",): ["a1", "a2", "a1"],
    ("b",): ["b1", "b2", "b1"],
    ("c",): ["c1", "c1", "c1"],
    ("a", "a1"): ["Answer: 1!"],
    ("a", "a2"): ["Answer: 2!"],
    ("b", "b1"): ["Answer: 3!"],
    ("b", "b2"): ["Answer: 4!"],
    ("c", "c1"): ["Answer: 1!"],
}
SCORES = {"a": 0.9, "b": 0.8, "c": 0.1, "a1": 0.3, "a2": 0.2, "b1": 0.7, "b2": 0.75, "c1": 0.1}
SCORES |= {"Answer: 1": 0.6, "Answer: 2": 0.6, "Answer: 3": 0.5, "Answer: 4": 0.6}


def run(name: str, table=None, scores=None, seed: int = 0, **budget) -> SearchResult:
    policy = TablePolicy(GARDEN if table is None else table)
    (answer,) = STRATEGIES[name](
        ["p"], policy, judge_by(SCORES if scores is None else scores), SearchBudget(**budget), seed
    )
    return answer


def test_all_strategies_have_one_signature_and_see_no_reference():
    parameters = ["prompts", "policy", "judge", "budget", "seed"]
    for strategy in STRATEGIES.values():
        assert list(inspect.signature(strategy).parameters) == parameters


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("greedy", ["a", "a1", "Answer: 1"]),
        ("majority_vote", ["a", "a1", "Answer: 1"]),
        ("best_of_n", ["b", "b2", "Answer: 4"]),
        ("step_greedy", ["a", "a1", "Answer: 1"]),
        ("beam", ["b", "b2", "Answer: 4"]),
        ("mcts", ["b", "b2", "Answer: 4"]),
    ],
)
def test_what_each_picks(name, steps):
    answer = run(name, n=3, beams=2)
    assert answer.steps == steps and answer.finished
    assert answer.scores == [SCORES[step] for step in steps]
    if name == "beam":  # round 1: one state; rounds 2 and 3: two
        assert (answer.proposals, answer.tokens) == (3 + 6 + 6, 150)
        assert [len(candidates) for candidates in answer.rounds] == [3, 4, 2]
        kept = [[c.state.steps[-1] for c, is_kept in cs if is_kept] for cs in answer.rounds]
        assert kept == [["a", "b"], ["b1", "b2"], ["Answer: 4", "Answer: 3"]]


def test_one_beam_is_step_greedy_and_one_walk_as_well():
    for n in (1, 3):
        plain = run("step_greedy", n=n, beams=4)
        assert all(
            run(name, n=n, beams=1).steps == plain.steps for name in ("beam", "dvts", "mcts")
        )


def test_aggregates_change_what_is_picked():
    """Four whole solutions, each the best by one aggregate; then two first steps of a beam."""
    table = {
        (): ["a", "b", "c", "d"],
        ("a",): ["a1"],
        ("b",): ["b1"],
        ("c",): ["c1"],
        ("d",): ["d1"],
    }
    table |= {
        ("a", "a1"): ["Answer: 1!"],
        ("b", "b1"): ["Answer: 2!"],
        ("c", "c1"): ["Answer: 3!"],
        ("d", "d1"): ["d2"],
    }
    table |= {("d", "d1", "d2"): ["Answer: 4!"]}
    scores = {"a": 1.0, "a1": 0.3, "Answer: 1": 1.0}  # mean .767, min .3, prod .3, last 1
    scores |= {"b": 0.65, "b1": 0.7, "Answer: 2": 0.7}  # mean .683, min .65, prod .319, last .7
    scores |= {"c": 0.6, "c1": 0.95, "Answer: 3": 0.8}  # mean .783, min .6, prod .456, last .8
    # mean .8, min .5, prod .365, last .5
    scores |= {"d": 0.9, "d1": 0.9, "d2": 0.9, "Answer: 4": 0.5}
    picked = {
        how: run("best_of_n", table, scores, n=4, aggregate=how).steps[-1]
        for how in ("mean", "min", "prod", "last")
    }
    assert picked == {
        "mean": "Answer: 4",
        "min": "Answer: 2",
        "prod": "Answer: 3",
        "last": "Answer: 1",
    }
    table = {
        (): ["a", "b"],
        ("a",): ["x", "y"],
        ("a", "x"): ["Answer: 1!"],
        ("a", "y"): ["Answer: 2!"],
    }
    table |= {("b",): ["z"], ("b", "z"): ["Answer: 3!"]}
    scores = {
        "a": 0.2,
        "b": 0.5,
        "x": 0.9,
        "y": 0.1,
        "z": 0.4,
        "Answer: 1": 0.9,
        "Answer: 2": 0.9,
        "Answer: 3": 0.6,
    }
    ends = {
        how: run("beam", table, scores, n=2, beams=2, aggregate=how).steps[-1]
        for how in ("mean", "min", "prod", "last")
    }
    assert ends == {
        "mean": "Answer: 1",
        "min": "Answer: 3",
        "prod": "Answer: 1",
        "last": "Answer: 1",
    }


@pytest.mark.parametrize("name", STEPWISE)
def test_where_the_judge_sees_no_difference_the_policy_decides(name):
    table = {
        (): ["odd", "usual", "usual", "usual"],
        ("odd",): ["Answer: 1!"],
        ("usual",): ["Answer: 2!"],
    }
    nearly = {"odd": 0.96, "usual": 0.955, "Answer: 1": 0.97, "Answer: 2": 0.97}
    assert run(name, table, nearly, n=4, beams=1).steps == ["usual", "Answer: 2"]
    assert run(name, table, nearly | {"usual": 0.8}, n=4, beams=1).steps == ["odd", "Answer: 1"]
    assert run("best_of_n", table, nearly, n=4).steps == ["odd", "Answer: 1"], (
        "best_of_n takes the best score"
    )


def test_weighted_vote_adds_scores_and_majority_vote_counts_samples():
    table = {(): ["Answer: 1!", "Answer: 1.0!", "Answer: 2!", "x!", "Answer: 7~"]}
    scores = {"Answer: 1": 0.3, "Answer: 1.0": 0.35, "Answer: 2": 0.7, "x": 0.99, "Answer: 7": 0.99}
    assert run("majority_vote", table, scores, n=5).steps == ["Answer: 1"]
    assert run("weighted_vote", table, scores, n=5).steps == ["Answer: 2"]
    assert run("best_of_n", table, scores, n=5).steps == ["Answer: 2"], (
        "samples without an answer or cut do not count"
    )
    assert run("weighted_vote", table, scores | {"Answer: 1": 0.4}, n=5).steps == ["Answer: 1"], (
        "the better scored of the two is .4"
    )
    _, (pool,) = draw(["p"], TablePolicy(table), judge_by(scores), SearchBudget(n=5), 0)
    assert votes(pool) == [0, 0, 2, -1, -1]
    assert pick_majority(pool[2:4], "min") is pool[2] and pick_majority(pool[3:], "min") is pool[3]
    assert pick_weighted(pool[3:], "min").state.steps == ("x",)


def test_all_advance_together_and_equal_proposals_are_scored_once():
    asked = []
    policy = TablePolicy(GARDEN)
    answers = beam(["p", "q"], policy, judge_by(SCORES, asked), SearchBudget(n=3, beams=2), 0)
    assert [states for states, _, _ in policy.calls] == [2, 4, 4] and len(asked) == 3
    for solutions, skips in asked:
        assert len({(prompt, tuple(steps)) for prompt, steps in solutions}) == len(solutions)
        assert skips == [len(steps) - 1 for _, steps in solutions], (
            "the judge scores only the new step"
        )
    assert [answer.judged for answer in answers] == [3 + 4 + 2] * 2
    assert [(c.state.steps[-1], c.count) for c, _ in answers[0].rounds[1]] == [
        ("a1", 2),
        ("a2", 1),
        ("b1", 2),
        ("b2", 1),
    ]


def test_trees_that_meet_have_samples_of_their_own():
    policy = TablePolicy(GARDEN)
    (answer,) = STRATEGIES["dvts"](["p"], policy, judge_by(SCORES), SearchBudget(n=3, beams=3), 5)
    # this policy repeats itself: the trees stay together
    assert answer.proposals == 27 and policy.calls == [(1, 9, 5)] * 3
    policy = TablePolicy(GARDEN | {(): [*"aaabbbccc"]})
    (answer,) = STRATEGIES["dvts"](["p"], policy, judge_by(SCORES), SearchBudget(n=3, beams=3), 5)
    assert [c.state.steps for c, is_kept in answer.rounds[0] if is_kept] == [("a",), ("b",), ("c",)]
    assert policy.calls == [(1, 9, 5)] + [(3, 3, 5)] * 2 and answer.steps == [
        "b",
        "b2",
        "Answer: 4",
    ]


NOTES = {  # proposal -> its note
    "x~": "cut: too long",
    "x!": "ends without an answer",
    "<eos>": "ends without an answer",
    "a": "repeats an earlier step",
    "long": "longer than the judge's context",
}


@pytest.mark.parametrize(("bad", "note"), NOTES.items())
@pytest.mark.parametrize("name", STEPWISE)
def test_a_bad_proposal_is_explained_and_taken_only_if_there_is_nothing_else(name, bad, note):
    scores = {"x": 1.0, "a": 1.0, "Answer: 1": 0.1, "long": None}
    table = {
        (): ["a"],
        ("a",): [bad, "Answer: 1!"],
        ("a", "a"): ["Answer: 2!"],
        ("a", "long"): ["Answer: 2!"],
    }
    answer = run(name, table, scores, n=2, beams=1)
    assert answer.steps == ["a", "Answer: 1"] and answer.finished and answer.scores == [1.0, 0.1]
    assert note in [candidate.note for candidate, _ in answer.rounds[1]]
    assert answer.left_out == (bad == "long")
    nothing_else = run(name, table | {("a",): [bad]}, scores, n=2, beams=1)
    if bad in ("a", "long"):
        assert nothing_else.steps == ["a", bad, "Answer: 2"]
        assert nothing_else.scores == ([1.0, 0.0, 0.5] if bad == "a" else None), (
            "a repeated step scores 0"
        )
        assert nothing_else.left_out == (4 if bad == "long" else 0)
    else:
        assert nothing_else.steps == (["a"] if bad == "<eos>" else ["a", "x"])
        assert nothing_else.finished == (bad != "x~")


def test_a_search_ends_at_its_limits():
    table = {tuple(f"s{j}" for j in range(k)): [f"s{k}"] for k in range(50)}
    for name in STEPWISE:
        answer = run(name, table, n=2, beams=2, max_steps=4)
        assert answer.steps == ["s0", "s1", "s2", "s3"] and not answer.finished
        answer = run(name, table, n=2, beams=2, max_new_tokens=30)
        assert (
            len(answer.steps) == 3
            and not answer.finished
            and answer.rounds[-1][0][0].note == "cut: too long"
        )
    done = {(): ["a"], ("a",): ["Answer: 1"]}  # no EOS, but the answer is stated
    assert all(run(name, done).finished for name in STEPWISE)


def test_without_a_judge_samples_agree():
    table = {
        (): ["a", "b", "b", "b"],
        ("a",): ["Answer: 1!"],
        ("b",): ["Answer: 2!", "Answer: 3!", "Answer: 2!", "Answer: 2!"],
    }
    for name in STRATEGIES:
        (answer,) = STRATEGIES[name](
            ["p"], TablePolicy(table), None, SearchBudget(n=4, beams=1, aggregate="prod"), 0
        )
        if name in ("greedy", "majority_vote"):
            assert answer.scores is None and answer.judged == 0
        else:
            # of the three samples of the pool that begin with b, two end with 2
            wanted = [0.75, 0.75] if name in STEPWISE else [0.75, 2 / 3]
            assert answer.steps == ["b", "Answer: 2"] and answer.scores == pytest.approx(wanted), (
                name
            )


def test_majority_asks_the_judge_about_its_answer_alone():
    asked = []
    (answer,) = STRATEGIES["majority_vote"](
        ["p"], TablePolicy(GARDEN), judge_by(SCORES, asked), SearchBudget(n=6), 0
    )
    assert (
        asked == [([("p", answer.steps)], [0])]
        and answer.scores == [0.9, 0.3, 0.6]
        and answer.judged == 3
    )
    assert sum(candidate.count for candidate, _ in answer.rounds[0]) == 6


def test_mcts_goes_where_the_value_was_better():
    """The first walk starts with the better step and ends badly; the second avoids that step."""
    (answer,) = mcts(["p"], TablePolicy(GARDEN), judge_by(SCORES), SearchBudget(n=3, beams=2), 0)
    kept = [
        next(c.state.steps[-1] for c, is_kept in candidates if is_kept)
        for candidates in answer.rounds
    ]
    assert kept == ["a", "a1", "Answer: 1", "b2", "Answer: 4"], "the root is expanded once"


@pytest.mark.parametrize(
    "wrong",
    [{"n": 0}, {"beams": 0}, {"max_steps": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}],
)
def test_a_budget_of_nothing_is_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"argument --{name}: expected"):
        SearchBudget(**wrong)
    with pytest.raises(ValueError, match="--aggregate: expected one of"):
        SearchBudget(aggregate="max")


def test_a_large_n_is_sampled_in_parts_and_a_lack_of_memory_is_one_line():
    policy = TablePolicy({(): ["Answer: 1!"]})
    (answer,) = STRATEGIES["majority_vote"](["p"], policy, None, SearchBudget(n=AT_ONCE * 2 + 3), 0)
    assert answer.proposals == AT_ONCE * 2 + 3 and [n for _, n, _ in policy.calls] == [
        AT_ONCE,
        AT_ONCE,
        3,
    ]
    assert len({seed for _, _, seed in policy.calls}) == 3
    policy.rollouts = lambda *rest: (_ for _ in ()).throw(
        RuntimeError("DefaultCPUAllocator: can't allocate memory")
    )
    with pytest.raises(
        UserError, match="16 samples of each of 1 prefixes do not fit into memory: lower --n"
    ):
        STRATEGIES["best_of_n"](["p"], policy, None, SearchBudget(), 0)
    policy.rollouts = lambda *rest: (_ for _ in ()).throw(RuntimeError("a fault of another kind"))
    with pytest.raises(RuntimeError, match="another kind"):
        STRATEGIES["best_of_n"](["p"], policy, None, SearchBudget(), 0)


def test_the_value_of_what_has_no_score():
    state = State("p", (), ())
    assert Candidate(state, None).value("mean") == -1 and Candidate(state, []).value("prod") == 0


# --- on policy-mini ---


@pytest.fixture(scope="module")
def policy():
    return Policy.load(str(ROOT / "models/policy-mini"))


@pytest.fixture(scope="module")
def judge():
    from reward_model.judges.hf import HFJudge

    with HFJudge(ROOT / "models/judge-mini") as judge:
        yield judge


@pytest.mark.process
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_problem_alone_and_in_company_has_the_same_answer(name, policy, judge):
    prompts = [problem.prompt for problem in itertools.islice(problems("validation"), 3)]
    budget = SearchBudget(n=3, beams=2, aggregate="prod")
    together = STRATEGIES[name](prompts, policy, judge, budget, 7)
    (alone,) = STRATEGIES[name](prompts[1:2], policy, judge, budget, 7)
    other = together[1]
    assert (alone.steps, alone.tokens, alone.judged) == (other.steps, other.tokens, other.judged)
    assert alone.scores == pytest.approx(other.scores, abs=1e-5) and len(alone.scores) == len(
        alone.steps
    )
    assert all(answer.finished and answer.seconds > 0 for answer in together)
    assert len({tuple(answer.steps) for answer in together}) == 3
