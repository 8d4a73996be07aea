"""Guided search: answer prompts by choosing among what a policy proposes, step by step or among whole solutions.

Every strategy has one signature, (prompts, policy, judge, budget, seed) -> one SearchResult a prompt, and one line in `STRATEGIES`. They
see prompts and a judge's scores, no reference. With no judge (None) the score of a step is the share of the samples from the same
beginning that wrote it: self-consistency, the control that needs none.

All prompts advance together: in a round all that is to go on is one call of the policy, and all that came of it one call of the
judge, which is asked about the new steps only. The policy seeds its samples by state, so a prompt has the same answer alone and
among others (but for judges whose scores depend on what else they are given, by rounding or more).

What is better (`_rank`): a proposal with nothing wrong before one with a note, then the higher value (the aggregate of its step
scores), and where values are nearly the same (RESOLUTION) what the policy is likelier to write. Without that a search finds the
rare step that deceives its judge: the best of many scores is the one most overrated. A proposal that cannot be the beginning of a
good answer has a `note` that says why.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, sqrt
from typing import TYPE_CHECKING

from common.errors import UserError
from reasoning.answers import extract_answer, same_answer
from reasoning.steps import ends_solution
from reward_model.protocols import SCORE_AGGREGATES, ResponseScorer, StepJudge, aggregate

if TYPE_CHECKING:  # nothing here needs torch
    from lm.policy import Policy, State

RESOLUTION = (
    0.05  # values as close as this say the same; chosen on hard validation problems (docs/LOG.md)
)
AT_ONCE = 256  # samples of a state asked for in one call: more would only take memory
EXPLORATION = 1.25  # of mcts: c of PUCT, as AlphaMath has it (Chen et al. 2024, arXiv 2405.03553)
ANOTHER = 1 << 32  # from one seed to the next, where a state is sampled again


@dataclass(frozen=True)
class SearchBudget:
    """What an answer may cost. n: next steps proposed for each beginning that goes on, or whole solutions. beams: how many
    beginnings `beam` keeps, independent ones of `dvts`, walks of `mcts`. max_steps and max_new_tokens: of a solution. aggregate:
    how the scores of its steps become one number. Raises ValueError, one line, for a value that makes no sense."""

    n: int = 16
    beams: int = 4
    max_steps: int = 40
    max_new_tokens: int = 256
    temperature: float = 1.0
    aggregate: str = "min"

    def __post_init__(self):
        for name in ("n", "beams", "max_steps", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"argument --{name}: expected 1 or more, got {getattr(self, name)}"
                )
        if not (self.temperature >= 0 and isfinite(self.temperature)):
            raise ValueError(f"argument --temperature: expected 0 or more, got {self.temperature}")
        if self.aggregate not in SCORE_AGGREGATES:
            raise ValueError(
                f"argument --aggregate: expected one of {', '.join(SCORE_AGGREGATES)}, got {self.aggregate}"
            )


@dataclass(eq=False)
class Candidate:
    """A proposal: a beginning of a solution, or a whole one. scores: of every step, None where the judge leaves it out. tokens:
    sampled for it, from the prompt on. count: how many samples said the same. share: the probability that the policy writes it, as
    the product of the shares that its steps had among the samples. note: what is wrong with it, if anything."""

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
        """The aggregate of its scores; -1 without. Rounded, so that what it was scored with does not decide between equals."""
        return -1.0 if self.scores is None else round(aggregate(self.scores, how), 5)


# the candidates of a step of the search, and whether each was kept
Round = list[tuple[Candidate, bool]]


@dataclass
class SearchResult:
    """An answer, how it was found, and what that cost. scores: of every step; None if the judge leaves the answer out, or was not
    there to be asked. finished: it ended by itself. proposals: steps or whole solutions that were sampled; tokens: in them; judged:
    steps that the judge scored; left_out: proposals that it could not score; seconds: this prompt's share of the call's."""

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
    """The best answer: one that states a result before one that was stopped on its way; of equals the first."""
    return max(candidates, key=lambda c: (not c.note, c.done, _rank(c, how)))


# --- sampling and scoring


def _sample(
    how: Callable, states: Sequence["State"], n: int, budget: SearchBudget, seed: int
) -> list[list["State"]]:
    """n samples of every state, by `policy.next_steps` or `policy.rollouts`."""
    groups: list[list[State]] = [[] for _ in states]
    try:
        for first in range(0, n, AT_ONCE):
            here = min(AT_ONCE, n - first)
            sampled = how(
                states, here, budget.temperature, budget.max_new_tokens, seed + first * ANOTHER
            )
            for group, more in zip(groups, sampled, strict=True):
                group += more
    except (
        MemoryError,
        RuntimeError,
    ) as error:  # torch has an error of its own on a GPU and a plain RuntimeError on a CPU
        if not isinstance(error, MemoryError) and "memory" not in str(error).lower():
            raise
        raise UserError(
            f"{n} samples of each of {len(states)} beginnings do not fit into memory: lower --n or --beams"
        ) from None
    return groups


def _candidate(parent: Candidate, state: "State", budget: SearchBudget) -> Candidate:
    """What was sampled after a parent; its scores are still those of the parent."""
    tokens = parent.tokens + state.sampled
    if (
        tokens >= budget.max_new_tokens
        and state.status == "open"
        and not ends_solution(list(state.steps))
    ):
        state = replace(state, status="cut")
    new = state.steps[len(parent.state.steps) :]
    note = ""
    if state.status == "cut":
        note = "cut: too long"
    elif any(step in state.steps[:k] for k, step in enumerate(state.steps) if step in new):
        note = "repeats an earlier step"
    elif state.status == "finished" and not ends_solution(list(state.steps)):
        note = "ends without an answer"
    return Candidate(state, parent.scores, tokens, note=note)


def _merge(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that say the same as one."""
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
    """One call of the judge for the steps that have no score yet, one group an answer; the same text is asked once. A step that
    repeats an earlier one scores 0. A ResponseScorer's one score of a whole solution stands in place of those of its steps."""
    if hasattr(judge, "score_response"):
        wholes = [
            (answer, whole)
            for answer, group in zip(answers, groups, strict=True)
            for whole in group
        ]
        texts = [(answer.prompt, "\n".join(whole.state.steps)) for answer, whole in wholes]
        known = dict(
            zip(dict.fromkeys(texts), judge.score(list(dict.fromkeys(texts))), strict=True)
        )
        for (_, whole), text in zip(wholes, texts, strict=True):
            whole.scores = [known[text]]
        return
    asked: dict[tuple, int] = {}
    for answer, group in zip(answers, groups, strict=True):
        for candidate in group:
            key = (answer.prompt, candidate.state.steps)
            if (
                candidate.scores is not None
                and len(candidate.scores) < len(candidate.state.steps)
                and key not in asked
            ):
                asked[key] = len(candidate.scores)
                answer.judged += len(candidate.state.steps) - asked[key]
    solutions = [(prompt, list(steps)) for prompt, steps in asked]
    fresh = dict(
        zip(asked, judge.score_steps(solutions, list(asked.values())) if asked else [], strict=True)
    )
    for answer, group in zip(answers, groups, strict=True):
        for candidate in group:
            steps, known = candidate.state.steps, candidate.scores
            new = fresh.get((answer.prompt, steps), [])
            if known is None or new is None:
                candidate.scores, candidate.note = None, judge.unscored_reason
                answer.left_out += candidate.count
            elif len(known) < len(steps):
                new = zip(range(len(known), len(steps)), new, strict=True)
                candidate.scores = [
                    *known,
                    *(0.0 if steps[k] in steps[:k] else score for k, score in new),
                ]


