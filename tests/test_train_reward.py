"""python train.py reward: what it reads, writes and refuses, adapters, resuming, DistilBERT."""

import contextlib
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from common.files import ROOT, write_records
from lm.loading import load_model
from reasoning.datasets.ranking import RankedResponse, check_groups, read_answers, write_answers
from reasoning.problems import problems
from reasoning.splits import is_kept_out
from reward_model.process_reward_model import ProcessRewardModel
from reward_model.process_reward_model import from_causal_lm as prm_from_causal_lm
from reward_model.response_reward_model import ResponseRewardModel, ResponseTokens
from tests.helpers import training
from tests.helpers.reward_models import make_distilbert, make_llama
from tests.helpers.training import flags

pytestmark = pytest.mark.process
PROBLEMS = [
    problem
    for problem in itertools.islice(problems("train"), 40)
    if not is_kept_out(problem.prompt)
][:12]
SMALL = {
    "bf16": "false",
    "logging_steps": 1,
    "logs_dir": "logs",
    "warmup_steps": 0,
    "max_steps": 2,
    "save_strategy": "no",
}


def answers_of(k: int) -> list[RankedResponse]:
    problem = PROBLEMS[k]
    texts = [
        "\n".join(problem.steps),
        "\n".join([*problem.steps[:-1], "Answer: 0"]),
        "\n".join(problem.steps[:-1]),
    ]
    split = "test" if k >= 8 else "train"
    return [
        RankedResponse(problem.prompt, text, rank, "rule:exact", split=split)
        for rank, text in enumerate(texts, 1)
    ]


ROWS = [row for k in range(len(PROBLEMS)) for row in answers_of(k)]


def train_here(folder: Path, monkeypatch, **options: object) -> None:
    training.train_here(folder, monkeypatch, "reward", *flags(**SMALL | options))


def job(folder: Path) -> dict:
    return json.loads((folder / "training_job.json").read_text())


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory) -> Path:
    """A table of 12 groups, 8 of them to train on, and one finished training on it: `out`."""
    folder = tmp_path_factory.mktemp("train_reward")
    write_answers(folder / "answers.csv", ROWS)
    with (
        pytest.MonkeyPatch.context() as monkeypatch,
        open(folder / "stdout", "w") as stdout,
        contextlib.redirect_stdout(stdout),
    ):
        train_here(
            folder,
            monkeypatch,
            dataset_name="answers.csv",
            model_name_or_path=tiny_model_dir,
            output_dir="out",
        )
    return folder


def test_it_trains_on_the_pairs_of_its_split(folder):
    printed = (folder / "stdout").read_text()
    assert "12 rows of answers.csv left out: not of the split train" in printed
    assert "24 pairs of 24 answers" in printed and job(folder / "out")["groups"] == 8
    card = (folder / "out" / "README.md").read_text()
    assert (
        "response reward model on 8 groups of answers.csv" in card
        and "24 pairs of 24 answers" in card
    )
    scorer = ResponseRewardModel(folder / "out", device="cpu")
    assert (
        scorer.format.question == "Right?"
        and scorer.score_response(ROWS[0].prompt, ROWS[0].answer) != 0
    )


def test_the_published_columns_and_pairs_of_texts(folder, tiny_model_dir, monkeypatch, capsys):
    lines = ["prompt;answer;rank"] + [
        f'"{row.prompt}";"{row.answer}";{row.rank}' for row in ROWS[:6]
    ]
    (folder / "published.csv").write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    write_records(
        folder / "pairs.jsonl",
        [{"prompt": f"p{k}", "chosen": "a", "rejected": "b c", "subset": "x"} for k in range(8)],
    )
    for name, groups_left in (
        ("published.csv", 2),
        ("pairs.jsonl", sum(not is_kept_out(f"p{k}") for k in range(8))),
    ):
        output = f"out_{name}"
        train_here(
            folder,
            monkeypatch,
            dataset_name=name,
            model_name_or_path=tiny_model_dir,
            output_dir=output,
            question="",
        )
        assert job(folder / output)["groups"] == groups_left
    assert ResponseRewardModel(folder / output, device="cpu").format.question is None


