"""Preference pairs of siblings: two continuations of the same state of a search tree.

A continuation is the next step (kind `step`) or the rest of a solution (kind `rest`). The steps of
the state are the pair's `prefix`. Siblings differ in their first step; equal texts are one child.

By answer, the value of a continuation is that of its first step, as in `Tree.counts`: the share
that ends right of all rollouts that start after this step or pass through it. The chosen side of
kind `rest` is a rollout that ends right, the rejected side one that ends wrong. By judge, the value
is the mean of the judge's scores of the continuation, and no outcome is looked at.

The score of a step is its own value, or the judge's score. A later step of a rest may have fewer
rollouts than `min_rollouts`, often the rollout alone. This rollout was taken for its outcome, so
its outcome says nothing new about the step. Such a step has the score of the step before it, and a
step that states the answer has 1 or 0.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from reasoning.steps import ends_solution
from reward_model.protocols import aggregate
from search.tree_search import Steps, Tree

KINDS = ("step", "rest")


@dataclass(frozen=True)
class Continuation:
    """One side of a pair. scores: of its steps. rollouts: those through its first step.

    is_known: whether these are enough for its value. is_right: whether it ends right; None if that
    does not matter."""

    steps: Steps
    scores: tuple[float, ...]
    value: float
    rollouts: int
    is_known: bool = True
    is_right: bool | None = None


def siblings(tree: Tree) -> dict[Steps, list[Steps]]:
    """State -> the states that are one step longer, in the order in which they were sampled."""
    found: dict[Steps, list[Steps]] = {}
    for steps in tree.counts():
        if steps:
            found.setdefault(steps[:-1], []).append(steps)
    return found


def solutions(tree: Tree) -> Iterator[tuple[Steps, int, str]]:
    """(steps, the number of them before the rollout, outcome) of the rollouts that ended with an
    answer. Text without one gets no EOS, so it would not be what the policy sampled."""
    for node in tree.nodes.values():
        for rollout in node.rollouts:
            whole = (*node.steps, *rollout.steps)
            if rollout.outcome != "cut" and ends_solution(whole):
                yield whole, len(node.steps), rollout.outcome


def by_answer(tree: Tree, kind: str, min_rollouts: int) -> dict[Steps, list[Continuation]]:
    """State -> its continuations, with values from outcomes.

    A value is known if it comes from `min_rollouts` rollouts or more, or if the step states the
    answer: then one rollout says all."""
    counts = tree.counts()
    closing = {whole for whole, _, _ in solutions(tree)}
    first: dict[tuple[Steps, bool], Steps] = {}  # (state, is right) -> the first such rollout
    for whole, start, outcome in solutions(tree):
        for k in range(start + 1, len(whole) + 1):
            first.setdefault((whole[:k], outcome == "right"), whole)

    def is_known(steps: Steps) -> bool:
        return steps in closing or counts[steps][1] >= min_rollouts

    def value(steps: Steps) -> float:
        right, total = counts[steps]
        return right / total

    def scores(steps: Steps, before: int) -> tuple[float, ...]:
        found: list[float] = []
        for k in range(before + 1, len(steps) + 1):
            own = not found or is_known(steps[:k])
            found.append(value(steps[:k]) if own else found[-1])
        return tuple(found)

    def continuations(child: Steps) -> Iterator[Continuation]:
        before, rollouts = len(child) - 1, counts[child][1]
        more = (value(child), rollouts, is_known(child))
        if kind == "step":
            yield Continuation(child[before:], (value(child),), *more)
            return
        for is_right in (True, False):
            if whole := first.get((child, is_right)):
                yield Continuation(whole[before:], scores(whole, before), *more, is_right)

    return {
        state: [side for child in children for side in continuations(child)]
        for state, children in siblings(tree).items()
    }


def to_judge(tree: Tree, kind: str) -> dict[Steps, int]:
    """The texts that `by_judge` needs scores of -> how many of their first steps need none."""
    found: dict[Steps, int] = {}
    for state, children in siblings(tree).items():
        if len(children) > 1:
            texts = children if kind == "step" else _rests(tree, state)
            for steps in texts:
                found[steps] = min(len(state), found.get(steps, len(state)))
    return found


def by_judge(
    tree: Tree, kind: str, scores: Mapping[Steps, list[float] | None]
) -> dict[Steps, list[Continuation]]:
    """State -> its continuations, with the scores of a judge.

    scores: for each text of `to_judge` the scores of its last steps; None if the judge cannot read
    it, which leaves it out."""
    counts = tree.counts()
    found: dict[Steps, list[Continuation]] = {}
    for state, children in siblings(tree).items():
        found[state] = []
        for steps in children if kind == "step" else _rests(tree, state):
            if own := scores.get(steps):
                new = tuple(own[len(own) - len(steps) + len(state) :])
                rollouts = counts[steps[: len(state) + 1]][1]
                found[state].append(
                    Continuation(steps[len(state) :], new, aggregate(new), rollouts)
                )
    return found


def _rests(tree: Tree, state: Steps) -> list[Steps]:
    """The different solutions that were sampled from a state or through it."""
    n = len(state)
    return list(
        dict.fromkeys(
            whole
            for whole, start, _ in solutions(tree)
            if start <= n < len(whole) and whole[:n] == state
        )
    )


def pair_up(
    continuations: list[Continuation], min_gap: float, per_state: int | None = None
) -> tuple[list[tuple[Continuation, Continuation]], str]:
    """(pairs (chosen, rejected) of one state, why there is none).

    min_gap: the least difference of the two values. per_state: the most pairs; taken are those with
    the widest gap, among equal ones those with more rollouts behind the weaker side, and each
    rejected first step once before any of them twice."""
    pairs = [
        (chosen, rejected)
        for chosen in continuations
        for rejected in continuations
        if chosen.is_right is not False
        and rejected.is_right is not True
        and chosen.steps[0] != rejected.steps[0]
        and chosen.value > rejected.value
    ]
    if not pairs:
        return [], "no worse sibling"
    known = [pair for pair in pairs if all(side.is_known for side in pair)]
    if not known:
        return [], "too few rollouts"
    wide = [pair for pair in known if gap(pair) >= min_gap]
    if not wide:
        return [], "gap too small"
    wide.sort(key=lambda pair: (-gap(pair), -min(side.rollouts for side in pair)))
    used: Counter[str] = Counter()
    turns = []
    for pair in wide:
        turns.append(used[pair[1].steps[0]])
        used[pair[1].steps[0]] += 1
    order = sorted(range(len(wide)), key=turns.__getitem__)
    return [wide[k] for k in order][:per_state], ""


def gap(pair: tuple[Continuation, Continuation]) -> float:
    """The difference of the values of chosen and rejected, rounded, so that .7 - .2 is .5."""
    return round(pair[0].value - pair[1].value, 6)
