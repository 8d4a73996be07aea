"""Every family of models goes the whole way: sample, judge, train (full, LoRA), compare, search.

The models are tiny and random, so this shows that nothing breaks, not that anything is learned."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import inference
import train
from common.files import read_rows, write_records
from evaluation import eval_reward_scores
from lm.policy import Policy
from reasoning.problems import problems
from reasoning.splits import is_kept_out
from reward_model import evaluate_steps
from tests.helpers.families import FAMILIES, make_family
from tests.helpers.mains import call_main
from tests.helpers.training import flags, make_pairs

pytestmark = pytest.mark.slow
PROBLEMS = list(itertools.islice(problems("train"), 4))
PAIRS = [pair for pair in make_pairs(30) if not is_kept_out(pair["prompt"])][:6]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(tmp_path, family):
    """Also where the attention's window is shorter than the text."""
    policy = Policy.load(make_family(family, tmp_path / "base"))
    state = policy.start(PROBLEMS[0].prompt)
    assert len(state.ids) > (getattr(policy.model.config, "sliding_window", None) or 0)
    ((end,),) = policy.rollouts([state], temperature=0.0, max_new_tokens=16)
    ids = torch.tensor([state.ids])
    expected = policy.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16
    )
    assert list(end.ids) == expected[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_way(tmp_path, monkeypatch, capsys, family):
    monkeypatch.chdir(tmp_path)

    def run(main: Callable[[], None], *command: str, **options: object) -> str:
        arguments = [*command, *flags(**options)]
        code, out, err = call_main(main, *arguments, monkeypatch=monkeypatch, capsys=capsys)
        assert code == 0, err[-2000:]
        return out

    make_family(family, tmp_path / "base")
    write_records(tmp_path / "problems.jsonl", PROBLEMS)
    unscored = [
        {key: pair[key] for key in ("prompt", "prefix", "chosen", "rejected")} for pair in PAIRS
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in unscored))
    judge = {"judge": "hf", "judge_path": "base"}
    short = {"max_new_tokens": 12}

    run(evaluate_steps.main, input="pairs.jsonl", output="scored.jsonl", **judge)
    scored = [row for _, row in read_rows(tmp_path / "scored.jsonl")]
    assert len(scored) == len(PAIRS)
    assert all(0 <= score <= 1 for row in scored for score in row["chosen_scores"])

    training = {
        "dataset_name": "scored.jsonl", "model_name_or_path": "base", "logs_dir": "logs",
        "max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "no",
        "logging_steps": 1, "report_to": "none",
    }  # fmt: skip
    for name, lora in (("full", "false"), ("lora", "true")):
        run(train.main, "dpo", **training, use_peft=lora, output_dir=name)
        log = json.loads((tmp_path / "logs" / name / "log.json").read_text())
        losses = [entry["loss"] for entry in log["history"] if "loss" in entry]
        assert len(losses) == 2 and all(loss == loss for loss in losses)
        run(
            eval_reward_scores.main, base_model="base", tuned_model=name, limit=3,
            input="problems.jsonl", output_dir=f"results_{name}", **judge, **short,
        )  # fmt: skip
        (result,) = Path(tmp_path / f"results_{name}").glob("*comparison.json")
        assert "accuracy_improvement" in json.loads(result.read_text())["metrics"]
        for strategy in ("step_greedy", "best_of_n"):
            found = run(
                inference.main, model_name_or_path=name, prompt=PROBLEMS[0].prompt,
                search=strategy, n=2, max_steps=3, **judge, **short,
            )  # fmt: skip
            assert found.strip()