def test_an_adapter_has_its_head_and_is_trained_further(folder, tiny_model_dir, monkeypatch):
    options = {
        "dataset_name": "answers.csv",
        "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"],
        "learning_rate": 0.01,
    }
    train_here(folder, monkeypatch, **options, model_name_or_path=tiny_model_dir, output_dir="lora")
    assert not (folder / "lora" / "model.safetensors").exists()
    pair = ROWS[0].prompt, ROWS[0].answer
    first = ResponseRewardModel(folder / "lora", device="cpu")
    assert first.format.question == "Right?"
    train_here(folder, monkeypatch, **options, model_name_or_path="lora", output_dir="lora2")
    second = ResponseRewardModel(folder / "lora2", device="cpu").score_response(*pair)
    assert second != pytest.approx(first.score_response(*pair), abs=1e-4)
    # without --use_peft it is merged into its base; learning nothing leaves the scores
    options = {
        "dataset_name": "answers.csv",
        "learning_rate": 0,
        "model_name_or_path": "lora",
        "output_dir": "merged",
    }
    train_here(folder, monkeypatch, **options)
    assert ResponseRewardModel(folder / "merged", device="cpu").score_response(
        *pair
    ) == pytest.approx(first.score_response(*pair), abs=1e-4)


def test_a_reward_model_keeps_its_format(folder, tiny_model_dir, monkeypatch):
    make_llama(tiny_model_dir, folder / "eos", "")
    train_here(
        folder,
        monkeypatch,
        dataset_name="answers.csv",
        model_name_or_path="eos",
        output_dir="on",
        learning_rate=0,
    )
    pair = ROWS[0].prompt, ROWS[0].answer
    before, after = (ResponseRewardModel(folder / name, device="cpu") for name in ("eos", "on"))
    assert after.format.question is None and before.score_response(*pair) == pytest.approx(
        after.score_response(*pair), abs=1e-5
    )


def test_a_reward_model_from_a_prm_reads_as_the_prm_did(folder, tiny_model_dir, monkeypatch):
    model, tokenizer = load_model(tiny_model_dir, torch.float32)
    prm = prm_from_causal_lm(model, tokenizer)
    torch.nn.init.normal_(prm.score.weight, generator=torch.Generator().manual_seed(0))
    prm.save_pretrained(folder / "prm")
    tokenizer.save_pretrained(folder / "prm")
    train_here(
        folder,
        monkeypatch,
        dataset_name="answers.csv",
        model_name_or_path="prm",
        output_dir="of_prm",
        learning_rate=0,
    )
    config = json.loads((folder / "of_prm" / "config.json").read_text())
    assert (
        config["architectures"] == ["LlamaForSequenceClassification"]
        and config["reward_step_token"] == "<next>"
    )
    assert not {"step_token", "running_min"} & config.keys()  # it is no PRM any more
    scorer, judge = (
        ResponseRewardModel(folder / "of_prm", device="cpu"),
        ProcessRewardModel(folder / "prm", device="cpu"),
    )
    # the head's bias is 0
    (values,) = judge.score_steps([(ROWS[0].prompt, ROWS[0].answer.split("\n"))])
    score = scorer.score_response(ROWS[0].prompt, ROWS[0].answer)
    assert abs(score) > 0.01 and 1 / (1 + math.exp(-score)) == pytest.approx(values[-1], abs=1e-5)
    (whole, _), (short, over) = (
        ResponseTokens(tokenizer, n, None, "<next>").encode([("1 + 1?", "Answer: 2")])[0]
        for n in (None, 8)
    )
    assert short == [whole[0], *whole[-7:]] and over == len(whole) - 8


