"""Warnings about scores that tell nothing apart."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from reasoning.records import PreferencePair
from reward_model.score_checks import alike, not_above, warn_of_pair_scores


def pairs_of(differences: list[float], prompts: int | None = None) -> list[PreferencePair]:
    """Pairs whose sides differ by these numbers in the mean of two scores."""
    return [
        PreferencePair(
            f"p {k % (prompts or len(differences))}",
            ["a", "b"],
            ["c", "d"],
            [],
            [0.5 + d, 0.5 + d],
            [0.25, 0.75],
        )
        for k, d in enumerate(differences)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_is_students(seed):
    values = np.random.default_rng(seed).normal(0.03, 0.1, 20).clip(-0.4, 0.4).tolist()
    interval = ttest_1samp(values, 0).confidence_interval(0.95)
    reason = not_above(pairs_of(values))
    assert bool(reason) == (interval.low <= 0)
    if reason:
        assert f"{interval.low:.3f} to {interval.high:.3f}, n = 20 prompts" in reason


def test_what_is_said():
    assert not_above(pairs_of([0.1, 0.2, 0.15, 0.12])) == ""
    assert "not clearly" in not_above(pairs_of([0.4, -0.1, 0.0, 0.1]))
    lower = not_above(pairs_of([-0.1, -0.2, -0.15]))
    assert "chosen is not scored above rejected (mean difference -0.150" in lower
    assert not_above(pairs_of([0.1])) == "" and "no interval, n = 1 prompt)" in not_above(
        pairs_of([-0.1])
    )
    assert "n = 2 prompts" in not_above(pairs_of([0.1, 0.1, -0.2, -0.2], prompts=2))


def test_scores_that_are_all_alike():
    assert "0.500 to 0.504" in alike([0.5, 0.504] * 10) and "n = 20" in alike([0.5, 0.504] * 10)
    assert alike([0.5] * 9) == "" and alike([0.5, 0.6] * 10) == ""


def test_one_block_for_everything(capsys):
    warn_of_pair_scores(pairs_of([0.1, 0.2, 0.15, 0.12]))
    assert capsys.readouterr() == ("", "")
    rows = [PreferencePair(f"{k}", ["a"], ["b"], [], [0.5], [0.5]) for k in range(8)]
    warn_of_pair_scores(rows)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[0].startswith("warning: all scores are alike")
    assert "n = 8 prompts" in lines[1] and lines[2].startswith("  what to do:")
