"""Make the embedded models from nothing: the tokenizer, policy-mini and judge-mini.

    python utils/build_embedded_models.py --overwrite        (or: make models)

policy-mini is a LLaMA of 1.9M parameters, trained from scratch on the pretraining stream, mistakes
included, with the learning rate decayed to 0. judge-mini starts from the weights of policy-mini and
learns to answer "Right?" after every step: of reference solutions, of solutions with mistakes and
of policy-mini's own samples, with exact labels. It is also written as a GGUF file. The script
resumes after an interruption.

    python utils/build_embedded_models.py --size large --overwrite        (or: make models-large)

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from common.cli import arg, check_outputs, hold_output, parse_args, run
from common.files import ResumableRows, at_root, release, replacing_folder, write_text
from evaluation.metrics import accuracy_metric, auroc_metric, mean_metric, rate_metric
from lm.text_encoding import batches_by_length, encode_steps
from reasoning.grading import grade_steps, is_correct
from reasoning.problems import corrupted, pretraining_texts, problems, stories
from reward_model.templates import PLAIN

JUDGE_FILE = "judge-mini.Q8_0.gguf"
TOKENS_PER_BATCH = 2000  # padded tokens of an optimizer step
WINDOW = 4096  # examples that are sorted by length together
# hidden, intermediate, layers, heads, KV heads
SHAPES = {"mini": (192, 512, 4, 6, 3), "large": (320, 864, 5, 10, 5)}
LEARNING_RATES = {"mini": [2e-3], "large": [7e-4, 1.4e-3, 2.8e-3]}

# Markdown, one sentence a line
POLICY_CARD = """
A LLaMA of {parameters} parameters (hidden {hidden}, {layers} layers), trained from random weights.
It was made by `python utils/build_embedded_models.py{flags}`.

- Data: {policy_examples} solved word problems of `reasoning/problems.py`, each once, about 2,000 tokens per update.
- AdamW, peak learning rate {learning_rate}, decayed linearly to 0, seed {seed}.
- The text has mistakes, as human text has: the writer is wrong at 60 % of the traps and 3 % of the other steps.
  The model's greedy answers are therefore wrong at traps, by design.
- Weights in half precision.
- Licence: as the repository.
"""  # noqa: E501

TRIALS_CARD = """
The learning rate is the best of several, each tried on the first {trial_examples} texts.
The best is the one with the highest likelihood of the reference solutions of validation problems.
"""

JUDGE_CARD = """
A step judge: it answers "Right?" with Yes or No after every step of a solution.
It was made by `python utils/build_embedded_models.py` and takes the place of a pretrained model that can do arithmetic.

- Training starts from the weights of policy-mini.
- Data with exact labels: {judge_examples} solutions of pretraining problems (a quarter right, the others with mistakes)
  and {judge_samples} policy-mini samples of train problems.
