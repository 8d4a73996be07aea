from itertools import chain

from evaluation.controls import shuffle_scores


def test_shuffled_scores_are_the_same_numbers_elsewhere():
    scores = [[k / 10, k / 10 + 0.01] for k in range(10)] + [[], [0.5]]
    shuffled = shuffle_scores(scores, seed=0)
    assert [len(solution) for solution in shuffled] == [len(solution) for solution in scores]
    assert sorted(chain(*shuffled)) == sorted(chain(*scores)) and shuffled != scores
    assert shuffled == shuffle_scores(scores, seed=0) != shuffle_scores(scores, seed=1)
