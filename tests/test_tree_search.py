"""The searches against values computed by hand, in small worlds that define every rollout."""

import json

import pytest

from common.errors import RecordError
from common.files import read_records, write_records
from lm.policy import State
from reasoning.records import StepValue
from search.tree_search import (
    SEARCHES,
    UNKNOWN,
    Rollout,
    Tree,
    TreeBudget,
    TreeNode,
    omegaprm,
    per_step,
    run_searches,
    selection_score,
)

PROMPT_TOKENS, STEP_TOKENS = 5, 10


def state(steps: tuple[str, ...], status: str = "open", sampled: int = 0) -> State:
    """A state with the right number of token ids; a search does not use their values."""
    ends = tuple(PROMPT_TOKENS + STEP_TOKENS * k for k in range(len(steps) + 1))
    return State("How many?", tuple(range(ends[-1])), ends, steps, status, sampled)


def is_right(steps: tuple[str, ...]) -> bool:
    return steps[-1] == "Answer: 1"


def drive(search, world, k: int) -> tuple[Tree, list[tuple[str, ...]]]:
    """(tree, the states that the search requested).

    world(steps): the steps of the k rollouts from a state; one that ends with `...` is cut."""
    asked, request = [], next(search)
    try:
        while True:
            at, n = request
            asked.append(at.steps)
            further = world(at.steps)
            assert (
                n == k == len(further)
                and at.status == "open"
                and len(at.ids) == PROMPT_TOKENS + STEP_TOKENS * len(at.steps)
            )
            outcomes = ["cut" if more[-1] == "..." else "finished" for more in further]
            request = search.send(
                [
                    state((*at.steps, *more), status, STEP_TOKENS * len(more))
                    for more, status in zip(further, outcomes, strict=True)
                ]
            )
    except StopIteration as end:
        return end.value, asked


def steps_of(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# --- the first error ---

WRONG = (*steps_of("w1 w2 w3 w4 w5 w6 w7"), "Answer: 0")  # its fifth step is the error


def with_an_error(error: int):
    """World: before the error, one of two rollouts ends right; from it on, none."""

    def world(steps):
        assert steps == WRONG[: len(steps)], (
            "the search requested a state that is on no wrong rollout"
        )
        rest = WRONG[len(steps) :]
        return [("detour", "Answer: 1"), rest] if len(steps) < error else [rest, rest]

    return world


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (5, [4, 6, 5]),
        (1, [4, 2, 1]),
        (2, [4, 2, 1]),
        (4, [4, 2, 3]),
        (6, [4, 6, 5]),
        (7, [4, 6, 7]),
        (8, [4, 6, 7]),
    ],
)
def test_binary_search_finds_the_first_error_in_log2_evaluations(error, asked):
    """8 steps, 3 evaluations. The other wrong rollouts share the prefix and need no evaluation."""
    tree, states = drive(
        omegaprm(state(()), is_right, TreeBudget(100, rollouts_per_state=2)),
        with_an_error(error),
        k=2,
    )
    assert (
        [len(steps) for steps in states] == [0, *asked]
        and tree.ended == "nothing left"
        and len(tree.rollouts) == 8
    )
    values = {len(steps): node.value for steps, node in tree.nodes.items()}
    assert all(value == (0.5 if k < error else 0) for k, value in values.items())
    # found from both sides
    assert (error == 8 or values[error] == 0) and (error == 1 or values[error - 1] == 0.5)


def test_budget_in_rollouts_is_never_exceeded():
    for limit, evaluations in [(2, 1), (3, 1), (4, 2), (7, 3), (8, 4)]:
        tree, states = drive(
            omegaprm(state(()), is_right, TreeBudget(limit, rollouts_per_state=2)),
            with_an_error(5),
            k=2,
        )
        assert len(states) == evaluations and len(tree.rollouts) == 2 * evaluations
        assert tree.ended == ("budget" if limit < 8 else "nothing left")


@pytest.mark.parametrize("search", SEARCHES.values())
def test_nothing_to_search(search):
    right, wrong, cut = ("a", "Answer: 1"), ("a", "Answer: 0"), ("a", "...")
    for rollouts, ended in [
        ([right, right], "always right"),
        ([wrong, wrong], "never right"),
        ([cut, wrong], "never right"),
        ([right, cut], "" if search is per_step else "nothing left"),
    ]:
        tree, states = drive(
            search(state(()), is_right, TreeBudget(rollouts_per_state=2)),
            lambda steps, rollouts=rollouts: rollouts if not steps else [right[1:]] * 2,
            k=2,
        )
        assert tree.ended == (ended or "nothing left")
        # a rollout that was cut is searched by neither; a right one by per_step
        assert states == ([(), ("a",)] if not ended else [()])


def test_a_rollout_that_was_cut_is_not_right_whatever_it_says():
    search = omegaprm(state(()), lambda steps: True, TreeBudget(rollouts_per_state=2))
    tree, _ = drive(search, lambda steps: [("a", "Answer: 1"), ("a", "...")], k=2)
    assert [rollout.outcome for rollout in tree.rollouts] == ["right", "cut"] and tree.nodes[
        ()
    ].value == 0.5


