"""Make an embedded policy from nothing: the tokenizer, and policy-mini or policy-large.

    python utils/build_policy.py --overwrite        (or: make models-policy)

policy-mini is a LLaMA of 1.9M parameters, trained from scratch on the pretraining stream, mistakes
included, with the learning rate decayed to 0. The script resumes after an interruption.

    python utils/build_policy.py --size large --overwrite        (or: make models-large)

policy-large has more than three times the parameters and learns from the same texts in the same
way. Three learning rates are tried on fewer texts; the one under which the reference solutions of
validation problems are likeliest is used."""

import itertools
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_outputs, hold_output, parse_args, run
from common.files import at_root, write_text
from common.outputs import release, replacing_folder
from common.progress import Bar
from evaluation.metrics import mean_metric, rate_metric
from lm.text_encoding import batches_by_length, encode_steps
from reasoning.grading import grade_steps, is_correct
from reasoning.problems import pretraining_texts, problems

TOKENS_PER_BATCH = 2000  # padded tokens of an optimizer step
WINDOW = 4096  # examples that are sorted by length together
# hidden, intermediate, layers, heads, KV heads
SHAPES = {"mini": (192, 512, 4, 6, 3), "large": (320, 864, 5, 10, 5)}
LEARNING_RATES = {"mini": [2e-3], "large": [7e-4, 1.4e-3, 2.8e-3]}

# Markdown, one sentence a line
POLICY_SUMMARY = """
A LLaMA of {parameters} parameters (hidden {hidden}, {layers} layers), trained from random weights.
It was made by `python utils/build_policy.py{flags}`.
"""
POLICY_TRAINING = """
- Data: {policy_examples} solved word problems of `reasoning/problems.py`, each once, about 2,000 tokens per update.
- AdamW, peak learning rate {learning_rate}, decayed linearly to 0, seed {seed}.
- The text has mistakes, as human text has: the writer is wrong at 60 % of the traps and 3 % of the other steps.
  The model's greedy answers are therefore wrong at traps, by design.
- Weights in half precision.
"""  # noqa: E501

POLICY_KINDS = {"greedy accuracy": "accuracy"}  # of the metadata

TRIALS = """
The learning rate is the best of several, each tried on the first {trial_examples} texts.
The best is the one with the highest likelihood of the reference solutions of validation problems.
"""


@dataclass
class BuildArguments:
    output: str = arg(at_root("models"), "folder of policy-SIZE/")
    size: str = arg("mini", "mini: policy-mini; large: policy-large", choices=[*SHAPES])
    policy_examples: int = arg(130_000, "pretraining texts of about 116 tokens, each once")
    learning_rate: list[float] | None = arg(
        None,
        "peak learning rate of the policy, decayed linearly to 0; the best of several "
        f"is used (default: {LEARNING_RATES})",
    )
    trial_examples: int = arg(20_000, "texts on which each of several learning rates is tried")
    validation: int = arg(2000, "validation problems for choices and for the model cards")
    seed: int = arg(0, "seed of initial weights, mistakes and order")
    overwrite: bool = arg(False, "replace finished models")

    def __post_init__(self):
        self.learning_rate = self.learning_rate or LEARNING_RATES[self.size]
        if min(self.learning_rate) <= 0 or len({*self.learning_rate}) < len(self.learning_rate):
            raise ValueError(
                "argument --learning_rate: expected different numbers above 0, "
                f"got {self.learning_rate}"
            )


# torch, transformers and the modules that load them are imported in the functions below, because
# they would slow --help.

# --- training data ---


def bucketed(lengths: list[int], rng: random.Random) -> list[list[int]]:
    """Indices in batches of at most TOKENS_PER_BATCH padded tokens.

    Similar lengths are together; the batches are in random order."""
    batches: list[list[int]] = []
    for start in range(0, len(lengths), WINDOW):
        window = range(start, min(start + WINDOW, len(lengths)))
        batches += batches_by_length(window, TOKENS_PER_BATCH, lengths.__getitem__)
    rng.shuffle(batches)
    return batches


