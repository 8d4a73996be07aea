"""search/step_pairs.py: pairs computed by hand from small trees."""

import pytest

from common.errors import RecordError
from search.step_pairs import Continuation, by_answer, by_judge, pair_up, to_judge
from search.tree_search import UNKNOWN, Rollout, Tree, TreeBudget, TreeNode, omegaprm
from tests.test_tree_search import WRONG, drive, is_right, state

A1, A2, A0 = "Answer: 1", "Answer: 2", "Answer: 0"


def rollouts(*texts: str) -> list[Rollout]:
    """`a b Answer:1 right`: the steps and the outcome."""
    found = []
    for text in texts:
        *steps, outcome = text.split()
        steps = tuple(step.replace("Answer:", "Answer: ") for step in steps)
        found.append(Rollout(steps, outcome, 9))
    return found


def tree_of(**nodes: list[Rollout]) -> Tree:
    """root=..., a=..., b=...: the rollouts from the root and from the states of one step."""
    tree = Tree("How many?", "per_step", "budget")
    for name, own in nodes.items():
        steps = () if name == "root" else (name,)
        tree.nodes[steps] = TreeNode(steps, own)
    return tree


@pytest.fixture
def tree() -> Tree:
    """a is right in 3 of 4 rollouts, b in 1 of 4; `b c` is right in its only one."""
    return tree_of(
        root=rollouts("a Answer:1 right", "b Answer:0 wrong", "b c Answer:1 right",
                      "a Answer:2 wrong"),
        a=rollouts("Answer:1 right", "Answer:1 right"),
        b=rollouts("Answer:0 wrong", "Answer:0 wrong"),
    )  # fmt: skip


def pairs(states: dict, min_gap: float, per_state: int | None = None) -> dict:
    """State -> (chosen, its scores, rejected, its scores) of each pair, or why there is none."""
    found = {}
    for steps, continuations in states.items():
        paired, why_not = pair_up(continuations, min_gap, per_state)
        rows = [(c.steps, c.scores, r.steps, r.scores) for c, r in paired]
        found[steps] = rows or why_not
    return found


def test_next_steps(tree):
    assert pairs(by_answer(tree, "step", 2), 0.5) == {
        (): [(("a",), (0.75,), ("b",), (0.25,))],
        # a step that states the answer needs one rollout
        ("a",): [((A1,), (1.0,), (A2,), (0.0,))],
        ("b",): "too few rollouts",
        ("b", "c"): "one next step only",
    }
    assert pairs(by_answer(tree, "step", 1), 0.6) == {
        (): "gap too small",
        ("a",): [((A1,), (1.0,), (A2,), (0.0,))],
        ("b",): [(("c",), (1.0,), (A0,), (0.0,))],
        ("b", "c"): "one next step only",
    }


def test_the_rest_of_a_right_rollout_against_that_of_a_wrong_one(tree):
    assert pairs(by_answer(tree, "rest", 1), 0.5) == {
        (): [(("a", A1), (0.75, 1.0), ("b", A0), (0.25, 0.0))],
        ("a",): [((A1,), (1.0,), (A2,), (0.0,))],
        ("b",): [(("c", A1), (1.0, 1.0), (A0,), (0.0,))],
        ("b", "c"): "one next step only",
    }


def test_a_right_rest_may_begin_in_a_later_state():
    """No rollout from the root is right through a; those from a are."""
    tree = tree_of(
        root=rollouts("a Answer:2 wrong", "b Answer:0 wrong", "b Answer:1 right"),
        a=rollouts("c Answer:1 right", "c Answer:1 right", "c Answer:1 right"),
        b=rollouts("Answer:0 wrong", "Answer:0 wrong"),
    )
    rest = pairs(by_answer(tree, "rest", 2), 0.5)[()]
    assert rest == [(("a", "c", A1), (0.75, 1.0, 1.0), ("b", A0), (0.25, 0.0))]


def test_only_what_the_policy_ended_with_an_answer_is_a_rest():
    """A rollout that was cut, and one that ended without an answer, are no rest of a solution."""
    tree = tree_of(root=rollouts("a Answer:1 right", "b d cut", "b e wrong", "f Answer:0 wrong"))
    rest = pairs(by_answer(tree, "rest", 1), 0.5)[()]
    assert rest == [(("a", A1), (1.0, 1.0), ("f", A0), (0.0, 0.0))]
    step = pairs(by_answer(tree, "step", 1), 0.5)[()]
    assert [rejected for _, _, rejected, _ in step] == [("b",), ("f",)]


def test_equal_values_and_wordings_make_no_pair():
    tree = tree_of(root=rollouts("a Answer:1 right", "b Answer:1 right", "a Answer:1 right"))
    assert pairs(by_answer(tree, "step", 1), 0.5) == {
        (): "no worse sibling",
        ("a",): "one next step only",
        ("b",): "one next step only",
    }
    # the rollouts end differently, but they leave the state by the same step
    tree = tree_of(root=rollouts("a b Answer:1 right", "a c Answer:0 wrong"))
    assert pairs(by_answer(tree, "rest", 1), 0.5)[()] == "one next step only"


