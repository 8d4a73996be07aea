"""The training rows of benchmarks/compare.py: rollouts once, and rows for every method from them.

A regime says what is known of the rollouts: (a) and (e) their answers; (c) and (d) only what a
judge says about them; (b) has search trees. The problems of (d) have 5 or 6 events. All methods of
a regime learn from the same rollouts of the same problems.

The files of a regime: `judge`, pairs with the judge's scores (in (b) with the values of the trees);
`exact`, the same pairs with the checker's scores; `shuffled`, with the judge's scores permuted over
all steps; `whole`, with each side as one step; `cut`, with the chosen steps before the first low
score; `good`, all good samples. A judge of planted AUROC picks and scores its own pairs.
"""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import NormalDist

from common.files import read_records, read_rows, write_records
from common.identity import identity, rows_hash
from common.progress import progress_bar
from common.resumable import ResumableRows
from reasoning.grading import grade_steps, is_correct
from reasoning.problems import problems
from reasoning.records import PreferencePair, Problem, ScoredPair
from reward_model.registry import JudgeArgs, judge_identity, open_judge
from reward_model.solution_pairs import pair_by_answer, pair_by_judge

REGIMES = {
    "a": "answers known, whole solutions",
    "b": "answers known, step pairs from trees",
    "c": "no answers, the judge picks and scores",
    "d": "no answers, every sample is wrong",
    "e": "a second round, on the policy of the first",
}
SAMPLES = 8  # rollouts of a problem
UNIT = 64  # problems that are sampled together
LOW = 0.5  # a step with a lower score counts as wrong
PLANTED = "planted "

Steps = list[str]
Scores = list[float]
# (problem, its samples with the scores of their steps)
Rollouts = list[tuple[Problem, list[tuple[Steps, Scores]]]]
Scorer = Callable[[Problem, Steps], Scores]


# --- rollouts ---


def sample(
    folder: Path, policy_path: str, split: str, skip: int, limit: int, only_failed: bool = False
) -> Path:
    """Write SAMPLES solutions of each problem, with the scores of the GGUF judge. Returns the file.

    One row a problem: `problem`, `steps` (of each sample that ended) and `judge` (their scores).
    only_failed: leave out problems of which a sample is right. The name of the file has a hash of
    all that the rows depend on; if it is there, nothing is sampled."""
    judge_args = JudgeArgs()
    job = {"policy": identity(policy_path), "split": split, "skip": skip, "limit": limit}
    job |= {"only_failed": only_failed} | judge_identity(judge_args)
    path = folder / f"rollouts_{rows_hash([job])[:8]}.jsonl"
    if path.exists():
        return path
    selected = list(itertools.islice(problems(split), skip, skip + limit))
    rows = ResumableRows(path, job)
    with open_judge(judge_args) as judge:
        # torch would slow --help
        from lm.policy import Policy

        policy, done = Policy.load(policy_path), len(rows) * UNIT
        with progress_bar(total=limit, initial=done, desc="sampling", unit="problem") as bar:
            for start in range(done, limit, UNIT):
                group = selected[start : start + UNIT]
                prompts = [problem.prompt for problem in group]
                answers = policy.generate(prompts, n=SAMPLES, temperature=1.0, seed=skip + start)
                ended = [
                    (problem, [a.steps for a in own if a.finished and a.steps])
                    for problem, own in zip(group, answers, strict=True)
                ]
                if only_failed:
                    ended = [(p, own) for p, own in ended if not any(is_correct(s, p) for s in own)]
                known = sorted({(p.prompt, tuple(s)) for p, own in ended for s in own})
                scores = dict(zip(known, judge.score_steps(known), strict=True))
                found = [
                    {
                        "problem": asdict(problem),
                        "steps": own,
                        "judge": [scores[problem.prompt, tuple(steps)] for steps in own],
                    }
                    for problem, own in ended
                ]
                rows.append({"rows": found})
                bar.update(len(group))
    write_records(path, (row for unit in rows.rows for row in unit["rows"]))
    rows.finish()
    return path


def read_rollouts(path: Path) -> Rollouts:
    """The rollouts that `sample` wrote, with the judge's scores; unscored ones are left out."""
    return [
        (
            Problem(**row["problem"]),
            [(s, j) for s, j in zip(row["steps"], row["judge"], strict=True) if j is not None],
        )
        for _, row in read_rows(path)
    ]


def planted_judge(auroc: float) -> Scorer:
    """A judge of this AUROC on steps, 0.5 to 1: the exact label with Gaussian noise, as P(right).

        x = d (2 label - 1) / 2 + z,  z ~ N(0, 1) for every step,  d = sqrt(2) Phi^-1(AUROC)
        score = sigmoid(d x), which is P(right | x) if half of the steps are right

    z depends on the prompt and the steps so far alone."""
    if auroc >= 1:
        return lambda problem, steps: grade_steps(steps, problem)
    distance = 2**0.5 * NormalDist().inv_cdf(auroc)

    def scores(problem: Problem, steps: Steps) -> Scores:
        found = []
        for k, label in enumerate(grade_steps(steps, problem)):
            seed = json.dumps([problem.prompt, *steps[: k + 1]])
            x = distance * (label - 0.5) + random.Random(seed).gauss(0, 1)
            found.append(1 / (1 + math.exp(-distance * x)))
        return found

    return scores


# --- pairs ---


