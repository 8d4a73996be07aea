"""Guided search: answer prompts by choosing among steps or whole solutions that a policy proposes.

All strategies have the same signature, (prompts, policy, judge, budget, seed) -> one SearchResult
for each prompt, and an entry in `STRATEGIES`. They use prompts and a judge's scores, and no
reference. Without a judge (None) the score of a step is the share of the samples from the same
prefix that contain it: self-consistency, the control.

All prompts advance together: in a round, one call of the policy samples all next steps, and one
call of the judge scores all new steps. The policy seeds its samples by state, so a prompt has the
same answer alone and among others, unless the judge's scores depend on the other solutions in the
call (in many judges they do by rounding errors).

Proposals are ranked (`_rank`) first by whether they have a `note`, which says why a proposal cannot
lead to a good answer; then by value, the aggregate of their step scores; then, among values that
differ by less than RESOLUTION, by their probability under the policy. Without the last rule a
search selects rare steps with overestimated scores, because the maximum of many noisy scores is
biased upwards.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, sqrt
from typing import TYPE_CHECKING, cast

from common.errors import UserError
from reasoning.answers import extract_answer, same_answer
from reasoning.steps import ends_solution
from reward_model.protocols import SCORE_AGGREGATES, ResponseScorer, StepJudge, aggregate

if TYPE_CHECKING:  # this module does not need torch
    from lm.policy import Policy, State

# values that differ by less count as equal; chosen on hard validation problems (docs/LOG.md)
RESOLUTION = 0.05
AT_ONCE = 256  # samples of a state in one call; more would not be faster and need more memory
EXPLORATION = 1.25  # of mcts: c of PUCT, as in AlphaMath (Chen et al. 2024, arXiv 2405.03553)
SEED_STRIDE = 1 << 32  # distance of the seeds of two calls that sample the same state


@dataclass(frozen=True)
class SearchBudget:
    """The budget for one answer.

    n: next steps that are proposed for each prefix, or number of whole solutions. beams: prefixes
    that `beam` keeps, independent searches of `dvts`, walks of `mcts`. max_steps and
    max_new_tokens: limits of a solution. aggregate: how the scores of the steps become one number.
    Raises ValueError with one line for an invalid value."""

    n: int = 16
    beams: int = 4
    max_steps: int = 40
    max_new_tokens: int = 256
    temperature: float = 1.0
    aggregate: str = "min"

    def __post_init__(self) -> None:
        for name in ("n", "beams", "max_steps", "max_new_tokens"):
            if getattr(self, name) < 1:
                got = getattr(self, name)
                raise ValueError(f"argument --{name}: expected 1 or more, got {got}")
        if not (self.temperature >= 0 and isfinite(self.temperature)):
            raise ValueError(f"argument --temperature: expected 0 or more, got {self.temperature}")
        if self.aggregate not in SCORE_AGGREGATES:
            expected = f"one of {', '.join(SCORE_AGGREGATES)}"
            raise ValueError(f"argument --aggregate: expected {expected}, got {self.aggregate}")


@dataclass(eq=False)
class Candidate:
    """A proposal: a prefix of a solution, or a whole solution.

    scores: of its steps; None if the judge cannot score it. tokens: sampled after the prompt.
    count: number of equal samples. share: its probability under the policy, estimated by the
    product of the shares of its steps among the samples. note: what is wrong with it, or empty."""

    state: "State"
    scores: list[float] | None = field(default_factory=list)
    tokens: int = 0
    count: int = 1
    share: float = 1.0
    note: str = ""

    @property
    def done(self) -> bool:
        return self.state.status != "open" or ends_solution(list(self.state.steps))

    def value(self, how: str) -> float:
        """The aggregate of its scores; -1 without scores. Rounded, so that rounding errors do not
        decide between equal candidates."""
        return -1.0 if self.scores is None else round(aggregate(self.scores, how), 5)


# the candidates of one round of a search, and whether each was kept
Round = list[tuple[Candidate, bool]]


@dataclass
class SearchResult:
    """The answer to a prompt, the search that found it, and its cost.

    scores: of the steps; None if the judge could not score the answer or there was no judge.
    finished: the answer ended before the limits. proposals: number of steps or whole solutions that
    were sampled. tokens: sampled in them. judged: number of steps that the judge scored. left_out:
    number of proposals that it could not score. seconds: the time of the call divided by the number
    of prompts."""

    prompt: str
    steps: list[str] = field(default_factory=list)
    scores: list[float] | None = None
    finished: bool = False
    proposals: int = 0
    tokens: int = 0
    judged: int = 0
    left_out: int = 0
    seconds: float = 0.0
    rounds: list[Round] = field(default_factory=list, repr=False)

    def take(self, candidate: Candidate) -> None:
        state = candidate.state
        self.steps, self.scores = list(state.steps), candidate.scores
        self.finished = state.status == "finished" or (state.status == "open" and candidate.done)


def _rank(candidate: Candidate, how: str) -> tuple:
    value = candidate.value(how)
    return not candidate.note, round(value / RESOLUTION), candidate.share, value


def _best(candidates: Sequence[Candidate], how: str) -> Candidate:
    """The best answer, the first of equal ones. Complete answers precede incomplete ones."""
    return max(candidates, key=lambda c: (not c.note, c.done, _rank(c, how)))


# --- sampling and scoring ---


def _sample(
    method: Callable, states: Sequence["State"], n: int, budget: SearchBudget, seed: int
) -> list[list["State"]]:
    """n samples of every state; `method` is `policy.next_steps` or `policy.rollouts`."""
    groups: list[list[State]] = [[] for _ in states]
    limits = budget.temperature, budget.max_new_tokens
    try:
        for first in range(0, n, AT_ONCE):
            count = min(AT_ONCE, n - first)
            sampled = method(states, count, *limits, seed + first * SEED_STRIDE)
            for group, more in zip(groups, sampled, strict=True):
                group += more
    # torch raises its own error on a GPU, and a plain RuntimeError on a CPU
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        raise UserError(
            f"{n} samples of each of {len(states)} prefixes do not fit into memory: lower --n or "
            "--beams"
        ) from None
    return groups


def _candidate(parent: Candidate, state: "State", budget: SearchBudget) -> Candidate:
    """The candidate of a sampled state, with the scores of its parent (none for new steps)."""
    tokens = parent.tokens + state.sampled
    has_answer = ends_solution(list(state.steps))
    if tokens >= budget.max_new_tokens and state.status == "open" and not has_answer:
        state = replace(state, status="cut")
    new = state.steps[len(parent.state.steps) :]
    note = ""
    if state.status == "cut":
        note = "cut: too long"
    elif any(step in state.steps[:k] for k, step in enumerate(state.steps) if step in new):
        note = "repeats an earlier step"
    elif state.status == "finished" and not has_answer:
        note = "ends without an answer"
    return Candidate(state, parent.scores, tokens, note=note)


def _merge(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Merge equal candidates, and count them."""
    merged: dict[tuple, Candidate] = {}
    for candidate in candidates:
        first = merged.setdefault((candidate.state.steps, candidate.state.status), candidate)
        first.count += first is not candidate
    return list(merged.values())


