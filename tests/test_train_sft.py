"""python train.py sft: ids and labels, the loss by hand, outputs, resuming, mistakes."""

import copy
import itertools
import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import RecordError
from common.files import ROOT, write_records
from reasoning.problems import problems
from reasoning.records import Problem
from reasoning.splits import is_kept_out
from tests.helpers.chat_models import CHATML
from tests.helpers.scripts import run_script
from tests.helpers.training import as_if_killed, flags, refused, train_here
from trainer.sft_trainer import Solution, StepSFTConfig, StepSFTTrainer, encode_solution

pytestmark = pytest.mark.process
PROBLEMS = list(itertools.islice(problems("train"), 20, 47))
PAIR = {
    "prompt": "2 + 3 + 4 = ?",
    "prefix": ["Step 1: 2 + 3 = 5"],
    "chosen": ["Step 2: 5 + 4 = 9", "Answer: 9"],
    "rejected": ["Answer: 8"],
}
SMALL = {"bf16": "false", "seed": 1, "logging_steps": 1, "logs_dir": "logs"}


ACCUMULATED = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 7,
    "num_train_epochs": 3,
    "save_steps": 1,
}
ARGS = flags(
    dataset_name="problems.jsonl",
    model_name_or_path="model",
    save_total_limit=3,
    **ACCUMULATED,
    **SMALL,
)


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory) -> Path:
    """Problems, a copy of the model, and a training of three updates on all solutions: `out`."""
    folder = tmp_path_factory.mktemp("sft")
    write_records(folder / "problems.jsonl", PROBLEMS)
    shutil.copytree(tiny_model_dir, folder / "model")
    done = run_script("train.py", "sft", *ARGS, "--output_dir", "out", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


# --- what is learned from ---


def test_ids_and_labels_written_out(tokenizer):
    """The template and the prompt have no loss; the solution ends with EOS, which has."""
    row = asdict(
        Solution.from_row({"prompt": "1 + 1?", "answer": "2", "steps": ["1 + 1 = 2", "Answer: 2"]})
    )
    encoded = encode_solution(row, tokenizer)
    # <s> Problem : _ 1 _+ _ 1 ? newline Solution : newline
    context = [1, 419, 284, 353, 275, 371, 353, 275, 289, 13, 421, 284, 13]
    # 1 _+ _ 1 _= _ 2 newline Answer : _ 2 </s>
    solution = [275, 371, 353, 275, 355, 353, 276, 13, 420, 284, 353, 276, 2]
    assert encoded == {"input_ids": context + solution, "labels": [-100] * len(context) + solution}


def test_a_pair_teaches_its_chosen_side_without_the_shared_prefix(tokenizer):
    solution = Solution.from_row(PAIR)
    assert solution == Solution(PAIR["prompt"], PAIR["chosen"], PAIR["prefix"])
    encoded = encode_solution(asdict(solution), tokenizer)
    learned = [token for token in encoded["labels"] if token != -100]
    assert tokenizer.decode(learned) == "Step 2: 5 + 4 = 9\nAnswer: 9</s>"
    assert tokenizer.decode(encoded["input_ids"]).endswith(
        "Solution:\nStep 1: 2 + 3 = 5\nStep 2: 5 + 4 = 9\nAnswer: 9</s>"
    )
    unfinished = encode_solution(
        {"prompt": "?", "prefix": [], "steps": ["Step 1: 2 + 3 = 5"]}, tokenizer
    )
    assert (
        tokenizer.decode([token for token in unfinished["labels"] if token != -100])
        == "Step 1: 2 + 3 = 5\n"
    )


def test_a_chat_model_reads_its_own_template(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    encoded = encode_solution({"prompt": "1 + 1?", "prefix": [], "steps": ["Answer: 2"]}, chat)
    text = chat.decode(encoded["input_ids"])
    assert text.startswith("[Solve the problem step by step.") and text.endswith(
        "\n\n1 + 1?]>Answer: 2</s>"
    )
    assert chat.decode([token for token in encoded["labels"] if token != -100]) == "Answer: 2</s>"


def nll_by_hand(model_dir: Path, tokenizer, solved: list[Problem]) -> float:
    """Mean negative log-likelihood of all tokens of all solutions, by an own few lines."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for problem in solved:
        question = f"Problem: {problem.prompt}\nSolution:\n"
        encoded = tokenizer(question + "\n".join(problem.steps), return_offsets_mapping=True)
        first = next(
            i for i, (start, _) in enumerate(encoded["offset_mapping"]) if start >= len(question)
        )
        ids = torch.tensor([*encoded["input_ids"], tokenizer.eos_token_id])
        with torch.no_grad():
            logps = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        total -= sum(logps[i - 1, ids[i]].item() for i in range(first, len(ids)))
        count += len(ids) - first
    return total / count


def test_the_loss_is_the_one_computed_by_hand(folder, tokenizer):
    """The mean over the tokens of the global batch, however it is cut into smaller ones."""
    training = [problem for problem in PROBLEMS if not is_kept_out(problem.prompt)]
    # some are kept out, and the batches differ in size
    assert len(training) < len(PROBLEMS) and len(training) % 4
    history = json.loads((folder / "logs/out/log.json").read_text())["history"]
    assert history[0]["loss"] == pytest.approx(
        nll_by_hand(folder / "model", tokenizer, training), rel=1e-4
    )
    assert history[2]["loss"] < history[0]["loss"]  # the learning rate of the first step is 0


@pytest.mark.parametrize("template", [None, CHATML], ids=["plain", "chat"])
def test_a_packed_batch_is_the_same(folder, tiny_model_dir, tmp_path, template):
    """Loss, gradients and metrics are those of the rows as TRL reads them, to 1e-5."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = template or tokenizer.chat_template
    # two solutions of each problem
    rows = [asdict(Solution(p.prompt, s)) for p in PROBLEMS[:4] for s in (p.steps, p.steps[-1:])]
    config = StepSFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False
    )
    found = []
    for packs in (True, False):
        data = Dataset.from_list(rows)
        trainer = StepSFTTrainer(
            tiny_model_dir, config, train_dataset=data, processing_class=tokenizer
        )
        trainer.current_gradient_accumulation_steps = 1
        batch = trainer.data_collator([trainer.train_dataset[k] for k in range(len(rows))])
        read = sum(block["input_ids"].numel() for block in batch["packed"]["blocks"])
        assert read < (0.65 if template else 0.85) * batch["attention_mask"].sum()
        if not packs:
            del batch["packed"]
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=50)
        loss.backward()
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        gradients = {name: weight.grad for name, weight in trainer.model.named_parameters()}
        found.append((loss.detach(), gradients, metrics))
    (loss, gradients, metrics), (plain_loss, plain_gradients, plain_metrics) = found
    torch.testing.assert_close(loss, plain_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, plain_gradients, atol=1e-5, rtol=1e-4)
    assert metrics == pytest.approx(plain_metrics, abs=1e-5)