def pick(regime: str, rollouts: Rollouts, limit: int) -> list[tuple[Problem, ScoredPair]]:
    """The first `limit` pairs of a regime other than (b), scored by the rollouts' judge."""
    pairs = []
    for problem, scored in rollouts:
        if not scored:
            continue
        if regime in "ae":
            pair, _ = pair_by_answer(problem, [steps for steps, _ in scored])
        else:
            pair, _ = pair_by_judge(problem, scored)
        if pair:
            by_steps = {tuple(steps): scores for steps, scores in scored}
            pairs.append((problem, _with_scores(pair, lambda s, known=by_steps: known[tuple(s)])))
    return pairs[:limit]


def _with_scores(pair: PreferencePair, scores: Callable[[Steps], Scores]) -> ScoredPair:
    """The pair with the scores of the whole solutions, of which it holds the last steps."""
    known = len(pair.prefix)
    both = {
        f"{side}_scores": scores([*pair.prefix, *getattr(pair, side)])[known:]
        for side in ("chosen", "rejected")
    }
    return ScoredPair(**(vars(pair) | both))


def exactly_scored(pairs: Sequence[tuple[Problem, ScoredPair]]) -> list[ScoredPair]:
    return [
        _with_scores(pair, lambda steps, problem=problem: grade_steps(steps, problem))
        for problem, pair in pairs
    ]


def shuffled(pairs: Sequence[ScoredPair], seed: int) -> list[ScoredPair]:
    """The pairs with their scores permuted over all steps."""
    sides = ("chosen_scores", "rejected_scores")
    pool = [score for pair in pairs for side in sides for score in getattr(pair, side)]
    random.Random(f"shuffled {seed}").shuffle(pool)
    drawn = iter(pool)

    def other(pair: ScoredPair) -> ScoredPair:
        scores = {side: [next(drawn) for _ in getattr(pair, side)] for side in sides}
        return ScoredPair(**(vars(pair) | scores))

    return [other(pair) for pair in pairs]


def as_one_step(pair: ScoredPair) -> ScoredPair:
    """The pair with each side as one step, chosen with score 1: the ids are the same.

    On such rows `--credit uniform` with its anchor is DPO-Positive (docs/pipeline.md)."""
    sides = {side: ["\n".join(getattr(pair, side))] for side in ("chosen", "rejected")}
    return ScoredPair(**(vars(pair) | sides | {"chosen_scores": [1.0], "rejected_scores": [0.0]}))


# --- solutions for SFT ---


def before_low_scores(pairs: Sequence[ScoredPair]) -> list[ScoredPair]:
    """The pairs with the chosen steps before the first one with a low score, if there are any."""
    cut = []
    for pair in pairs:
        good = list(itertools.takewhile(lambda score: score >= LOW, pair.chosen_scores or []))
        if good:
            count = len(good)
            cut.append(
                ScoredPair(**(vars(pair) | {"chosen": pair.chosen[:count], "chosen_scores": good}))
            )
    return cut


def good_samples(regime: str, rollouts: Rollouts, prompts: set[str]) -> Iterator[Problem]:
    """All different samples of the prompts that are right (a, e), or have no low score (c, d)."""
    for problem, scored in rollouts:
        if problem.prompt not in prompts:
            continue
        for steps, scores in {tuple(steps): scores for steps, scores in scored}.items():
            is_good = is_correct(list(steps), problem) if regime in "ae" else min(scores) >= LOW
            if is_good:
                yield Problem(problem.prompt, problem.answer, list(steps))


# --- the files ---


def write_rows(folder: Path, regime: str, rollouts: Rollouts, limit: int) -> None:
    """Write the rows of a regime other than (b): `pairs SCORES`, `cut` and `good` .jsonl."""
    picked = pick(regime, rollouts, limit)
    pairs = [pair for _, pair in picked]
    _write(folder, regime, pairs, exactly_scored(picked))
    good = good_samples(regime, rollouts, {pair.prompt for pair in pairs})
    write_records(folder / f"{regime}_good.jsonl", good)


def write_tree_rows(folder: Path, trees: Path, path: Path, limit: int) -> None:
    """The rows of regime (b), from pairs that utils/build_step_pairs.py made of trees.

    The good samples are the right rollouts of the same trees."""
    by_prompt = {problem.prompt: problem for problem in itertools.islice(problems("train"), 20_000)}
    pairs = list(itertools.islice(read_records(path, ScoredPair), limit))
    _write(folder, "b", pairs, exactly_scored([(by_prompt[pair.prompt], pair) for pair in pairs]))
    prompts, good = {pair.prompt for pair in pairs}, []
    for _, tree in read_rows(trees):
        if tree["prompt"] in prompts:
            solutions = {
                (*node["steps"], *rollout["steps"])
                for node in tree["nodes"]
                for rollout in node["rollouts"]
                if rollout["outcome"] == "right"
            }
            answer = by_prompt[tree["prompt"]].answer
            good += [Problem(tree["prompt"], answer, list(s)) for s in sorted(solutions)]
    write_records(folder / "b_good.jsonl", good)


def _write(folder: Path, regime: str, pairs: list[ScoredPair], exact: list[ScoredPair]) -> None:
    kinds = {
        "judge": pairs,
        "exact": exact,
        "shuffled": shuffled(pairs, 0),
        "whole": [as_one_step(pair) for pair in pairs],
        "cut": before_low_scores(pairs),
    }
    for name, rows in kinds.items():
        write_records(folder / f"{regime}_{name}.jsonl", rows)


def write_planted_rows(folder: Path, auroc: float, rollouts: Rollouts, limit: int) -> None:
    """Pairs of regime (c) that a planted judge picked and scored."""
    judge = planted_judge(auroc)
    scored = [
        (problem, [(steps, judge(problem, steps)) for steps, _ in own]) for problem, own in rollouts
    ]
    pairs = [pair for _, pair in pick("c", scored, limit)]
    write_records(folder / f"c_planted_{auroc:g}.jsonl", pairs)