def collate_text(batch: list[list[dict]]) -> dict[str, Any]:
    """Right-padded ids and labels of one bucket; loss on the solution's tokens."""
    # torch would slow --help
    import torch
    from torch.nn.utils.rnn import pad_sequence

    def padded(rows: Iterable[list[int]], fill: int) -> Any:
        return pad_sequence([torch.tensor(row) for row in rows], True, fill)

    ids = padded((example["ids"] for example in batch[0]), 0)
    step_of = padded((example["step_of"] for example in batch[0]), -1)
    mask = padded(([1] * len(example["ids"]) for example in batch[0]), 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(step_of < 0, -100)}


def policy_data(tokenizer: Any, count: int, seed: int) -> Iterator[dict]:
    texts = itertools.islice(pretraining_texts(seed), count)
    for problem, steps in Bar(texts, total=count, desc="writing pretraining", unit="text"):
        ids, step_of = encode_steps(tokenizer, problem.prompt, [], steps)
        yield {"ids": ids, "step_of": step_of}


# --- training ---


def train(
    model: Any,
    examples: list[dict],
    collate: Callable,
    work: Path,
    learning_rate: float,
    seed: int,
    loss: Callable[[Any, dict], Any] = lambda model, inputs: model(**inputs).loss,
) -> Any:
    """Train for one pass over the examples, with the learning rate decayed to 0. Returns the model.

    loss: of the model and the inputs that `collate` made. Training resumes from the last checkpoint
    in `work`."""
    # torch would slow --help
    from transformers import Trainer, TrainingArguments

    # torch would slow --help
    from lm.loading import pick_device
    from trainer.checkpoints import PlainCheckpoints, last_checkpoint

    class MiniTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return loss(model, inputs)

    device, bf16 = pick_device()
    batches = bucketed([len(example["ids"]) for example in examples], random.Random(seed))
    arguments = TrainingArguments(
        output_dir=str(work), per_device_train_batch_size=1, num_train_epochs=1, seed=seed,
        learning_rate=learning_rate, lr_scheduler_type="linear", warmup_steps=100,
        weight_decay=0.01, adam_beta2=0.98, save_steps=500, save_total_limit=1, logging_steps=200,
        report_to=[], use_cpu=device == "cpu", bf16=bf16, remove_unused_columns=False,
    )  # fmt: skip
    dataset = [[examples[i] for i in batch] for batch in batches]
    trainer = MiniTrainer(model, arguments, collate, dataset, callbacks=[PlainCheckpoints()])
    trainer.train(resume_from_checkpoint=last_checkpoint(work))
    return trainer.model


def new_policy(tokenizer: Any, seed: int, size: str) -> Any:
    # torch would slow --help
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    hidden, intermediate, layers, heads, kv_heads = SHAPES[size]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=512, tie_word_embeddings=False, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


# --- figures for the model cards ---


def policy_figures(policy: Any, limit: int) -> dict:
    """Metrics of greedy answers to validation problems.

    They are the accuracy, and how often a step after a right prefix is right, at traps and
    elsewhere."""
    validation = list(itertools.islice(problems("validation"), limit))
    prompts = [problem.prompt for problem in validation]
    responses = policy.generate(prompts, progress="answering validation problems")
    correct: list[float] = []
    right: dict[bool, list[float]] = {True: [], False: []}
    for problem, (response,) in zip(validation, responses, strict=True):
        correct.append(float(is_correct(response.steps, problem)))
        scores = [*grade_steps(response.steps, problem), *[0.0] * len(problem.steps)]
        for k, is_trap in enumerate(problem.traps):
            if all(scores[:k]):
                right[is_trap].append(scores[k])
    rates = {
        "greedy accuracy": correct,
        "step right after a right prefix, at traps": right[True],
        "step right after a right prefix, elsewhere": right[False],
    }
    return {name: rate_metric(values) for name, values in rates.items() if values}


# --- the build ---


