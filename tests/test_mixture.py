"""Several data sets for one training: their shares, their order, and what is refused."""

import json

import pytest

from common.errors import UserError
from common.files import write_records
from evaluation.eval_reward_scores import training_pairs
from reasoning.splits import is_kept_out
from tests.helpers.training import flags, make_pairs, refused, train_here
from trainer.data import DataArgs, mix

SETS = [[f"a{k}" for k in range(70)], [f"b{k}" for k in range(300)]]


def test_all_rows_of_all_data_sets_without_weights():
    mixed = mix(SETS, None, 0)
    assert len(mixed) == 370
    for number, rows in enumerate(SETS):
        assert [row for source, row in mixed if source == number] == rows
    assert mix(SETS[:1], None, 0) == [(0, row) for row in SETS[0]]
    assert mix([[], ["b"]], None, 0) == [(1, "b")]


@pytest.mark.parametrize(
    ("weights", "counts"),
    [([0.7, 0.3], (70, 30)), ([7, 3], (70, 30)), ([1, 100], (3, 300)), ([1, 1], (70, 70))],
)
def test_the_largest_mixture_with_these_shares(weights, counts):
    mixed = mix(SETS, weights, 0)
    drawn = [[row for number, row in mixed if number == source] for source in (0, 1)]
    assert tuple(map(len, drawn)) == counts
    for rows, own in zip(drawn, SETS, strict=True):
        assert len(set(rows)) == len(rows) and rows == sorted(rows, key=own.index)


def test_the_seed_draws_and_a_beginning_has_the_shares_of_the_whole():
    mixed = mix(SETS, [0.7, 0.3], 0)
    assert mixed == mix(SETS, [0.7, 0.3], 0) != mix(SETS, [0.7, 0.3], 1)
    assert {row for _, row in mixed} & set(SETS[1]) != set(SETS[1][:30]), "not the first rows"
    for length in (10, 20, 50):
        count = sum(number == 0 for number, _ in mixed[:length])
        assert abs(count - 0.7 * length) <= 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset_weights": [0.7]}, "expected 2 numbers above 0, one for each of --dataset_name"),
        ({"dataset_weights": [0.7, 0.0]}, "above 0, one for each of --dataset_name, got 0.7 0"),
        ({"dataset_config": ["x", "y", "z"]}, "--dataset_config: expected one value, or one for"),
        ({"dataset_train_split": []}, "--dataset_train_split: expected one value, or one for each"),
        ({"dataset_name": ["a.jsonl", "./a.jsonl"]}, "./a.jsonl is there twice"),
    ],
)
def test_mistakes_are_one_line(given, message):
    with pytest.raises(UserError, match=message):
        DataArgs(**{"dataset_name": ["a.jsonl", "b.jsonl"], **given})


def test_configurations_and_splits_are_one_for_all_or_one_for_each():
    args = DataArgs(dataset_name=["a", "b"], dataset_config=["x", "y"])
    assert [data.source for data in args.data_sets] == [("a", "x", "train"), ("b", "y", "train")]
    args = DataArgs(dataset_name=["a", "a"], dataset_train_split=["train", "test"])
    assert [data.source for data in args.data_sets] == [("a", None, "train"), ("a", None, "test")]
    assert [data.label for data in args.data_sets] == ["a", "a test"]


@pytest.mark.process
def test_a_training_on_a_mixture(tiny_model_dir, tmp_path, monkeypatch, capsys):
    """The log, the job and the card name the data sets and the number of rows of each."""
    rows = [row for row in make_pairs(60) if not is_kept_out(row["prompt"])][:40]
    write_records(tmp_path / "a.jsonl", rows[:10])
    write_records(tmp_path / "b.jsonl", rows[10:])
    (tmp_path / "both.yaml").write_text(
        "dataset_name: [a.jsonl, b.jsonl]\ndataset_weights: [0.5, 0.5]\n"
    )
    settings = {"model_name_or_path": tiny_model_dir, "logs_dir": "logs", "max_steps": 1}
    given = [*flags(**settings, bf16="false", save_strategy="no"), "--config", "both.yaml"]
    train_here(tmp_path, monkeypatch, "dpo", *given, "--output_dir", "out")
    printed = capsys.readouterr().out
    assert "20 pairs of a.jsonl (10) and b.jsonl (10); 0 more are kept out" in printed
    assert "20 more are not used, because of --dataset_weights" in printed
    job = json.loads((tmp_path / "out/training_job.json").read_text())
    assert job["dataset"] == {"a.jsonl": 10, "b.jsonl": 10} and job["pairs"] == 20
    assert json.loads((tmp_path / "logs/out/log.json").read_text())["job"] == job
    assert "20 pairs of a.jsonl (10) and b.jsonl (10)" in (tmp_path / "out/README.md").read_text()
    assert "several data sets" in training_pairs(str(tmp_path / "out"))[2]

    again = [*given, "--output_dir", "second"]
    error = refused(tmp_path, monkeypatch, capsys, "dpo", *again, "--limit", "1")
    assert "b.jsonl: none of its 30 pairs is trained on" in error
    error = refused(tmp_path, monkeypatch, capsys, "dpo", *again, "--dataset_weights", "1")
    assert "--dataset_weights: expected 2 numbers" in error
    error = refused(tmp_path, monkeypatch, capsys, "dpo", *again, "--dataset_name", "a.jsonl", "c")
    assert "c" in error and not (tmp_path / "second").exists()
