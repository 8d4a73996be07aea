"""Pairs a second of stepwise DPO on packed batches, against TRL's DPOTrainer on the same pairs.

    python benchmarks/dpo_speed.py          # about 5 minutes on 2 cores
    python benchmarks/dpo_speed.py --model_name_or_path models/smollm2-135m-instruct \
        --per_device_train_batch_size 3 --pairs 3          # about 10 minutes

Five cases. a: one step after a long prefix. b: the rest of a solution. c: whole solutions. d: four
next steps of one state, a right one and three wrong ones, as three pairs. e: the committed pairs.
The pairs of a, b and d come from the problem world, and a wrong step has a wrong result. They are
those whose prefix and branch are nearest to 115 and 15 tokens (a, d), or to 70 and 60 tokens (b).

Both trainers have the same model, precision and batch size, and make the same number of updates
with AdamW. They take turns, each in a process of its own; a figure is the median of the rounds.
"the different tokens alone" reads as many tokens as the trees of the batch have, as plain rows
without any padding, and predicts as many. --sizes measures how the time of an update grows with the
pairs in it, on case e.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.turns import Variant
from common.cli import arg, check_input, check_least, check_model, parse_args, run
from common.errors import UserError
from common.files import at_root, read_records
from common.progress import Bar
from evaluation.metrics import Metric
from evaluation.results import output_paths, print_table, write_result
from reasoning.problems import problems
from reasoning.records import ScoredPair

# case -> (tokens of the prefix with its prompt, tokens of a branch) to come near to
LENGTHS = {"a": (115, 15), "b": (70, 60), "d": (115, 15)}
CASES = ("a", "b", "c", "d", "e")
TRL, OURS, ALONE = "TRL's DPOTrainer", "packed", "the different tokens alone"
COLUMNS = (
    *("case", "prefix", "branch", "TRL: pairs/s", "packed: pairs/s", "ratio"),
    *("time / different tokens alone", "TRL: GB", "packed: GB"),
)


@dataclass
class SpeedArguments:
    model_name_or_path: str = arg(at_root("models/policy-mini"), "the policy")
    dataset_name: str = arg(at_root("data/rewarded.jsonl"), "scored pairs of the cases c and e")
    cases: list[str] = arg([*CASES], "the cases to measure", choices=[*CASES])
    bf16: bool = arg(False, "bf16 autocast, for a GPU or a CPU that has the instructions")
    per_device_train_batch_size: int = arg(16, "pairs of an update; case d has three a state")
    pairs: int = arg(48, "pairs of a round")
    rounds: int = arg(5, "timings of each way")
    sizes: list[int] = arg(
        [], "numbers of pairs in an update, for the curve of cost against size (case e)"
    )
    output_dir: str = arg(
        at_root("evaluation/results"), "folder of dpo_speed_MODEL.json and its picture"
    )
    overwrite: bool = arg(False, "replace the results of an earlier run")

    def __post_init__(self) -> None:
        check_least(self, pairs=1, rounds=1, per_device_train_batch_size=1)
        if min(self.sizes, default=1) < 1:
            raise UserError(f"argument --sizes: expected 1 or more, got {min(self.sizes)}")


# --- the pairs ---


def step_pairs(whole: bool) -> Iterator[list[ScoredPair]]:
    """Of every state of many problems: the right next step against three wrong ones.

    whole: the rest of the solution instead of one step."""
    for problem in islice(problems("train"), 600):
        for k, step in enumerate(problem.steps[:-1]):
            *text, result = step.split(" ")
            chosen = problem.steps[k:] if whole else [step]
            yield [
                ScoredPair(
                    problem.prompt,
                    chosen=chosen,
                    rejected=[" ".join([*text, str(int(result) + wrong)]), *chosen[1:]],
                    prefix=problem.steps[:k],
                    chosen_scores=[1.0] * len(chosen),
                    rejected_scores=[0.0] * len(chosen),
                )
                for wrong in (1, 2, 3)
            ]


def tokens_of(tokenizer: Any, pair: ScoredPair, steps: list[str]) -> tuple[int, int]:
    """(tokens of prompt and prefix, tokens of these steps behind them)."""
    from lm.text_encoding import encode_steps

    before = len(encode_steps(tokenizer, pair.prompt, pair.prefix, [])[0])
    return before, len(encode_steps(tokenizer, pair.prompt, pair.prefix, steps)[0]) - before


def pairs_of(case: str, args: SpeedArguments) -> list[ScoredPair]:
    """The pairs of a case, those of one state behind one another."""
    if case in LENGTHS:
        from lm.loading import load_tokenizer

        tokenizer = load_tokenizer(args.model_name_or_path)

        def distance(state: list[ScoredPair]) -> int:
            found = tokens_of(tokenizer, state[0], state[0].chosen)
            return sum(abs(count - aim) for count, aim in zip(found, LENGTHS[case], strict=True))

        states = sorted(step_pairs(whole=case == "b"), key=distance)
        return [pair for state in states for pair in (state if case == "d" else state[:1])][
            : args.pairs
        ]
    rows = list(islice(read_records(args.dataset_name, ScoredPair), args.pairs))
    if case == "e":
        return rows
    shared = [len(pair.prefix) for pair in rows]
    return [
        ScoredPair(
            pair.prompt,
            chosen=[*pair.prefix, *pair.chosen],
            rejected=[*pair.prefix, *pair.rejected],
            chosen_scores=[1.0] * count + pair.chosen_scores,
            rejected_scores=[1.0] * count + pair.rejected_scores,
        )
        for pair, count in zip(rows, shared, strict=True)
    ]


# --- what is measured, in a process of its own ---


def make_trainer(
    args: SpeedArguments, pairs: list[ScoredPair], trl: bool, size: int, folder: str
) -> Any:
    from dataclasses import asdict

    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from lm.loading import load_tokenizer, pick_device
    from lm.text_encoding import format_prompt, response_pieces
    from trainer.session import silence_libraries
    from trainer.stepwise_dpo_trainer import StepwiseDPOConfig, StepwiseDPOTrainer

    silence_libraries()
    settings: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": size,
        "learning_rate": 1e-6,
        "use_cpu": pick_device()[0] == "cpu",
        "bf16": args.bf16,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": 1024,
        "model_init_kwargs": {"dtype": "float32"},
    }
    tokenizer = load_tokenizer(args.model_name_or_path)
    model = args.model_name_or_path
    if not trl:
        rows = Dataset.from_list([asdict(pair) for pair in pairs])
        config = StepwiseDPOConfig(**settings, pack="siblings")
        return StepwiseDPOTrainer(model, args=config, train_dataset=rows)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def as_text(pair: ScoredPair) -> dict[str, str]:
        start = format_prompt(pair.prompt, tokenizer)
        row = {"prompt": start + "".join(response_pieces(pair.prefix, finished=False))}
        for side in ("chosen", "rejected"):
            row[side] = "".join(response_pieces(getattr(pair, side), finished=True))
        return row

    rows = Dataset.from_list([as_text(pair) for pair in pairs])
    config = DPOConfig(**settings)
    return DPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)


def updates(args: SpeedArguments, pairs: list[ScoredPair], way: str, size: int) -> Iterator[Any]:
    """A round is one pass over the pairs; its figures are the seconds of a pair."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args, pairs, way == TRL, size, folder)
        trainer.create_optimizer()
        trainer.current_gradient_accumulation_steps = 1
        model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        model.train()
        alone = _alone(trainer, model) if way == ALONE else None

        def measure() -> float:
            loader = trainer.get_train_dataloader()
            batches, seconds = iter(loader), 0.0
            for _ in range(len(loader)):
                if alone is None:
                    start = time.perf_counter()
                    (batch,), count = trainer.get_batch_samples(batches, 1, trainer.args.device)
                    trainer.training_step(model, batch, count)
                else:
                    loss = alone(next(batches))
                    start = time.perf_counter()
                    trainer.accelerator.backward(loss())
                optimizer.step()
                optimizer.zero_grad()
                seconds += time.perf_counter() - start
            return seconds / len(pairs)

        measure()  # a warm-up
        yield {}
        while True:
            yield {"seconds": measure()}