def finish(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save in half precision, whole or not at all."""
    with replacing_folder(folder) as temporary:
        model.cpu().half().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def card(
    folder: Path, summary: str, training: str, use: Any, figures: dict, kinds: dict, base: Any
) -> None:
    """Write the card of a model of this repository, and print its table.

    figures: words -> metric. kinds: words -> name of a metric that is in the metadata as well.
    base: the model that training started from, or None."""
    from trainer.model_card import About, Figure, model_card  # torch would slow --help

    found = {name: metric for name, metric in figures.items() if metric}
    rows = "".join(f"| {name} | {metric} | {metric.n} |\n" for name, metric in found.items())
    table = f"| on validation problems | value and 95 % interval | n |\n|---|---|---|\n{rows}"
    values = [Figure(kinds[name], name, found[name].value) for name in kinds if name in found]
    about = About(folder.name, base, "validation problems", licence="mit", tags=["reasoning"])
    text = model_card(about, summary, use, training, values, table)
    write_text(folder / "README.md", [text])
    print(table, flush=True)


def make_policy(args: BuildArguments, tokenizer: Any, work: Path, job: dict) -> None:
    """Make `work/policy-SIZE` with its card, after trials if there are several learning rates."""
    # torch would slow --help
    from lm.policy import Policy
    from trainer.model_card import policy_use

    examples: list[dict] = []

    def trained(name: str, rate: float, count: int) -> Policy:
        if not (work / name).exists():
            settings = f"{count} pretraining texts, learning rate {rate:g}"
            print(f"{name}: learning from {settings}", flush=True)
            if not examples:
                examples.extend(policy_data(tokenizer, args.policy_examples, args.seed))
            model = new_policy(tokenizer, args.seed, args.size)
            checkpoints = work / f"{name}.training"
            model = train(model, examples[:count], collate_text, checkpoints, rate, args.seed)
            finish(model, tokenizer, work / name)
        return Policy.load(str(work / name))

    validation = itertools.islice(problems("validation"), args.validation)
    solutions = [(problem.prompt, [], problem.steps) for problem in validation]
    trials = {}
    for rate in args.learning_rate if len(args.learning_rate) > 1 else []:
        policy = trained(f"trial-{rate:g}", rate, args.trial_examples)
        progress = f"solutions under learning rate {rate:g}"
        trials[rate] = mean_metric(policy.logps(solutions, progress=progress))
    best = max(trials, key=lambda rate: trials[rate].value, default=args.learning_rate[0])
    name = f"policy-{args.size}"
    policy = trained(name, best, args.policy_examples)
    hidden, _, layers, _, _ = SHAPES[args.size]
    values = job | {
        "flags": "" if args.size == "mini" else f" --size {args.size}",
        "learning_rate": f"{best:g}",
        "hidden": hidden,
        "layers": layers,
        "parameters": f"{policy.model.num_parameters() / 1e6:.1f}M",
    }
    summary, training = POLICY_SUMMARY.format(**values), POLICY_TRAINING.format(**values)
    training += TRIALS.format(**values) if trials else ""
    use = policy_use(policy.model, policy.tokenizer, is_adapter=False)
    trial_figures = {
        f"log-prob of reference solutions, nats a token, trial with {rate:g}": metric
        for rate, metric in trials.items()
    }
    figures = policy_figures(policy, args.validation) | trial_figures
    card(work / name, summary, training, use, figures, POLICY_KINDS, base=None)


@contextmanager
def building(folder: Path, job: dict, overwrite: bool) -> Iterator[Path]:
    """The folder in which a build keeps its checkpoints and what it has finished.

    A build of the same job goes on with what it finds there. When the block ends, the model that it
    made in a folder of the same name in there is copied to `folder`."""
    check_outputs([], overwrite=overwrite, folders=[folder])
    work = folder.with_name(f".{folder.name}.build")
    hold_output(work)
    finished = work.with_name(f"{work.name}.tmp")
    shutil.rmtree(finished, ignore_errors=True)
    job_file = work / "job.json"
    if work.exists() and not (
        job_file.is_file() and job_file.read_text("utf-8") == json.dumps(job)
    ):
        shutil.rmtree(work)  # the half-built model of another job
    write_text(job_file, [json.dumps(job)])
    yield work
    with replacing_folder(folder) as temporary:  # copied, so that a kill here loses nothing
        shutil.copytree(work / folder.name, temporary, dirs_exist_ok=True)
    os.replace(work, finished)
    release()
    shutil.rmtree(finished)


def job_of(args: Any) -> dict:
    """The arguments that determine a model."""
    return {
        name: value for name, value in vars(args).items() if name not in ("output", "overwrite")
    }


def main() -> None:
    (args,) = parse_args(BuildArguments, description=__doc__.split("\n\n")[0])
    folder, job = Path(args.output) / f"policy-{args.size}", job_of(args)
    with building(folder, job, args.overwrite) as work:
        # torch would slow --help
        from lm.miniature_tokenizer import build_tokenizer

        make_policy(args, build_tokenizer(), work, job)
    print(f"wrote {folder}")


if __name__ == "__main__":
    run(main)