def _agree(samples: Sequence[Candidate], shared: int) -> None:
    """Without a judge: the score of a step behind the first `shared` ones is the share of the samples with its beginning that
    wrote it."""
    counts = Counter[tuple]()
    for sample in samples:
        counts.update(
            {
                sample.state.steps[:k]: sample.count
                for k in range(shared, len(sample.state.steps) + 1)
            }
        )
    for sample in samples:
        steps = sample.state.steps
        shares = [counts[steps[: k + 1]] / counts[steps[:k]] for k in range(shared, len(steps))]
        sample.scores = [*sample.scores, *shares]


# --- whole solutions


def draw(
    prompts: Sequence[str],
    policy: "Policy",
    judge: StepJudge | ResponseScorer | None,
    budget: SearchBudget,
    seed: int,
) -> tuple[list[SearchResult], list[list[Candidate]]]:
    """n whole solutions of every prompt, with their scores, and what they cost: the pool that `PICKS` choose from. The first m of n
    samples are those that m would have got (without a judge their scores are not)."""
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
    """For every sample the first one that comes to the same result, by its place; -1 for one that comes to none."""
    places: dict[str, int] = {}
    found = []
    for k, sample in enumerate(pool):
        result = (
            extract_answer(sample.state.steps[-1])
            if sample.state.steps and sample.state.status != "cut"
            else None
        )
        if result is not None and result not in places:
            places[result] = next(
                (place for other, place in places.items() if same_answer(result, other)), k
            )
        found.append(-1 if result is None else places[result])
    return found