def _alone(trainer: Any, model: Any) -> Callable[[dict], Callable[[], Any]]:
    """A batch -> a function that reads its different tokens with policy and reference.

    It returns a loss of as many predictions as the batch has."""
    import torch

    def prepare(batch: dict) -> Callable[[], Any]:
        packed = batch["packed"]
        width = int(batch["attention_mask"].sum(1).float().mean())
        count = sum(map(_tokens, packed["blocks"]))
        ids = torch.randint(
            5, 100, (max(1, round(count / width)), width), device=trainer.args.device
        )
        number = len(packed["labels"])
        places = torch.randint(0, ids.numel(), (number,), device=ids.device)
        index = torch.arange(number, device=ids.device)
        plain = {"blocks": [{"input_ids": ids}], "labels": packed["labels"]}
        plain |= {"predictors": places, "index": index}
        labels = torch.zeros(1, number + 1, dtype=torch.long, device=ids.device)
        inputs = {"input_ids": labels, "labels": labels, "packed": plain, "fused_lm_head": True}

        def loss() -> Any:
            with torch.no_grad(), trainer.accelerator.autocast():
                reference = trainer.ref_model(**inputs).log_probs
            return (reference - model(**inputs).log_probs).sum() / number

        return loss

    return prepare


def _tokens(block: dict) -> int:
    """The number of tokens in the trees of a block."""
    mask = block.get("attention_mask")
    if mask is None:  # one text a row
        return block["input_ids"].numel()
    attends = mask[:, 0]
    # padding is attended by nothing but itself
    return int(((attends.sum(1) > 1) | (attends.sum(2) > 1)).sum())