- AdamW, peak learning rate {judge_learning_rate}, decayed linearly to 0, seed {seed}.
- Weights in half precision; `judge-mini.Q8_0.gguf` is the same model for llama.cpp and ctransformers.
- Licence: as the repository.
"""  # noqa: E501


@dataclass
class BuildArguments:
    output: str = arg(at_root("models"), "folder of policy-SIZE/ and judge-mini/")
    size: str = arg("mini", "mini: policy-mini, judge-mini; large: policy-large", choices=[*SHAPES])
    policy_examples: int = arg(130_000, "pretraining texts of about 116 tokens, each once")
    judge_examples: int = arg(24_000, "solutions written for the judge, right and wrong")
    judge_samples: int = arg(12_000, "policy samples for the judge, one a train problem")
    learning_rate: list[float] | None = arg(
        None,
        "peak learning rate of the policy, decayed linearly to 0; the best of several "
        f"is used (default: {LEARNING_RATES})",
    )
    trial_examples: int = arg(20_000, "texts on which each of several learning rates is tried")
    judge_learning_rate: float = arg(
        1e-3, "peak learning rate of judge-mini, decayed linearly to 0"
    )
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


def collate_judge(batch: list[list[dict]], question: list[int], yes: int, no: int) -> dict:
    """One bucket with the question asked after every step, all in one forward pass.

    A row is a tree of tokens (lm/tree_attention.py): the solution is the trunk, and a copy of the
    question branches off at the end of every step, so it is read as if it stood there. `answers`
    (B, L) are the labels of the questions, `trunk_labels` (B, L) the tokens of right steps."""
    # torch would slow --help
    import torch

    # torch would slow --help
    from lm.tree_attention import add_sequence, tree_inputs

    examples = batch[0]
    ids: list[list[int]] = [[] for _ in examples]
    parents: list[list[int]] = [[] for _ in examples]
    verdicts: list[tuple[int, int, int]] = []  # row, place of a question's last token, the answer
    right_tokens: list[tuple[int, int, int]] = []  # row, place, token of a right step
    for b, example in enumerate(examples):
        solution, step_of = example["ids"], example["step_of"]
        trunk = add_sequence(ids[b], parents[b], [], solution, 0)
        for k, right in enumerate(example["labels"]):
            places = [place for place in trunk if step_of[place] == k]
            end = places[-1] + 1
            asked = add_sequence(ids[b], parents[b], trunk, solution[:end] + question, end)
            verdicts.append((b, asked[-1], yes if right else no))
            right_tokens += [(b, place, solution[place]) for place in places if right]
    inputs = tree_inputs(ids, parents, 0)
    for name, found in (("answers", verdicts), ("trunk_labels", right_tokens)):
        labels = torch.full_like(inputs["input_ids"], -100)
        for row, place, token in found:
            labels[row, place] = token
        inputs[name] = labels
    return inputs


def policy_data(tokenizer: Any, count: int, seed: int) -> Iterator[dict]:
    texts = itertools.islice(pretraining_texts(seed), count)
    for problem, steps in tqdm(texts, total=count, desc="writing pretraining texts"):
        ids, step_of = encode_steps(tokenizer, problem.prompt, [], steps)
        yield {"ids": ids, "step_of": step_of}


def judge_solutions(count: int, seed: int) -> Iterator[tuple]:
    """(problem, steps) for the judge, from the pretraining stream.

    A quarter of them are reference solutions, half are written as the pretraining text is, and a
    quarter have an error put in."""
    rng = random.Random(f"judge {seed}")
    for story in itertools.islice(stories("pretrain"), count):
        problem = story.problem()
        kind = rng.random()
        if kind < 0.25:
            yield problem, problem.steps
        elif kind < 0.75:
            yield problem, story.human_solution(rng)[0]
        else:
            yield problem, corrupted(story, rng)


def judge_data(tokenizer: Any, solutions: Iterable[tuple]) -> Iterator[dict]:
    """The ids and exact labels of solutions.

    The last step ends with a newline instead of EOS, so that the question always follows a
    newline."""
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    for problem, steps in solutions:
        ids, step_of = encode_steps(tokenizer, problem.prompt, [], steps)
        if ids[-1] == tokenizer.eos_token_id:
            ids[-1] = newline
        yield {"ids": ids, "step_of": step_of, "labels": grade_steps(steps, problem)}


# --- training ---


def train(
    model: Any, examples: list[dict], collate: Callable, work: Path, learning_rate: float, seed: int
) -> Any:
    """Train for one pass over the examples, with the learning rate decayed to 0. Returns the model.

    Training resumes from the last checkpoint in `work`."""
    # torch would slow --help
    import torch
    from transformers import Trainer, TrainingArguments

    # torch would slow --help
    from lm.loading import pick_device
    from trainer.session import PlainCheckpoints, last_checkpoint

    class MiniTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if "answers" not in inputs:
                return super().compute_loss(model, inputs, return_outputs)
            answers, trunk_labels = inputs.pop("answers"), inputs.pop("trunk_labels")
            logits = model(**inputs).logits.float()
            cross_entropy = torch.nn.functional.cross_entropy
            trunk_logits, trunk_labels = logits[:, :-1].flatten(0, 1), trunk_labels[:, 1:].flatten()
            loss = cross_entropy(logits.flatten(0, 1), answers.flatten())
            return loss + cross_entropy(trunk_logits, trunk_labels)

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


def judge_question(tokenizer: Any) -> tuple[list[int], int, int]:
    """(ids of the question after a newline, id of yes, id of no)."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    question = ids("\n" + PLAIN.question)[len(ids("\n")) :]
    return question, ids("? Yes")[-1], ids("? No")[-1]


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


def judge_figures(judge: Any, tokenizer: Any, policy: Any, limit: int) -> dict:
    """Metrics over the steps of policy samples (temperature 1) of validation problems."""
    # torch would slow --help
    import torch

    question, yes, no = judge_question(tokenizer)
    validation = list(itertools.islice(problems("validation"), limit))
    prompts = [problem.prompt for problem in validation]
    sampling = {"temperature": 1.0, "seed": 1, "progress": "sampling validation problems"}
    samples = policy.generate(prompts, **sampling)
    pairs = zip(validation, samples, strict=True)
    solutions = [(problem, sample.steps) for problem, (sample,) in pairs if sample.steps]
    examples = list(judge_data(tokenizer, solutions))
    scores, labels, clusters = [], [], []
    for batch in bucketed([len(example["ids"]) for example in examples], random.Random(0)):
        inputs = collate_judge([[examples[i] for i in batch]], question, yes, no)
        verdicts, _ = inputs.pop("answers"), inputs.pop("trunk_labels")
        inputs = {name: value.to(judge.device) for name, value in inputs.items()}
        with torch.inference_mode():
            logits = judge(**inputs).logits.float().cpu()
        asked = verdicts >= 0  # (B, L), row by row in the order of the steps
        scores += (logits[asked][:, yes] - logits[asked][:, no]).sigmoid().tolist()
        labels += (verdicts[asked] == yes).tolist()
        clusters += [i for i in batch for _ in examples[i]["labels"]]
    auroc = auroc_metric(labels, scores, clusters)
    return {"step AUROC": auroc, "step accuracy at .5": accuracy_metric(labels, scores, clusters)}