def pick_majority(
    pool: Sequence[Candidate], how: str, of: Sequence[int] | None = None
) -> Candidate:
    """A sample of the result that most come to (self-consistency, Wang et al. 2022, arXiv 2203.11171): the first; of equally
    frequent results the one that came first."""
    counted = Counter(
        place for place in (votes(pool) if of is None else of[: len(pool)]) if place >= 0
    )
    return pool[counted.most_common(1)[0][0]] if counted else pool[0]


def pick_best(pool: Sequence[Candidate], how: str, of: Sequence[int] | None = None) -> Candidate:
    """The sample with the best scores."""
    return _best(pool, how)


def pick_weighted(
    pool: Sequence[Candidate], how: str, of: Sequence[int] | None = None
) -> Candidate:
    """The best sample of the result whose samples have the highest sum of values (Li et al. 2022, arXiv 2206.02336)."""
    sums = Counter[int]()
    of = votes(pool) if of is None else of[: len(pool)]
    for place, sample in zip(of, pool, strict=True):
        if place >= 0:
            sums[place] += max(0.0, sample.value(how))
    if not sums:
        return _best(pool, how)
    first = max(sums, key=lambda place: round(sums[place], 5))
    return _best([sample for place, sample in zip(of, pool, strict=True) if place == first], how)


PICKS: dict[str, Callable[..., Candidate]] = {
    "majority_vote": pick_majority,
    "best_of_n": pick_best,
    "weighted_vote": pick_weighted,
}


def _from_pool(pick: Callable[..., Candidate], needs_scores: bool = True):
    def strategy(prompts, policy, judge, budget, seed) -> list[SearchResult]:
        answers, pools = draw(prompts, policy, judge if needs_scores else None, budget, seed)
        picked = [pick(pool, budget.aggregate) for pool in pools]
        for answer, pool, candidate in zip(answers, pools, picked, strict=True):
            answer.take(candidate)
            same = (candidate.state.steps, candidate.state.status)
            answer.rounds = [[(c, (c.state.steps, c.state.status) == same) for c in _merge(pool)]]
        if not needs_scores:  # the judge is asked about the answers alone, for showing
            asked = [replace(candidate, scores=[] if judge else None) for candidate in picked]
            if judge is not None:
                _score(judge, answers, [[candidate] for candidate in asked])
            for answer, candidate in zip(answers, asked, strict=True):
                answer.scores = candidate.scores
        return answers

    strategy.__doc__ = pick.__doc__
    return strategy


def greedy(prompts, policy, judge, budget, seed) -> list[SearchResult]:
    """One solution, at temperature 0."""
    return majority_vote(prompts, policy, judge, replace(budget, n=1, temperature=0.0), seed)


majority_vote = _from_pool(pick_majority, needs_scores=False)
best_of_n = _from_pool(pick_best)
weighted_vote = _from_pool(pick_weighted)


# --- step by step

# yields who goes on, is sent their next steps; the answer
StepSearch = Generator[list[Candidate], list[list[Candidate]], Candidate]


def _beams(
    root: Candidate, budget: SearchBudget, rounds: list[Round], beams: int, trees: int
) -> StepSearch:
    """`trees` independent searches, each keeps the best `beams` candidates; a finished one holds its place until it is beaten."""
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
            there = [candidate for candidate in kept[tree] if candidate.done]
            there += [
                child
                for (owner, _), group in zip(live, longer, strict=True)
                if owner == tree
                for child in group
            ]
            different: dict[tuple, Candidate] = {}
            for candidate in there:
                different.setdefault((candidate.state.steps, candidate.done), candidate)
            kept[tree] = sorted(
                different.values(), key=lambda c: _rank(c, budget.aggregate), reverse=True
            )[:beams]
            shown += [(candidate, candidate in kept[tree]) for candidate in different.values()]
        rounds.append(shown)
    return _best([candidate for of_tree in kept for candidate in of_tree], budget.aggregate)


@dataclass(eq=False)
class _Node:
    candidate: Candidate
    children: list["_Node"] = field(default_factory=list)
    visits: int = 0
    total: float = 0.0  # of the values that were backed up


