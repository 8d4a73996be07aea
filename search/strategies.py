"""Guided search: answer prompts by choosing among steps or whole solutions that a policy proposes.

All strategies have the same signature, (prompts, policy, judge, budget, seed) -> one SearchResult
for each prompt, and an entry in `STRATEGIES`. They use prompts and a judge's scores, and no
reference. Without a judge (None) the score of a step is the share of the samples from the same
prefix that contain it: self-consistency, the control.

All prompts advance together: in a round, one call of the policy samples all next steps, and one
call of the judge scores all new steps. The policy seeds its samples by state, so a prompt has the
same answer alone and among others, unless the judge's scores depend on the other solutions in the
call (in many judges they do by rounding errors).

search/candidates.py says how proposals are scored and ranked.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import TYPE_CHECKING

from reasoning.answers import same_answer
from reasoning.steps import stated_answer
from reward_model.protocols import ResponseScorer, StepJudge
from search.candidates import (
    RESOLUTION,
    Candidate,
    Round,
    SearchBudget,
    SearchResult,
    best,
    merge,
    new_candidate,
    rank,
    sample_states,
    score_by_agreement,
    score_new_steps,
)

if TYPE_CHECKING:  # this module does not need torch
    from lm.policy import Policy, State

EXPLORATION = 1.25  # of mcts: c of PUCT, as in AlphaMath (Chen et al. 2024, arXiv 2405.03553)


# --- whole solutions ---


def draw(
    prompts: Sequence[str],
    policy: "Policy",
    judge: StepJudge | ResponseScorer | None,
    budget: SearchBudget,
    seed: int,
) -> tuple[list[SearchResult], list[list[Candidate]]]:
    """n whole solutions of every prompt with their scores (the pool of PICKS), and their cost.

    The first m of n samples equal those of a call with n = m; their scores do too if there is a
    judge."""
    start = time.perf_counter()
    roots = [Candidate(policy.start(prompt)) for prompt in prompts]
    answers = [SearchResult(prompt, proposals=budget.n) for prompt in prompts]
    sampled = sample_states(policy.rollouts, [root.state for root in roots], budget.n, budget, seed)
    pools = [
        [new_candidate(root, state, budget) for state in states]
        for root, states in zip(roots, sampled, strict=True)
    ]
    for answer, pool in zip(answers, pools, strict=True):
        answer.tokens = sum(sample.tokens for sample in pool)
        if judge is None:
            score_by_agreement(pool, 0)
    if judge is not None:
        score_new_steps(judge, answers, pools)
    for answer in answers:
        answer.seconds = (time.perf_counter() - start) / len(answers)
    return answers, pools


def votes(pool: Sequence[Candidate]) -> list[int]:
    """For every sample the index of the first sample with the same result; -1 without a result."""
    first_of: dict[str, int] = {}
    found = []
    for k, sample in enumerate(pool):
        state = sample.state
        result = stated_answer(state.steps) if state.status != "cut" else None
        if result is not None and result not in first_of:
            same = (first for other, first in first_of.items() if same_answer(result, other))
            first_of[result] = next(same, k)
        found.append(-1 if result is None else first_of[result])
    return found


# A pick chooses from a pool. how: the aggregate. same: `votes` of the pool or of a longer one.


def pick_majority(
    pool: Sequence[Candidate], how: str, same: Sequence[int] | None = None
) -> Candidate:
    """The first sample of the most frequent result, the earliest of equally frequent ones
    (self-consistency, Wang et al. 2022, arXiv 2203.11171)."""
    firsts = votes(pool) if same is None else same[: len(pool)]
    counts = Counter(first for first in firsts if first >= 0)
    return pool[counts.most_common(1)[0][0]] if counts else pool[0]


def pick_best(pool: Sequence[Candidate], how: str, same: Sequence[int] | None = None) -> Candidate:
    """The sample with the highest value."""
    return best(pool, how)


def pick_weighted(
    pool: Sequence[Candidate], how: str, same: Sequence[int] | None = None
) -> Candidate:
    """The best sample of the result with the highest sum of values (Li et al. 2022, arXiv
    2206.02336)."""
    sums: dict[int, float] = {}
    firsts = votes(pool) if same is None else same[: len(pool)]
    for first, sample in zip(firsts, pool, strict=True):
        if first >= 0:
            sums[first] = sums.get(first, 0.0) + max(0.0, sample.value(how))
    if not sums:
        return best(pool, how)
    chosen = max(sums, key=lambda first: round(sums[first], 5))
    return best([s for first, s in zip(firsts, pool, strict=True) if first == chosen], how)


Pick = Callable[..., Candidate]

PICKS: dict[str, Pick] = {
    "majority_vote": pick_majority,
    "best_of_n": pick_best,
    "weighted_vote": pick_weighted,
}

# (prompts, policy, judge, budget, seed) -> one result for each prompt
Judge = StepJudge | ResponseScorer | None
Strategy = Callable[[Sequence[str], "Policy", Judge, SearchBudget, int], list[SearchResult]]


def _from_pool(pick: Pick, needs_scores: bool = True) -> Strategy:
    def strategy(
        prompts: Sequence[str], policy: "Policy", judge: Judge, budget: SearchBudget, seed: int
    ) -> list[SearchResult]:
        answers, pools = draw(prompts, policy, judge if needs_scores else None, budget, seed)
        picked = [pick(pool, budget.aggregate) for pool in pools]
        for answer, pool, candidate in zip(answers, pools, picked, strict=True):
            answer.take(candidate)
            same = (candidate.state.steps, candidate.state.status)
            answer.rounds = [[(c, (c.state.steps, c.state.status) == same) for c in merge(pool)]]
        if not needs_scores:  # the judge scores only the answers, for display
            shown = [replace(candidate, scores=[] if judge else None) for candidate in picked]
            if judge is not None:
                score_new_steps(judge, answers, [[candidate] for candidate in shown])
            for answer, candidate in zip(answers, shown, strict=True):
                answer.scores = candidate.scores
        return answers

    strategy.__doc__ = pick.__doc__
    return strategy


def greedy(
    prompts: Sequence[str], policy: "Policy", judge: Judge, budget: SearchBudget, seed: int
) -> list[SearchResult]:
    """One solution, at temperature 0."""
    return majority_vote(prompts, policy, judge, replace(budget, n=1, temperature=0.0), seed)


majority_vote = _from_pool(pick_majority, needs_scores=False)
best_of_n = _from_pool(pick_best)
weighted_vote = _from_pool(pick_weighted)


# --- step by step ---

# yields the candidates to extend, receives the candidates with one more step, returns the answer
StepSearch = Generator[list[Candidate], list[list[Candidate]], Candidate]


def _beams(
    root: Candidate, budget: SearchBudget, rounds: list[Round], beams: int, trees: int
) -> StepSearch:
    """`trees` independent searches that each keep the best `beams` candidates of a round.

    A complete candidate stays until better ones replace it."""
    kept = [[root]] * trees
    for _ in range(budget.max_steps):
        live = [
            (tree, candidate)
            for tree in range(trees)
            for candidate in kept[tree]
            if not candidate.done
        ]
        if not live:
            break
        longer = yield [candidate for _, candidate in live]
        shown: Round = []
        for tree in sorted({tree for tree, _ in live}):
            candidates = [candidate for candidate in kept[tree] if candidate.done]
            for (owner, _), children in zip(live, longer, strict=True):
                candidates += children if owner == tree else []
            different: dict[tuple, Candidate] = {}
            for candidate in candidates:
                different.setdefault((candidate.state.steps, candidate.done), candidate)
            ranked = sorted(
                different.values(), key=lambda c: rank(c, budget.aggregate), reverse=True
            )
            kept[tree] = ranked[:beams]
            shown += [(candidate, candidate in kept[tree]) for candidate in different.values()]
        rounds.append(shown)
    return best([candidate for best in kept for candidate in best], budget.aggregate)


@dataclass(eq=False)
class _WalkNode:
    candidate: Candidate
    children: list["_WalkNode"] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0  # of the values that were backed up


def _walks(root: Candidate, budget: SearchBudget, rounds: list[Round]) -> StepSearch:
    """MCTS with a judge's values in place of rollouts: `beams` walks from the root to an end.

    Each step of a walk maximizes PUCT (Silver et al. 2017; as in AlphaMath, Chen et al. 2024). The
    value of a node without visits is the judge's. The value of the end is backed up along the walk.
    The first walk equals `step_greedy`."""

    def score(node: _WalkNode, parent: _WalkNode) -> tuple:
        quality = (
            node.total / node.visits if node.visits else node.candidate.value(budget.aggregate)
        )
        prior = node.candidate.share / parent.candidate.share
        value = quality + EXPLORATION * prior * sqrt(parent.visits) / (1 + node.visits)
        return not node.candidate.note, round(value / RESOLUTION), prior, value

    tree, ends = _WalkNode(root), []
    for _ in range(budget.beams):
        walk = [tree]
        while not walk[-1].candidate.done and len(walk) <= budget.max_steps:
            node = walk[-1]
            if is_new := not node.children:
                (longer,) = yield [node.candidate]
                node.children = [_WalkNode(child) for child in longer]
            walk.append(max(node.children, key=lambda child: score(child, node)))
            if is_new:
                rounds.append([(child.candidate, child is walk[-1]) for child in node.children])
        ends.append(walk[-1].candidate)
        value = 0.0 if ends[-1].note else ends[-1].value(budget.aggregate)
        for node in walk:
            node.visits, node.total = node.visits + 1, node.total + value
    return best(ends, budget.aggregate)


# a search that runs, and the candidates that it wants to extend
_Running = tuple[SearchResult, StepSearch, list[Candidate]]


def _explore(
    search: Callable[..., StepSearch],
    prompts: Sequence[str],
    policy: "Policy",
    judge: Judge,
    budget: SearchBudget,
    seed: int,
    **shape: int,
) -> list[SearchResult]:
    """Run one search for each prompt, all of them round by round."""
    start = time.perf_counter()
    answers = [SearchResult(prompt) for prompt in prompts]
    running: list[_Running] = []
    for answer in answers:
        steps = search(Candidate(policy.start(answer.prompt)), budget, answer.rounds, **shape)
        running.append((answer, steps, next(steps)))
    while running:
        longer = _propose(running, policy, judge, budget, seed)
        unfinished: list[_Running] = []
        for (answer, steps, _), children in zip(running, longer, strict=True):
            try:
                unfinished.append((answer, steps, steps.send(children)))
            except StopIteration as end:
                answer.take(end.value)
        running = unfinished
    for answer in answers:
        answer.seconds = (time.perf_counter() - start) / len(answers)
    return answers


def _propose(
    running: Sequence[_Running], policy: "Policy", judge: Judge, budget: SearchBudget, seed: int
) -> list[list[list[Candidate]]]:
    """[search][candidate to extend] -> its n next steps, merged and scored."""
    parents = [(i, parent) for i, (_, _, request) in enumerate(running) for parent in request]
    # independent trees of a search may reach the same state; then each gets its own samples
    places_of: dict[tuple, list[int]] = {}
    for place, (i, parent) in enumerate(parents):
        places_of.setdefault((i, parent.state.steps), []).append(place)
    sampled: list[list[State]] = [[] for _ in parents]
    for times in sorted({len(places) for places in places_of.values()}):
        groups = [places for places in places_of.values() if len(places) == times]
        states = [parents[first][1].state for first, *_ in groups]
        samples = sample_states(policy.next_steps, states, budget.n * times, budget, seed)
        for places, drawn in zip(groups, samples, strict=True):
            for nth, place in enumerate(places):
                sampled[place] = drawn[nth * budget.n : (nth + 1) * budget.n]
    longer: list[list[list[Candidate]]] = [[] for _ in running]
    for (i, parent), drawn in zip(parents, sampled, strict=True):
        answer = running[i][0]
        answer.proposals += len(drawn)
        answer.tokens += sum(state.sampled for state in drawn)
        children = merge([new_candidate(parent, state, budget) for state in drawn])
        for child in children:
            child.share = parent.share * child.count / len(drawn)
        if judge is None:
            score_by_agreement(children, len(parent.state.steps))
        longer[i].append(children)
    if judge is not None:
        flat = [[child for children in groups for child in children] for groups in longer]
        score_new_steps(judge, [answer for answer, _, _ in running], flat)
    return longer


def step_greedy(
    prompts: Sequence[str], policy: "Policy", judge: Judge, budget: SearchBudget, seed: int
) -> list[SearchResult]:
    """In each round the best of n next steps."""
    return _explore(_beams, prompts, policy, judge, budget, seed, beams=1, trees=1)


def beam(
    prompts: Sequence[str], policy: "Policy", judge: Judge, budget: SearchBudget, seed: int
) -> list[SearchResult]:
    """In each round n next steps for each of `beams` prefixes; the best `beams` of all are kept."""
    return _explore(_beams, prompts, policy, judge, budget, seed, beams=budget.beams, trees=1)


def dvts(
    prompts: Sequence[str], policy: "Policy", judge: Judge, budget: SearchBudget, seed: int
) -> list[SearchResult]:
    """The best answer of `beams` independent step_greedy searches, each with its own samples
    (diverse verifier tree search, Beeching et al. 2024)."""
    return _explore(_beams, prompts, policy, judge, budget, seed, beams=1, trees=budget.beams)


def mcts(
    prompts: Sequence[str], policy: "Policy", judge: Judge, budget: SearchBudget, seed: int
) -> list[SearchResult]:
    """`beams` walks through one tree, guided by the judge's values and by the visits (PUCT)."""
    return _explore(_walks, prompts, policy, judge, budget, seed)


STRATEGIES: dict[str, Strategy] = {
    "greedy": greedy,
    "majority_vote": majority_vote,
    "best_of_n": best_of_n,
    "weighted_vote": weighted_vote,
    "step_greedy": step_greedy,
    "beam": beam,
    "dvts": dvts,
    "mcts": mcts,
}
NEED_NO_JUDGE = ("greedy", "majority_vote")