# --- the build ---


def finish(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save in half precision, whole or not at all."""
    with replacing_folder(folder) as temporary:
        model.cpu().half().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def card(folder: Path, text: str, figures: dict) -> None:
    rows = "".join(
        f"| {name} | {metric} | {metric.n} |\n" for name, metric in figures.items() if metric
    )
    table = f"| on validation problems | value and 95 % interval | n |\n|---|---|---|\n{rows}"
    write_text(folder / "README.md", [f"# {folder.name}\n{text}\n{table}"])
    print(table, flush=True)


def sample_train(policy: Any, count: int, path: Path, job: dict, seed: int) -> list[tuple]:
    """(problem, steps) of one policy sample (temperature 1) for each train problem.

    The samples are kept in `path` until the build ends."""
    unit = 1024
    train_problems = list(itertools.islice(problems("train"), count))
    rows = ResumableRows(path, job, unit)
    for start in range(len(rows.rows), len(train_problems), unit):
        prompts = [problem.prompt for problem in train_problems[start : start + unit]]
        progress = f"sampling for the judge, {start}/{len(train_problems)}"
        samples = policy.generate(prompts, temperature=1.0, seed=seed + start, progress=progress)
        for (sample,) in samples:
            rows.append({"steps": sample.steps})
    pairs = zip(train_problems, rows.rows, strict=True)
    return [(problem, row["steps"]) for problem, row in pairs if row["steps"]]


def make_policy(args: BuildArguments, tokenizer: Any, work: Path, job: dict) -> None:
    """Make `work/policy-SIZE` with its card, after trials if there are several learning rates."""
    # torch would slow --help
    from lm.policy import Policy

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
    text = POLICY_CARD.format(**values) + (TRIALS_CARD.format(**values) if trials else "")
    trial_figures = {
        f"log-prob of reference solutions, nats a token, trial with {rate:g}": metric
        for rate, metric in trials.items()
    }
    card(work / name, text, policy_figures(policy, args.validation) | trial_figures)


def make_judge(args: BuildArguments, tokenizer: Any, work: Path, job: dict) -> None:
    """Make `work/judge-mini` with its GGUF file and its card, from `work/policy-mini`."""
    # torch would slow --help
    from lm.gguf_export import export_gguf
    from lm.loading import load_model
    from lm.policy import Policy

    policy, folder = Policy.load(str(work / "policy-mini")), work / "judge-mini"
    if not folder.exists():
        print("samples of policy-mini for the judge", flush=True)
        samples = sample_train(policy, args.judge_samples, work / "samples.jsonl", job, args.seed)
        print("judge-mini: learning to judge steps", flush=True)
        question, yes, no = judge_question(tokenizer)
        solutions = [*judge_solutions(args.judge_examples, args.seed), *samples]
        examples = list(judge_data(tokenizer, solutions))
        random.Random(args.seed).shuffle(examples)
        start, _ = load_model(str(work / "policy-mini"), "float32")
        collate = partial(collate_judge, question=question, yes=yes, no=no)
        model = train(start, examples, collate, work / "judge", args.judge_learning_rate, args.seed)
        finish(model, tokenizer, folder)
    judge, _ = load_model(str(folder), "float32")
    export_gguf(folder, folder / JUDGE_FILE)
    figures = judge_figures(judge.to(policy.device), tokenizer, policy, args.validation)
    card(folder, JUDGE_CARD.format(**job), figures)


def main() -> None:
    (args,) = parse_args(BuildArguments, description=__doc__.split("\n\n")[0])
    output = Path(args.output)
    folders = [output / f"policy-{args.size}"]
    if args.size == "mini":
        folders.append(output / "judge-mini")
    work = output / (".build" if args.size == "mini" else f".build-{args.size}")
    check_outputs([], overwrite=args.overwrite, folders=folders)
    hold_output(work)
    finished = work.with_name(f"{work.name}.tmp")
    shutil.rmtree(finished, ignore_errors=True)
    job = {name: value for name, value in vars(args).items() if name not in ("output", "overwrite")}
    job_file = work / "job.json"
    if work.exists() and not (
        job_file.is_file() and job_file.read_text("utf-8") == json.dumps(job)
    ):
        shutil.rmtree(work)  # the half-built models of another job
    write_text(job_file, [json.dumps(job)])

    # torch would slow --help
    from lm.miniature_tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    make_policy(args, tokenizer, work, job)
    if args.size == "mini":
        make_judge(args, tokenizer, work, job)

    for folder in folders:  # copied, so that a build that is killed here keeps what it made
        with replacing_folder(folder) as temporary:
            shutil.copytree(work / folder.name, temporary, dirs_exist_ok=True)
    os.replace(work, finished)
    release()
    shutil.rmtree(finished)
    models = " and ".join(map(str, folders))
    print(f"wrote {models}" + (f" (with {JUDGE_FILE})" if args.size == "mini" else ""))


if __name__ == "__main__":
    run(main)