def _score(
    judge: StepJudge | ResponseScorer,
    answers: Sequence[SearchResult],
    groups: Sequence[Sequence[Candidate]],
) -> None:
    """Score all new steps of the candidates in one call of the judge.

    groups[i] are the candidates of answers[i]. Equal texts are scored once. A step that repeats an
    earlier step has score 0. A ResponseScorer gives a candidate one score for all its steps."""
    candidates = [(answer, c) for answer, group in zip(answers, groups, strict=True) for c in group]
    if hasattr(judge, "score_response"):
        texts = [(answer.prompt, "\n".join(c.state.steps)) for answer, c in candidates]
        different, scorer = list(dict.fromkeys(texts)), cast(ResponseScorer, judge)
        score_of = dict(zip(different, scorer.score(different), strict=True))
        for (_, candidate), text in zip(candidates, texts, strict=True):
            candidate.scores = [score_of[text]]
        return
    # (prompt, steps) -> number of steps that have a score already
    skips: dict[tuple[str, tuple[str, ...]], int] = {}
    for answer, candidate in candidates:
        steps, known = candidate.state.steps, candidate.scores
        key = (answer.prompt, steps)
        if known is not None and len(known) < len(steps) and key not in skips:
            skips[key] = len(known)
            answer.judged += len(steps) - len(known)
    solutions = [(prompt, list(steps)) for prompt, steps in skips]
    scored = judge.score_steps(solutions, list(skips.values())) if skips else []
    new_scores = dict(zip(skips, scored, strict=True))
    for answer, candidate in candidates:
        steps, known = candidate.state.steps, candidate.scores
        new = new_scores.get((answer.prompt, steps), [])
        if known is None or new is None:
            candidate.scores, candidate.note = None, judge.unscored_reason
            answer.left_out += candidate.count
        elif len(known) < len(steps):
            places = range(len(known), len(steps))
            repeats = [steps[k] in steps[:k] for k in places]
            new = [0.0 if is_repeat else s for is_repeat, s in zip(repeats, new, strict=True)]
            candidate.scores = [*known, *new]