def test_distilbert_by_its_config(folder, monkeypatch, capsys):
    config = ROOT / "configs/reward_distilbert.yaml"
    published = yaml.safe_load(config.read_text())
    assert (
        published["learning_rate"],
        published["per_device_train_batch_size"],
        published["max_steps"],
    ) == (5e-5, 4, 100)
    make_distilbert(folder / "bert", head=False)  # as it is published: for masked words
    given = {
        "config": config,
        "dataset_name": "answers.csv",
        "model_name_or_path": "bert",
        "output_dir": "out_bert",
    }
    train_here(folder, monkeypatch, **given)
    printed = capsys.readouterr().out
    assert "answers are over 64 tokens with their prompt and lose tokens at its start" in printed
    settings = job(folder / "out_bert")
    assert (settings["learning_rate"], settings["per_device_train_batch_size"]) == (5e-5, 4)
    assert ResponseRewardModel(folder / "out_bert", device="cpu").score_response("1 + 1?", "2") != 0


def test_a_stopped_training_resumes(folder, tiny_model_dir, monkeypatch):
    options = {
        "dataset_name": "answers.csv",
        "model_name_or_path": tiny_model_dir,
        "output_dir": "stopped",
    }
    options |= {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "save_total_limit": 3}
    train_here(folder, monkeypatch, **options)
    out = folder / "stopped"
    whole = ResponseRewardModel(out, device="cpu").score_response(ROWS[0].prompt, ROWS[0].answer)
    for path in (out / "config.json", out / "model.safetensors"):
        path.unlink()
    train_here(folder, monkeypatch, **options, **{"resume_from_checkpoint": "stopped/checkpoint-2"})
    again = ResponseRewardModel(out, device="cpu").score_response(ROWS[0].prompt, ROWS[0].answer)
    assert again == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,answer,rank\np,a,1\np,b,\n", "some of its answers have no rank"),
        ("prompt,answer,rank\np,a,1\np,b,x\n", "column 'rank'"),
        ("prompt,answer,rank\np,a,1\np,b,3\n", "leave one out"),
        ("prompt,answer,rank\np,a,1\n", "one answer"),
        ("prompt,answer,rank\np,a,1\np,,2\n", "column 'answer'"),
        (
            "prompt,answer,rank,split\np,a,1,test\np,b,2,test\n",
            "none of its 2 rows is ranked and of the split train",
        ),
        ("prompt,answer,rank\np,a,\np,b,\n", "none of its 2 rows is ranked"),
        ("", "header"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_line(
    folder, tiny_model_dir, monkeypatch, capsys, text, message
):
    (folder / "bad.csv").write_text(text)
    given = {"dataset_name": "bad.csv", "model_name_or_path": tiny_model_dir, "output_dir": "bad"}
    args = ["reward", *flags(**SMALL | given)]
    line = training.refused(folder, monkeypatch, capsys, *args)
    assert message in line and "bad.csv" in line


def test_held_out_problems_are_refused(folder, tiny_model_dir, monkeypatch, capsys):
    prompt = next(problems("test")).prompt
    rows = [RankedResponse(prompt, text, rank) for rank, text in ((1, "Answer: 1"), (2, "?"))]
    write_answers(folder / "held.csv", rows)
    given = {"dataset_name": "held.csv", "model_name_or_path": tiny_model_dir, "output_dir": "bad"}
    args = ["reward", *flags(**SMALL | given)]
    assert "held-out problem" in training.refused(folder, monkeypatch, capsys, *args)


def test_every_group_of_the_committed_table_lands_in_one_split():
    found = [*(ROOT / "data").glob("answers.csv"), *(ROOT / "data").glob("answers.csv.gz")]
    if not found:
        pytest.skip("data/answers.csv.gz is not there")
    (path, *_) = found
    rows = read_answers(path)
    check_groups(rows, path)
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row.prompt, set()).add(row.split)
    assert all(len(names) == 1 for names in splits.values())
    assert len(splits) >= 1000 and set().union(*splits.values()) == {"train", "validation", "test"}