# --- what it writes ---


def test_a_training_writes_a_model_that_moved(folder):
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "out"))
    assert before.keys() == after.keys() and all(
        not torch.equal(before[name], after[name]) for name in before
    )
    log = json.loads((folder / "logs/out/log.json").read_text())
    kept_out = sum(is_kept_out(problem.prompt) for problem in PROBLEMS)
    assert (
        log["job"]["command"] == "sft"
        and log["job"]["solutions"] == len(PROBLEMS) - kept_out
        and log["steps"] == 3
    )
    printed = (folder / "stdout").read_text()
    trained = len(PROBLEMS) - kept_out
    assert f"{trained} solutions of problems.jsonl; {kept_out} more are kept out" in printed
    assert "accuracy of the greedy token" in printed and "tokens a second" in printed
    assert printed.splitlines()[-1] == (
        "wrote the tuned model to out, the log to logs/out/log.json, its picture to "
        "logs/out/training.png"
    )
    card = (folder / "out/README.md").read_text()
    title = f"supervised training (SFT) on {trained} solutions of problems.jsonl."
    assert f"model after {title}" in card
    # no pickle
    assert {path.suffix for path in (folder / "out").iterdir() if path.is_file()} == {
        ".safetensors",
        ".jinja",
        ".json",
        ".md",
    }