def _walks(root: Candidate, budget: SearchBudget, rounds: list[Round]) -> StepSearch:
    """MCTS without rollouts and without an oracle: `beams` walks from the root to an end, each by PUCT (Silver et al. 2017; as in
    AlphaMath, Chen et al. 2024), a node that was not walked through being worth what the judge says. What the end is worth is
    backed up along the walk. The first walk is `step_greedy`."""

    def score(node: _Node, parent: _Node) -> tuple:
        quality = (
            node.total / node.visits if node.visits else node.candidate.value(budget.aggregate)
        )
        prior = node.candidate.share / parent.candidate.share
        value = quality + EXPLORATION * prior * sqrt(parent.visits) / (1 + node.visits)
        return not node.candidate.note, round(value / RESOLUTION), prior, value

    tree, ends = _Node(root), []
    for _ in range(budget.beams):
        walk = [tree]
        while not walk[-1].candidate.done and len(walk) <= budget.max_steps:
            node = walk[-1]
            if is_new := not node.children:
                (longer,) = yield [node.candidate]
                node.children = [_Node(child) for child in longer]
            walk.append(max(node.children, key=lambda child: score(child, node)))
            if is_new:
                rounds.append([(child.candidate, child is walk[-1]) for child in node.children])
        ends.append(walk[-1].candidate)
        value = 0.0 if ends[-1].note else ends[-1].value(budget.aggregate)
        for node in walk:
            node.visits, node.total = node.visits + 1, node.total + value
    return _best(ends, budget.aggregate)


def _explore(
    search: Callable[..., StepSearch],
    prompts,
    policy,
    judge,
    budget: SearchBudget,
    seed: int,
    **shape: int,
) -> list[SearchResult]:
    """Run one search a prompt, all of them a round at a time."""
    start = time.perf_counter()
    answers = [SearchResult(prompt) for prompt in prompts]
    searches = [
        search(Candidate(policy.start(answer.prompt)), budget, answer.rounds, **shape)
        for answer in answers
    ]
    running = [(answer, walk, next(walk)) for answer, walk in zip(answers, searches, strict=True)]
    while running:
        longer = _propose(running, policy, judge, budget, seed)
        still = []
        for (answer, walk, _), children in zip(running, longer, strict=True):
            try:
                still.append((answer, walk, walk.send(children)))
            except StopIteration as end:
                answer.take(end.value)
        running = still
    for answer in answers:
        answer.seconds = (time.perf_counter() - start) / len(answers)
    return answers


def _propose(
    running: Sequence[tuple], policy, judge, budget: SearchBudget, seed: int
) -> list[list[list[Candidate]]]:
    """Of every search, for every candidate that it asked to go on, n next steps: merged, with scores."""
    parents = [(i, parent) for i, (_, _, request) in enumerate(running) for parent in request]
    met: dict[tuple, list[int]] = {}  # where independent trees meet, each has samples of its own
    for place, (i, parent) in enumerate(parents):
        met.setdefault((i, parent.state.steps), []).append(place)
    sampled: list[list[State]] = [[] for _ in parents]
    for times in sorted({len(places) for places in met.values()}):
        groups = [places for places in met.values() if len(places) == times]
        states = [parents[first][1].state for first, *_ in groups]
        for places, samples in zip(
            groups, _sample(policy.next_steps, states, budget.n * times, budget, seed), strict=True
        ):
            for nth, place in enumerate(places):
                sampled[place] = samples[nth * budget.n : (nth + 1) * budget.n]
    longer: list[list[list[Candidate]]] = [[] for _ in running]
    for (i, parent), states in zip(parents, sampled, strict=True):
        answer = running[i][0]
        answer.proposals += len(states)
        answer.tokens += sum(state.sampled for state in states)
        children = _merge([_candidate(parent, state, budget) for state in states])
        for child in children:
            child.share = parent.share * child.count / len(states)
        if judge is None:
            _agree(children, len(parent.state.steps))
        longer[i].append(children)
    if judge is not None:
        _score(
            judge,
            [answer for answer, _, _ in running],
            [[c for group in groups for c in group] for groups in longer],
        )
    return longer


def step_greedy(prompts, policy, judge, budget, seed) -> list[SearchResult]:
    """n next steps, the best is taken, and so on."""
    return _explore(_beams, prompts, policy, judge, budget, seed, beams=1, trees=1)


def beam(prompts, policy, judge, budget, seed) -> list[SearchResult]:
    """n next steps for each of the `beams` best beginnings, the best `beams` of all of them go on."""
    return _explore(_beams, prompts, policy, judge, budget, seed, beams=budget.beams, trees=1)


def dvts(prompts, policy, judge, budget, seed) -> list[SearchResult]:
    """`beams` times step_greedy, each with samples of its own, and the best of their answers (diverse verifier tree search,
    Beeching et al. 2024)."""
    return _explore(_beams, prompts, policy, judge, budget, seed, beams=1, trees=budget.beams)


def mcts(prompts, policy, judge, budget, seed) -> list[SearchResult]:
    """`beams` walks through one tree, where the judge's values say and where few went before (PUCT)."""
    return _explore(_walks, prompts, policy, judge, budget, seed)


Strategy = Callable[
    [Sequence[str], "Policy", StepJudge | None, SearchBudget, int], list[SearchResult]
]

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
