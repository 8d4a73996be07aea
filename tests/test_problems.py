"""The problem world: its sizes, its splits, its exact solutions and its mistakes."""

import itertools
import random

import pytest

from reasoning import problems as world
from reasoning.grading import grade_steps


@pytest.fixture(scope="module")
def stories():
    """3000 stories of pretrain and train; 300 of each other split, which take longer."""
    counts = {split: 3000 if split in ("pretrain", "train") else 300 for split in world.SPLITS}
    drawn = {split: world.stories(split) for split in counts}
    return {split: list(itertools.islice(drawn[split], n)) for split, n in counts.items()}


def test_a_story_by_hand():
    story = world.Story(
        "Mia",
        "apples",
        42,
        (world.Event("lose", 0, 17), world.Event("times", 0, 3), world.Event("sets", 0, 3, 4)),
    )
    assert story.prompt() == (
        "Mia has 42 apples. She loses 17 apples. Soon there are 3 times as many apples. "
        "She gets 3 boxes of 4 apples. How many apples does Mia have now?"
    )
    problem = story.problem()
    assert problem.steps == [
        "Step 1: 42 - 17 = 25",
        "Step 2: 25 * 3 = 75",
        "Step 3: 3 * 4 = 12, 75 + 12 = 87",
        "Answer: 87",
    ]
    assert problem.traps == [True, True, True, False]
    mistakes = [
        event.trap_mistake(value)
        for event, value in zip(story.events, story.values(), strict=False)
    ]
    assert mistakes == [("42 - 17 = 35", 35), ("25 + 3 = 28", 28), ("3 + 4 = 7, 75 + 7 = 82", 82)]


def test_all_events_forms_and_lengths_occur(stories):
    assert len(world.NAMES) >= 20 and len(world.THINGS) >= 20 and len(world.FORMS) >= 6
    assert all(len(forms) >= 2 for _, forms in world.FORMS.values())
    events = [event for story in stories["train"] for event in story.events]
    assert {(event.kind, event.form) for event in events} == {
        (kind, form) for kind, (_, forms) in world.FORMS.items() for form in range(len(forms))
    }
    assert {len(story.events) for story in stories["train"]} == {2, 3, 4, 5, 6}
    assert {len(story.events) for story in stories["hard"]} == {5, 6}


def test_references_are_right_and_values_small(stories):
    for split in stories:
        for story in stories[split][:500]:
            problem = story.problem()
            assert all(grade_steps(problem.steps, problem)), problem
            assert all(1 <= value <= world.MAX_VALUE for value in story.values())
            assert len(problem.traps) == len(problem.steps) == len(story.events) + 1


def test_splits_are_disjoint_by_text_and_by_events(stories):
    for key in (
        world.Story.prompt,
        lambda story: (story.start, tuple((e.kind, e.k, e.m) for e in story.events)),
    ):
        seen = {split: {key(story) for story in stories[split]} for split in stories}
        for first, second in itertools.combinations(seen, 2):
            if (first, second) == ("train", "hard_train"):
                continue  # both are trained on
            assert not seen[first] & seen[second], (first, second)


def test_no_problem_twice(stories):
    for split in stories:
        assert len({story.prompt() for story in stories[split]}) == len(stories[split])


def test_rates_of_mistakes(stories):
    """Within 3 standard errors of the stated rates, and traps cover about a fifth of the steps."""
    rng = random.Random(0)
    wrong, met, traps, steps = {True: 0, False: 0}, {True: 0, False: 0}, 0, 0
    for story in itertools.islice(world.stories("pretrain"), 8000):
        value = story.start
        solution, mistakes = story.human_solution(rng)
        traps, steps = traps + sum(story.problem().traps), steps + len(story.problem().steps)
        for k, event in enumerate(story.events):
            trap = event.is_trap(value)
            met[trap] += 1
            wrong[trap] += mistakes[k]
            value = int(solution[k].rsplit("= ", 1)[1])
        assert solution[-1] == f"Answer: {value}"
    for trap, rate in ((True, world.TRAP_MISTAKE_RATE), (False, world.SLIP_RATE)):
        assert abs(wrong[trap] / met[trap] - rate) < 3 * (rate * (1 - rate) / met[trap]) ** 0.5
    assert 0.15 < traps / steps < 0.25


def test_corrupted_solutions_are_wrong_from_one_step_on(stories):
    rng = random.Random(0)
    for story in stories["train"][:500]:
        problem = story.problem()
        scores = grade_steps(world.corrupted(story, rng), problem)
        assert len(scores) == len(problem.steps)
        assert scores == sorted(scores, reverse=True)
        assert 0 in scores