# --- selection ---


def test_selection_score_by_hand():
    """Equations 2 and 3: 0.5^0.25 * 0.9^(250/500) + 0.125 * sqrt(4) / (1 + 1)."""
    right, wrong = Rollout(("a",), "right", 10), Rollout(("a",), "wrong", 250)
    node = TreeNode((), [right, right, right, wrong], visits=1)
    assert node.value == 0.75
    assert selection_score(node, wrong, all_visits=4) == pytest.approx(
        0.9227443845417482, abs=1e-12
    )
    assert selection_score(node, wrong, 4, alpha=1, beta=1, exploration=0) == 1
    assert selection_score(
        node, wrong, 0, alpha=0.2, beta=0.5, length=125, exploration=9
    ) == pytest.approx(0.2**0.25 * 0.25)


def test_selection_is_from_the_pool_of_the_whole_tree():
    """The root (value 1/4) has three wrong rollouts. The search for the error of the shortest one
    evaluates `a1 a2` (value 3/4). The wrong rollout from there has the higher score,
    0.5^.25 * .9^(30/500) + .125 against 0.5^.75 * .9^(50/500) + .0625, so it is selected before the
    other two of the root, the shorter one of these first."""
    c, b = steps_of("c1 c2 c3 c4 c5 Answer:0"), steps_of("b1 b2 b3 b4 Answer:0")
    goes_on = {
        (): [("r", "Answer: 1"), c, b, steps_of("a1 a2 a3 Answer:0")],
        ("a1", "a2"): [("Answer: 1",)] * 3 + [steps_of("x3 x4 Answer:9")],
    }
    tree, asked = drive(
        omegaprm(state(()), is_right, TreeBudget(100, rollouts_per_state=4)),
        lambda steps: goes_on.get(steps, [("Answer: 0",)] * 4),
        k=4,
    )
    first = [(), ("a1", "a2"), ("a1", "a2", "a3"), ("a1", "a2", "x3")]
    assert asked == [*first, ("b1", "b2"), ("b1",), ("c1", "c2", "c3"), ("c1",)]
    assert {steps: node.visits for steps, node in tree.nodes.items() if node.visits} == {
        (): 3,
        ("a1", "a2"): 1,
    }


def test_per_step_values_every_step_of_every_solution_once():
    """Right and wrong solutions in the order of sampling, without the last step of each."""
    goes_on = {
        (): [steps_of("a b Answer:1"), steps_of("a c Answer:0"), ("a", "..."), ("d", "Answer: 1")]
    }
    tree, asked = drive(
        per_step(state(()), is_right, TreeBudget(100, rollouts_per_state=4)),
        lambda steps: goes_on.get(steps, [("Answer: 1",)] * 2 + [("Answer: 2",)] * 2),
        k=4,
    )
    assert asked == [(), ("a",), ("a", "b"), ("a", "c"), ("d",)] and tree.ended == "nothing left"
    assert [node.visits for node in tree.nodes.values()] == [3, 2, 1, 1, 1]
    tree, asked = drive(
        per_step(state(()), is_right, TreeBudget(15, rollouts_per_state=4)),
        lambda steps: goes_on.get(steps, [("Answer: 1",)] * 4),
        k=4,
    )
    assert asked == [(), ("a",), ("a", "b")] and tree.ended == "budget" and len(tree.rollouts) == 12


# --- values of a tree ---


@pytest.fixture
def tree() -> Tree:
    """The root and the state `a`, two rollouts from each; one was cut within its step `half`."""
    root = TreeNode(
        (),
        [Rollout(("a", "b", "Answer: 0"), "wrong", 30), Rollout(("c", "Answer: 1"), "right", 20)],
        2,
    )
    a = TreeNode(
        ("a",), [Rollout(("b", "Answer: 1"), "right", 20), Rollout(("b", "half"), "cut", 15)], 1
    )
    return Tree("How many?", "omegaprm", "nothing left", {node.steps: node for node in (root, a)})


def test_a_rollout_counts_for_every_state_on_its_way(tree):
    assert tree.counts() == {
        (): (1, 2),
        ("a",): (1, 3),  # one rollout passes through, two start here
        ("a", "b"): (1, 3),
        ("a", "b", "Answer: 0"): (0, 1),
        ("c",): (1, 1),
        ("c", "Answer: 1"): (1, 1),
        ("a", "b", "Answer: 1"): (1, 1),
    }


def test_labels(tree):
    rows, left_out = tree.values("mc")
    assert rows[0] == StepValue("How many?", "a", 1 / 3, prefix=[], rollouts=3, visits=1)
    assert rows[1] == StepValue("How many?", "b", 1 / 3, prefix=["a"], rollouts=3, visits=0)
    assert [(row.step, row.score) for row in rows[2:]] == [
        ("Answer: 0", 0),
        ("c", 1),
        ("Answer: 1", 1),
        ("Answer: 1", 1),
    ]
    assert left_out == 0
    rows, left_out = tree.values("relative")
    # (1/3) / (1/2), then (1/3) / (1/3), then at most 1
    assert [row.score for row in rows] == pytest.approx([2 / 3, 1, 0, 1, 1, 1])
    assert left_out == 0