# --- the tables ---


def lengths_of(pairs: list[ScoredPair], model: str) -> tuple[float, float]:
    """(mean tokens of prompt and prefix, mean tokens of a branch)."""
    from lm.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    found = [tokens_of(tokenizer, pair, s) for pair in pairs for s in (pair.chosen, pair.rejected)]
    before, behind = map(statistics.mean, zip(*found, strict=True))
    return before, behind


def in_turns(
    args: SpeedArguments, pairs: list[ScoredPair], ways: Sequence[str], size: int, title: str
) -> tuple[dict[str, float], dict[str, float]]:
    """(median seconds of a pair, peak of memory in GB) of each way."""
    with ExitStack() as stack:
        variants = {}
        for way in ways:
            variants[way] = stack.enter_context(Variant(updates, args, pairs, way, size))
            variants[way].wait()
        for _ in Bar(range(args.rounds), desc=title, unit="round"):
            for variant in variants.values():
                variant.round(None)
        memory = {way: variant.peak_memory() for way, variant in variants.items()}
    times = {way: [each["seconds"] for each in v.figures] for way, v in variants.items()}
    return {way: statistics.median(found) for way, found in times.items()}, memory


def measure_case(case: str, args: SpeedArguments, metrics: dict[str, Metric]) -> list[str]:
    """A row of the table."""
    pairs = pairs_of(case, args)
    prefix, branch = lengths_of(pairs, args.model_name_or_path)
    size = args.per_device_train_batch_size
    seconds, memory = in_turns(args, pairs, (TRL, OURS, ALONE), size, f"case {case}")
    figures = {
        "prefix_tokens": prefix,
        "branch_tokens": branch,
        "trl_pairs_a_second": 1 / seconds[TRL],
        "packed_pairs_a_second": 1 / seconds[OURS],
        "speedup": seconds[TRL] / seconds[OURS],
        "time_over_different_tokens_alone": seconds[OURS] / seconds[ALONE],
        "trl_gigabytes": memory[TRL],
        "packed_gigabytes": memory[OURS],
    }
    for name, value in figures.items():
        metrics[f"{case}/{name}"] = Metric(value, None, args.rounds)
    return [case, *(f"{value:.{0 if value > 30 else 2}f}" for value in figures.values())]


def measure_sizes(args: SpeedArguments, metrics: dict[str, Metric]) -> dict[str, list[float]]:
    """Seconds of an update for each of the sizes: way -> times."""
    seconds: dict[str, list[float]] = {TRL: [], OURS: []}
    for size in args.sizes:
        pairs = pairs_of("e", replace(args, pairs=size))
        found, _ = in_turns(args, pairs, [*seconds], size, f"{size} pairs")
        for way, time_of_pair in found.items():
            seconds[way].append(time_of_pair * size)
            name = "trl" if way == TRL else "packed"
            metrics[f"{name}/{size}/seconds"] = Metric(seconds[way][-1], None, args.rounds)
    return seconds


def main() -> None:
    (args,) = parse_args(SpeedArguments, description=__doc__)
    check_model(args.model_name_or_path)
    check_input(args.dataset_name)
    model = Path(args.model_name_or_path).resolve().name
    name = f"dpo_speed_{model}{'_bf16' if args.bf16 else ''}"
    inputs = [args.dataset_name, args.model_name_or_path]
    plot, _, output = output_paths(args.output_dir, name, inputs, args.overwrite)
    metrics: dict[str, Metric] = {}
    rows = [measure_case(case, args, metrics) for case in args.cases]
    size = args.per_device_train_batch_size
    title = f"{model}, {size} pairs an update, median of {args.rounds} rounds"
    if rows:
        print_table(title, COLUMNS, rows)
    if args.sizes:
        seconds = measure_sizes(args, metrics)
        each = [
            [size, *(f"{times[k]:.2f}" for times in seconds.values())]
            for k, size in enumerate(args.sizes)
        ]
        print_table(f"{model}: seconds of an update", ["pairs", *seconds], each)
        # local: matplotlib is slow to import
        from evaluation.plots import curves_plot

        curves_plot(plot, title, args.sizes, seconds, "pairs in an update", "seconds")
    write_result(output, metrics, vars(args), [])
    print(f"wrote {output}" + (f" and {plot}" if args.sizes else ""))


if __name__ == "__main__":
    run(main)
