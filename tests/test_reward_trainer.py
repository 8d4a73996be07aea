"""The reward trainer: pairs of a group, the loss by hand, what is cut, that parameters move."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.errors import RecordError
from reasoning.datasets.ranking import RankedGroup
from reward_model.response_reward_model import ResponseRewardModel
from tests.helpers.reward_models import make_distilbert, make_llama
from trainer.reward_trainer import (
    GroupSampler,
    ResponseRewardConfig,
    ResponseRewardTrainer,
    pairs_of,
)

GROUPS = [
    {
        "prompt": "1 + 1?",
        "answers": ["Answer: 2", "Step 1: 1 + 1 = 3\nAnswer: 3", "?"],
        "ranks": [1, 2, 3],
    },
    {
        "prompt": "What is 2 + 2?",
        "answers": ["Answer: 5", "Answer: 4", "Answer: 6"],
        "ranks": [2, 1, 2],
    },
]
PAIRS = [(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 1, 0), (1, 1, 2)]  # group, better, worse


def make_trainer(folder: str, output, groups=GROUPS, **options) -> ResponseRewardTrainer:
    settings = {
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "warmup_steps": 0,
    }
    settings |= {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 1}
    return ResponseRewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32),
        ResponseRewardConfig(str(output), **settings | options),
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_list(groups),
    )


@pytest.fixture(scope="module")
def llama(tiny_model_dir, tmp_path_factory) -> str:
    return make_llama(tiny_model_dir, tmp_path_factory.mktemp("reward") / "llama")


def test_pairs_of_a_group():
    assert pairs_of([1, 2, 3]) == [(0, 1), (0, 2), (1, 2)]
    assert pairs_of([2, 1, 2]) == [(1, 0), (1, 2)]  # those that share a rank are no pair
    assert pairs_of([1, 1]) == []


def test_a_row_is_a_group():
    group = RankedGroup("p", ["a", "b"], [1, 2])
    assert RankedGroup.from_row({"prompt": "p", "answers": ["a", "b"], "ranks": [1, 2]}) == group
    for row, message in (
        ({"prompt": " ", "answers": ["a", "b"], "ranks": [1, 2]}, "field 'prompt'"),
        ({"prompt": "p", "answers": ["a"], "ranks": [1, 2]}, "field 'answers'"),
        ({"prompt": "p", "answers": ["a", "b"], "ranks": [1]}, "field 'ranks'"),
        ("p", "field 'answers'"),
    ):
        with pytest.raises(RecordError, match=message):
            RankedGroup.from_row(row)


@pytest.mark.parametrize(
    "options",
    [{}, {"rank_margin": 0.7}, {"center_rewards_coefficient": 0.3}],
    ids=["plain", "margin", "centered"],
)
def test_the_loss_of_a_batch_by_hand(llama, tmp_path, options):
    trainer = make_trainer(llama, tmp_path, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.eval(), dict(batch)).item()

    scorer = ResponseRewardModel(llama, device="cpu")
    scorer.model.double()
    rewards = {
        (k, a): scorer.score_response(group["prompt"], text)
        for k, group in enumerate(GROUPS)
        for a, text in enumerate(group["answers"])
    }
    losses, squares = [], []
    for k, better, worse in PAIRS:
        ranks = GROUPS[k]["ranks"]
        gap = (
            rewards[k, better]
            - rewards[k, worse]
            - options.get("rank_margin", 0) * (ranks[worse] - ranks[better])
        )
        losses.append(math.log1p(math.exp(-gap)))
        squares.append((rewards[k, better] + rewards[k, worse]) ** 2)
    expected = (sum(losses) + options.get("center_rewards_coefficient", 0) * sum(squares)) / len(
        PAIRS
    )
    assert loss == pytest.approx(expected, rel=1e-6, abs=1e-5)
    assert (
        len(batch["input_ids"]) == 2 * len(PAIRS)
        and trainer.balance == "5 pairs of 6 answers, 1 ties left out"
    )


def test_pairs_come_by_group_and_each_answer_is_read_once(llama, tmp_path):
    trainer = make_trainer(llama, tmp_path)
    sampler = trainer._get_train_sampler()
    assert tuple(sampler) in {(0, 1, 2, 3, 4), (3, 4, 0, 1, 2)} and len(sampler) == 5
    read = []
    hook = trainer.model.register_forward_pre_hook(
        lambda _, args, given: read.append(given["input_ids"]), with_kwargs=True
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    hook.remove()
    assert len(batch["input_ids"]) == 10 and [len(ids) for ids in read] == [6]


def test_groups_of_like_length_are_near_each_other_in_another_order_each_epoch():
    lengths = torch.randint(20, 200, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    sizes = [6, 5] * 100
    sampler, orders = GroupSampler(sizes, lengths, seed=0), set()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert rows == list(sampler) and sorted(rows) == list(range(1100)) and len(sampler) == 1100
        groups = [2 * (row // 11) + (row % 11 > 5) for row in rows]
        order = [group for k, group in enumerate(groups) if k == 0 or group != groups[k - 1]]
        assert len(order) == 200  # the rows of a group stay together
        batches = [[lengths[group] for group in order[k : k + 4]] for k in range(0, 200, 4)]
        assert sum(lengths) / sum(4 * max(batch) for batch in batches) > 0.85  # 0.7 in random order
        orders.add(tuple(order))
    assert len(orders) == 3


def test_shuffled_ranks_say_nothing(llama, tmp_path):
    groups = [GROUPS[0] | {"prompt": f"1 + {k}?"} for k in range(300)]
    best, *_ = make_trainer(llama, tmp_path, groups[:1]).train_dataset["chosen_ids"]
    rows = make_trainer(llama, tmp_path, groups, shuffle_ranks=True).train_dataset
    # the same answer, to any prompt
    of_best = [better[-len(best) + 8 :] == best[8:] for better in rows["chosen_ids"]]
    assert len(rows) == 900 and 0.27 < sum(of_best) / len(rows) < 0.40
    again = make_trainer(llama, tmp_path, groups, shuffle_ranks=True).train_dataset
    assert again["chosen_ids"] == rows["chosen_ids"]


@pytest.mark.process
@pytest.mark.parametrize("kind", ["llama", "distilbert"])
def test_parameters_move_and_the_pairs_are_learned(llama, tmp_path, kind):
    folder = llama if kind == "llama" else make_distilbert(tmp_path / "bert")
    trainer = make_trainer(folder, tmp_path / "out", num_train_epochs=12, learning_rate=3e-3)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    still = {
        name
        for name, weight in trainer.model.named_parameters()
        if torch.equal(weight, before[name])
    }
    assert not still
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert logs[-1]["loss"] < 0.7 * logs[0]["loss"] and logs[-1]["accuracy"] == 1
    trainer.save_model(str(tmp_path / "saved"))
    scorer = ResponseRewardModel(tmp_path / "saved", device="cpu")
    scores = [
        scorer.score([(group["prompt"], text) for text in group["answers"]]) for group in GROUPS
    ]
    assert all(scores[k][better] > scores[k][worse] for k, better, worse in PAIRS)
    assert scorer.format.question == ("Right?" if kind == "llama" else None)


def test_what_is_too_long_is_cut_and_counted_not_dropped(tmp_path):
    folder = make_distilbert(tmp_path / "bert")  # 64 positions
    groups = [*GROUPS, {"prompt": "a " * 70, "answers": ["b", "c", "d " * 80], "ranks": [1, 2, 3]}]
    trainer = make_trainer(folder, tmp_path / "out", groups, max_length=1024)
    assert len(trainer.train_dataset) == 8 and "3 answers are over 64 tokens" in trainer.balance
    ids = [row[side] for row in trainer.train_dataset for side in ("chosen_ids", "rejected_ids")]
    # [CLS] ... [SEP]
    assert max(map(len, ids)) == 64 and all(row[0] == 2 and row[-1] == 3 for row in ids)
    short = make_trainer(folder, tmp_path / "out", groups, max_length=32)
    assert short.format.max_length == 32 and all(
        len(row["chosen_ids"]) <= 32 for row in short.train_dataset
    )
    alike = [{"prompt": "p", "answers": ["a " + "b " * 90, "c " + "b " * 90], "ranks": [1, 2]}]
    assert "1 pairs are equal after that" in make_trainer(folder, tmp_path / "out", alike).balance


def test_nothing_to_learn_from(llama, tmp_path):
    with pytest.raises(ValueError, match="none of 1 groups gives a pair"):
        make_trainer(llama, tmp_path, [{"prompt": "p", "answers": ["a", "b"], "ranks": [1, 1]}])
    for options in ({"rank_margin": -1.0}, {"max_length": 3}, {"learning_rate": -1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ResponseRewardConfig(str(tmp_path), use_cpu=True, **options)