def test_relative_labels_leave_out_steps_after_a_state_of_value_0():
    root = TreeNode(
        (),
        [Rollout(("a", "b", "Answer: 0"), "wrong", 30), Rollout(("c", "Answer: 1"), "right", 20)],
    )
    rows, left_out = Tree("How many?", "per_step", "budget", {(): root}).values("relative")
    assert [(row.step, row.score) for row in rows] == [
        ("a", 0),
        ("c", 1),
        ("Answer: 1", 1),
    ] and left_out == 2


def test_a_tree_comes_back_from_its_file(tree, tmp_path):
    write_records(tmp_path / "trees.jsonl", [tree.to_row()])
    (back,) = read_records(tmp_path / "trees.jsonl", Tree)
    assert back == tree and back.counts() == tree.counts()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("nodes"), "no search tree"),
        (lambda row: row["nodes"][0].pop("rollouts"), "no search tree"),
        (lambda row: row["nodes"].pop(0), "search tree is not complete"),
        # a rollout of the root passes through this state: valid
        (lambda row: row["nodes"][1].update(rollouts=[]), None),
        (lambda row: row["nodes"][0].update(rollouts=[]), "search tree is not complete"),
    ],
)
def test_a_row_that_is_not_a_tree_is_refused_with_its_line(tree, tmp_path, change, message):
    row = json.loads(json.dumps(tree.to_row()))
    change(row)
    write_records(tmp_path / "trees.jsonl", [row])
    if message is None:
        assert next(read_records(tmp_path / "trees.jsonl", Tree)).counts()[("a",)] == (0, 1)
    else:
        with pytest.raises(RecordError, match=rf"trees.jsonl:1: .*{message}"):
            next(read_records(tmp_path / "trees.jsonl", Tree))


# --- many at once ---


class WrittenPolicy:
    """Rollouts of `with_an_error`, with the error at the step that the prompt names."""

    def __init__(self):
        self.requests = []

    def rollouts(self, states, n, temperature, max_new_tokens, seed):
        assert (temperature, max_new_tokens, seed) == (0.7, 99, 3)
        self.requests.append((len(states), n))
        return [
            [self._rollout(at, more) for more in with_an_error(int(at.prompt))(at.steps)]
            for at in states
        ]

    def _rollout(self, at: State, more: tuple[str, ...]) -> State:
        ids = (*at.ids, *range(len(more)))
        ends = (*at.ends, *range(len(at.ids) + 1, len(ids) + 1))
        return State(at.prompt, ids, ends, (*at.steps, *more), "finished", len(more))


def test_many_searches_sample_together_and_find_the_same_as_alone():
    def searches():
        for error in range(1, 9):
            for k in (1, 2):
                root = State(str(error), (0,), (1,))
                yield (error, k), omegaprm(root, is_right, TreeBudget(100, rollouts_per_state=2))

    found, asked = {}, {}
    for in_flight in (1, 3, 64):
        policy, counted = WrittenPolicy(), []
        options = {"temperature": 0.7, "max_new_tokens": 99, "seed": 3}
        found[in_flight] = dict(
            run_searches(searches(), policy, in_flight, **options, sampled=counted.append)
        )
        asked[in_flight] = [count for count, _ in policy.requests]
        assert counted == [2 * count for count in asked[in_flight]]
    assert found[1] == found[3] == found[64] and len(found[1]) == 16
    assert asked[1] == [1] * 64 and asked[64] == [16] * 4  # the root and three states of each
    assert max(asked[3]) == 3 and sum(asked[3]) == 64


def test_without_answers_per_step_asks_for_the_same_states():
    def world(steps):
        return [("a", "Answer: 1")[len(steps) :], ("a", "Answer: 0")[len(steps) :]]

    found = []
    for check in (is_right, None):
        search = per_step(state(()), check, TreeBudget(rollouts_per_state=2))
        found.append(drive(search, world, k=2))
    (known, asked), (unknown, asked_again) = found
    assert asked == asked_again == [(), ("a",)]
    assert {rollout.outcome for rollout in known.rollouts} == {"right", "wrong"}
    assert {rollout.outcome for rollout in unknown.rollouts} == {UNKNOWN}
    assert [r.steps for r in known.rollouts] == [r.steps for r in unknown.rollouts]
    assert Tree.from_row(unknown.to_row()) == unknown
    with pytest.raises(RecordError, match="searched without answers"):
        unknown.values()


def test_without_answers_no_problem_is_always_or_never_right_and_omegaprm_is_refused():
    search = per_step(state(()), None, TreeBudget(rollouts_per_state=2))
    tree, asked = drive(search, lambda steps: [("a", "Answer: 1")[len(steps) :]] * 2, k=2)
    assert asked == [(), ("a",)] and tree.ended == "nothing left"
    with pytest.raises(ValueError, match="needs the answers"):
        next(omegaprm(state(()), None, TreeBudget(rollouts_per_state=2)))