def side(name: str, value: float, rollouts: int = 4) -> Continuation:
    return Continuation((name,), (value,), value, rollouts)


def names(found: list) -> list[str]:
    return [chosen.steps[0] + rejected.steps[0] for chosen, rejected in found]


def test_the_widest_gaps_first_and_each_rejected_step_once_before_any_twice():
    sides = [side("A", 1.0), side("B", 0.9), side("x", 0.0), side("y", 0.2), side("z", 0.45)]
    assert names(pair_up(sides, 0.5)[0]) == ["Ax", "Ay", "Az", "Bx", "By"]
    assert names(pair_up(sides, 0.5, per_state=2)[0]) == ["Ax", "Ay"]
    # of equal gaps that with more rollouts behind the weaker side
    sides = [side("A", 1.0, 8), side("x", 0.0, 2), side("y", 0.0, 5), side("z", 0.0, 3)]
    assert names(pair_up(sides, 1.0)[0]) == ["Ay", "Az", "Ax"]


def test_rounding_does_not_decide():
    assert 0.7 - 0.2 < 0.5
    assert names(pair_up([side("A", 0.7), side("x", 0.2)], 0.5)[0]) == ["Ax"]


def test_the_tree_of_an_omegaprm_search():
    """Its fifth step is the first error: the binary search evaluates the states of 4, 6, 5 steps.

    Before the error two of four rollouts end right, from it on none."""

    def world(steps):
        rest = WRONG[len(steps) :]
        return [("detour", A1)] * 2 + [rest] * 2 if len(steps) < 5 else [rest] * 4

    tree, _ = drive(omegaprm(state(()), is_right, TreeBudget(100, 4)), world, k=4)
    step, rest = (pairs(by_answer(tree, kind, 2), 0.5) for kind in ("step", "rest"))
    with_pairs = [(), WRONG[:4]]
    assert [at for at, found in step.items() if isinstance(found, list)] == with_pairs
    assert step[WRONG[:4]] == [(("detour",), (1.0,), (WRONG[4],), (0.0,))]
    chosen = (("detour", A1), (1.0, 1.0))
    assert rest[WRONG[:4]] == [(*chosen, WRONG[4:], (0.0,) * 4)]
    # the fourth step has a value of its own: 2 of the 2 + 4 rollouts through it
    assert rest[()] == [(*chosen, WRONG, (0.0, 0.0, 0.0, 2 / 6, 0.0, 0.0, 0.0, 0.0))]


# --- by judge


def test_a_judge_orders_and_scores_the_next_steps(tree):
    assert to_judge(tree, "step") == {
        ("a",): 0, ("b",): 0, ("a", A1): 1, ("a", A2): 1, ("b", A0): 1, ("b", "c"): 1
    }  # fmt: skip
    scores = {("a",): [0.2], ("b",): [0.9], ("a", A1): [0.6], ("a", A2): [0.5], ("b", A0): [0.1]}
    assert pairs(by_judge(tree, "step", scores | {("b", "c"): None}), 0.5) == {
        (): [(("b",), (0.9,), ("a",), (0.2,))],
        ("a",): "gap too small",
        ("b",): "one next step only",  # the judge cannot read the other
        ("b", "c"): "one next step only",
    }


def test_a_judge_orders_rests_by_their_mean_score(tree):
    wanted = to_judge(tree, "rest")
    assert wanted == {("a", A1): 0, ("a", A2): 0, ("b", A0): 0, ("b", "c", A1): 0}
    scores = {("a", A1): [0.6, 0.8], ("a", A2): [0.6, 0.1], ("b", A0): [0.1, 0.1]}
    scores[("b", "c", A1)] = [0.1, 0.7, 1.0]
    found = pairs(by_judge(tree, "rest", scores), 0.5)
    assert found[()] == [(("a", A1), (0.6, 0.8), ("b", A0), (0.1, 0.1))]
    assert found[("a",)] == [((A1,), (0.8,), (A2,), (0.1,))]
    assert found[("b",)] == [(("c", A1), (0.7, 1.0), (A0,), (0.1,))]


def test_a_tree_without_answers_is_for_a_judge_only():
    tree = tree_of(root=rollouts(f"a Answer:1 {UNKNOWN}", f"b Answer:0 {UNKNOWN}"))
    with pytest.raises(RecordError, match="searched without answers"):
        by_answer(tree, "step", 1)
    for kind, texts in (("step", [("a",), ("b",)]), ("rest", [("a", A1), ("b", A0)])):
        assert [*to_judge(tree, kind)] == texts
        scores = {steps: [0.9 if "a" in steps else 0.2] * len(steps) for steps in texts}
        ((chosen, rejected),) = pair_up(by_judge(tree, kind, scores)[()], 0.5)[0]
        assert (chosen.steps, rejected.steps) == tuple(texts)