def _agree(samples: Sequence[Candidate], shared: int) -> None:
    """Scores without a judge: the share of the samples with the same prefix that contain the step.

    The first `shared` steps keep their scores."""
    counts = Counter[tuple]()
    for sample in samples:
        steps = sample.state.steps
        counts.update({steps[:k]: sample.count for k in range(shared, len(steps) + 1)})
    for sample in samples:
        steps = sample.state.steps
        shares = [counts[steps[: k + 1]] / counts[steps[:k]] for k in range(shared, len(steps))]
        sample.scores = [*(sample.scores or []), *shares]


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
    sampled = _sample(policy.rollouts, [root.state for root in roots], budget.n, budget, seed)
    pools = [
        [_candidate(root, state, budget) for state in states]
        for root, states in zip(roots, sampled, strict=True)
    ]
    for answer, pool in zip(answers, pools, strict=True):
        answer.tokens = sum(sample.tokens for sample in pool)
        if judge is None:
            _agree(pool, 0)
    if judge is not None:
        _score(judge, answers, pools)
    for answer in answers:
        answer.seconds = (time.perf_counter() - start) / len(answers)
    return answers, pools


def votes(pool: Sequence[Candidate]) -> list[int]:
    """For every sample the index of the first sample with the same result; -1 without a result."""
    first_of: dict[str, int] = {}
    found = []
    for k, sample in enumerate(pool):
        state = sample.state
        result = extract_answer(state.steps[-1]) if state.steps and state.status != "cut" else None
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
    return _best(pool, how)


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
        return _best(pool, how)
    best = max(sums, key=lambda first: round(sums[first], 5))
    return _best([s for first, s in zip(firsts, pool, strict=True) if first == best], how)


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
            answer.rounds = [[(c, (c.state.steps, c.state.status) == same) for c in _merge(pool)]]
        if not needs_scores:  # the judge scores only the answers, for display
            shown = [replace(candidate, scores=[] if judge else None) for candidate in picked]
            if judge is not None:
                _score(judge, answers, [[candidate] for candidate in shown])
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
                different.values(), key=lambda c: _rank(c, budget.aggregate), reverse=True
            )
            kept[tree] = ranked[:beams]
            shown += [(candidate, candidate in kept[tree]) for candidate in different.values()]
        rounds.append(shown)
    return _best([candidate for best in kept for candidate in best], budget.aggregate)


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
    return _best(ends, budget.aggregate)


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
        samples = _sample(policy.next_steps, states, budget.n * times, budget, seed)
        for places, drawn in zip(groups, samples, strict=True):
            for nth, place in enumerate(places):
                sampled[place] = drawn[nth * budget.n : (nth + 1) * budget.n]
    longer: list[list[list[Candidate]]] = [[] for _ in running]
    for (i, parent), drawn in zip(parents, sampled, strict=True):
        answer = running[i][0]
        answer.proposals += len(drawn)
        answer.tokens += sum(state.sampled for state in drawn)
        children = _merge([_candidate(parent, state, budget) for state in drawn])
        for child in children:
            child.share = parent.share * child.count / len(drawn)
        if judge is None:
            _agree(children, len(parent.state.steps))
        longer[i].append(children)
    if judge is not None:
        flat = [[child for children in groups for child in children] for groups in longer]
        _score(judge, [answer for answer, _, _ in running], flat)
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
