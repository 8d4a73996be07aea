"""Preference pairs of whole solutions to one problem: by their answers, or by a judge."""

from dataclasses import replace

from reasoning.grading import is_correct
from reasoning.records import PreferencePair, Problem, Prompt
from reward_model.protocols import aggregate

Steps = list[str]


def pair_by_answer(problem: Problem, samples: list[Steps]) -> tuple[PreferencePair | None, str]:
    """(pair, why there is none): the first right sample against the first wrong one."""
    right = [steps for steps in samples if is_correct(steps, problem)]
    wrong = [steps for steps in samples if steps not in right]
    if not right or not wrong:
        return None, "no right sample" if wrong else "no wrong sample"
    return PreferencePair.from_solutions(problem.prompt, right[0], wrong[0]), ""


def pair_by_judge(
    problem: Prompt, scored: list[tuple[Steps, list[float]]], judge: str | None = None
) -> tuple[PreferencePair | None, str]:
    """(pair, why there is none): the sample with the highest mean step score against the lowest.

    judge: the record of the judge (reward_model/registry.py); then the pair keeps its scores."""
    ranked = sorted(scored, key=lambda sample: aggregate(sample[1]))
    (worse, low), (better, high) = ranked[0], ranked[-1]
    if aggregate(high) == aggregate(low):
        return None, "all scores equal"
    pair = PreferencePair.from_solutions(problem.prompt, better, worse)
    if judge is not None:
        k = len(pair.prefix)
        pair = replace(pair, chosen_scores=high[k:], rejected_scores=low[k:], judge=judge)
    return pair, ""