def test_stopped_in_the_middle_it_ends_with_the_same_weights(folder, monkeypatch, capsys):
    as_if_killed(folder / "out", folder / "killed")
    train_here(folder, monkeypatch, "sft", *ARGS, "--output_dir", "killed")
    assert "resuming from killed/checkpoint-1" in capsys.readouterr().out
    once, again = (load_file(folder / name / "model.safetensors") for name in ("out", "killed"))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_an_adapter_on_pairs_with_evaluation(folder, monkeypatch, capsys):
    rows = [{**PAIR, "prompt": f"2 + 3 + 4 = ? ({k})"} for k in range(30)]
    write_records(folder / "pairs.jsonl", rows)
    (folder / "lora.yaml").write_text(
        "use_peft: true\nlora_r: 4\nlora_target_modules: all-linear\n"
        "eval_strategy: steps\neval_steps: 1\n"
    )
    given = flags(
        dataset_name="pairs.jsonl",
        model_name_or_path="model",
        output_dir="adapter",
        limit=8,
        max_steps=2,
        **SMALL,
    )
    options = flags(config="lora.yaml", save_strategy="no")
    train_here(folder, monkeypatch, "sft", *given, *options)
    assert "wrote the tuned adapter to adapter" in capsys.readouterr().out
    assert json.loads((folder / "adapter/adapter_config.json").read_text())["r"] == 4
    moved = load_file(folder / "adapter/adapter_model.safetensors")
    # B begins at 0
    assert len(moved) == 2 * 7 * 2 and all(weight.abs().max() > 0 for weight in moved.values())
    log = json.loads((folder / "logs/adapter/log.json").read_text())
    assert log["job"]["solutions"] == 8
    assert [entry["step"] for entry in log["history"] if "eval_loss" in entry] == [1, 2]


def test_what_is_cut_or_has_no_answer_is_counted(folder, tmp_path, caplog):
    row = {"prompt": "1 + 1?", "prefix": [], "steps": ["Step 1: 1 + 1 = 2"]}
    rows = [
        row,
        {**row, "steps": [*row["steps"], "Answer: " + "2" * 40]},
        {**row, "prompt": "1 + 1" * 20},
    ]

    def trainer(max_length):
        config = StepSFTConfig(
            tmp_path / "out", max_length=max_length, use_cpu=True, report_to="none"
        )
        return StepSFTTrainer(
            model=str(folder / "model"), args=config, train_dataset=Dataset.from_list(rows)
        )

    with caplog.at_level(logging.WARNING):
        kept = trainer(40).train_dataset
    assert [len(ids) for ids in kept["input_ids"]] == [26, 40]
    assert "2 of 3 solutions state no final answer" in caplog.text
    assert "2 of 3 solutions are longer than max_length 40 and lose their end" in caplog.text
    assert "1 of them all their steps" in caplog.text
    with pytest.raises(ValueError, match="none of 3 solutions fits into max_length 5"):
        trainer(5)


# --- what it refuses ---


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "1 + 1?", "answer": "2"},
            "field 'steps' is missing: expected a solution to learn from",
        ),
        ({"prompt": "1 + 1?", "steps": ["Answer: 2"]}, "field 'answer' is missing"),
        ({"prompt": "1 + 1?", "answer": "2", "steps": [" "]}, "field 'steps', step 1"),
        ({"prompt": "1 + 1?", "chosen": ["Answer: 2"]}, "field 'rejected' is missing"),
        ([1], "expected a JSON object"),
    ],
)
def test_rows_that_are_no_solutions(row, message):
    with pytest.raises(RecordError, match=message.replace("(", "\\(")):
        Solution.from_row(row)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dataset_name", "none.jsonl"], "none.jsonl not found"),
        (["--dataset_name", "bare.jsonl"], "bare.jsonl:1: field 'steps' is missing"),
        (["--dataset_name", "test.jsonl"], ":2: a held-out problem (problems_test.jsonl)"),
        (["--completion_only_loss", "false"], "the loss is always on the steps' tokens"),
        (["--assistant_only_loss", "true"], "the loss is always on the steps' tokens"),
        (["--num_train_epochs", "0"], "num_train_epochs: expected a number above 0"),
        (["--learning_rate", "-1"], "learning_rate: expected a number of 0 or more"),
        (["--beta", "0.1"], "unknown argument --beta"),
        (["--output_dir", "model"], "is the model that training starts from"),
        (["--output_dir", "out"], "out exists: give --overwrite"),
        (["--model_name_or_path", "nowhere"], "model directory nowhere not found"),
        (["--max_length", "5"], "none of 25 solutions fits into max_length 5"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, args, message):
    write_records(folder / "bare.jsonl", [Problem("1 + 1?", "2")])
    with open(ROOT / "data/problems_test.jsonl", encoding="utf-8") as file:
        write_records(folder / "test.jsonl", [PROBLEMS[0], json.loads(file.readline())])
    given = flags(
        dataset_name="problems.jsonl", model_name_or_path="model", output_dir="new", **SMALL
    )
    assert message in refused(folder, monkeypatch, capsys, "sft", *given, *args)
