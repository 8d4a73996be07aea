"""Make the embedded models from nothing: the tokenizer, policy-mini and judge-mini, and the judge's GGUF file.

    python utils/build_embedded_models.py --overwrite        (or: make models)

policy-mini is a LLaMA of 1.9M parameters, trained from scratch on the pretraining stream (mistakes included) with the learning
rate decayed to 0. judge-mini starts from policy-mini's weights and learns to answer "Right?" after every step: on reference
solutions, on solutions with mistakes, and on policy-mini's own samples, with exact labels. Interrupted, it resumes.

    python utils/build_embedded_models.py --size large --overwrite        (or: make models-large)

policy-large learns from the same texts in the same way, with more than three times the parameters. Its learning rate is the best
of three that are tried on fewer texts: the one under which the reference solutions of validation problems are likeliest.
"""

import itertools
import json
import random
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_output, parse_args, run
from common.files import at_root

JUDGE_FILE = "judge-mini.Q8_0.gguf"
TOKENS_PER_BATCH = 2000  # padded tokens an optimizer step
# hidden, intermediate, layers, heads, KV heads
SHAPES = {"mini": (192, 512, 4, 6, 3), "large": (320, 864, 5, 10, 5)}
LEARNING_RATES = {"mini": [2e-3], "large": [7e-4, 1.4e-3, 2.8e-3]}


@dataclass
class BuildArguments:
    output: str = field(
        default_factory=lambda: at_root("models"),
        metadata={"help": "folder of policy-SIZE/ and judge-mini/"},
    )
    size: str = field(
        default="mini",
        metadata={
            "help": "mini: policy-mini and judge-mini; large: policy-large",
            "choices": [*SHAPES],
        },
    )
    policy_examples: int = field(
        default=130_000,
        metadata={"help": "pretraining texts, each problem once (about 116 tokens each)"},
    )
    judge_examples: int = field(
        default=24_000, metadata={"help": "solutions written for the judge, right and wrong"}
    )
    judge_samples: int = field(
        default=12_000, metadata={"help": "policy samples for the judge, one a train problem"}
    )
    learning_rate: list[float] | None = field(
        default=None,
        metadata={
            "help": "peak learning rate of the policy, decayed linearly to 0; of several the best is chosen "
            f"(default: {LEARNING_RATES})"
        },
    )
    trial_examples: int = field(
        default=20_000, metadata={"help": "texts that each of several learning rates is tried on"}
    )
    judge_learning_rate: float = field(
        default=1e-3, metadata={"help": "peak learning rate of judge-mini, decayed linearly to 0"}
    )
    validation: int = field(
        default=2000,
        metadata={"help": "validation problems for choices and the figures in the model cards"},
    )
    seed: int = field(default=0, metadata={"help": "seed of initial weights, mistakes and order"})
    overwrite: bool = field(default=False, metadata={"help": "replace finished models"})

    def __post_init__(self):
        self.learning_rate = self.learning_rate or LEARNING_RATES[self.size]
        if min(self.learning_rate) <= 0 or len({*self.learning_rate}) < len(self.learning_rate):
            raise ValueError(
                f"argument --learning_rate: expected different numbers above 0, got {self.learning_rate}"
            )


# --- training data ---


def bucketed(
    lengths: list[int], rng: random.Random, tokens: int = TOKENS_PER_BATCH, window: int = 4096
) -> list[list[int]]:
    """Indices in batches of at most `tokens` padded tokens: like lengths together, batches in random order."""
    batches = []
    for start in range(0, len(lengths), window):
        order = sorted(range(start, min(start + window, len(lengths))), key=lengths.__getitem__)
        batch: list[int] = []
        for index in order:
            if batch and lengths[index] * (len(batch) + 1) > tokens:
                batches.append(batch)
                batch = []
            batch.append(index)
        batches.append(batch)
    rng.shuffle(batches)
    return batches


def collate_text(batch: list[list[dict]]) -> dict:
    """Right-padded ids and labels of one bucket; loss on the solution's tokens."""
    import torch

    examples = batch[0]
    longest = max(len(example["ids"]) for example in examples)
    ids = torch.tensor(
        [example["ids"] + [0] * (longest - len(example["ids"])) for example in examples]
    )
    step_of = torch.tensor(
        [example["step_of"] + [-1] * (longest - len(example["ids"])) for example in examples]
    )
    mask = torch.tensor(
        [[1] * len(example["ids"]) + [0] * (longest - len(example["ids"])) for example in examples]
    )
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(step_of < 0, -100)}


def collate_judge(batch: list[list[dict]], question: list[int], yes: int, no: int) -> dict:
    """One bucket with the question asked after every step, all in one forward pass.

    A row is the solution (the trunk) followed by a copy of the question for each step. A copy sees the trunk up to the end of its
    step and itself, at the positions that follow that step, so it reads what it would read if it stood there: (B, 1, L, L) mask."""
    import torch

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


def policy_data(tokenizer, count: int, seed: int) -> Iterator[dict]:
    from tqdm import tqdm

    from lm.text_encoding import encode_steps
    from reasoning.problems import pretraining_texts

    for problem, steps in tqdm(
        itertools.islice(pretraining_texts(seed), count),
        total=count,
        desc="writing pretraining texts",
    ):
        ids, step_of = encode_steps(tokenizer, problem.prompt, [], steps)
        yield {"ids": ids, "step_of": step_of}


def judge_solutions(count: int, seed: int) -> Iterator[tuple]:
    """(problem, steps) for the judge, from the pretraining stream: a quarter of them reference solutions, half as the writer of
    the pretraining text writes them, a quarter with an error put in."""
    from reasoning.problems import corrupted, stories

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


def judge_data(tokenizer, solutions: Iterable[tuple]) -> Iterator[dict]:
    """The judge reads every step with its closing newline, and no EOS: so the question follows a newline always."""
    from lm.text_encoding import encode_steps
    from reasoning.grading import grade_steps

    newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
    for problem, steps in solutions:
        ids, step_of = encode_steps(tokenizer, problem.prompt, [], steps)
        if ids[-1] == tokenizer.eos_token_id:
            ids[-1] = newline
        yield {"ids": ids, "step_of": step_of, "labels": grade_steps(steps, problem)}


# --- training ---


def train(model, examples: list[dict], collate, work: Path, learning_rate: float, seed: int):
    """One pass over the examples with the learning rate decayed to 0; continues from the last checkpoint in `work`. Returns the
    model. Progress bar and checkpoints are transformers.Trainer's."""
    import torch
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    from lm.loading import pick_device

    class MiniTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if "answers" not in inputs:
                return super().compute_loss(model, inputs, return_outputs)
            answers, trunk_labels = inputs.pop("answers"), inputs.pop("trunk_labels")
            logits = model(**inputs).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
            return loss + torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), trunk_labels[:, 1:].flatten()
            )

    device, bf16 = pick_device()
    batches = bucketed([len(example["ids"]) for example in examples], random.Random(seed))
    arguments = TrainingArguments(
        output_dir=str(work), per_device_train_batch_size=1, num_train_epochs=1, seed=seed, report_to=[], logging_steps=200,
        learning_rate=learning_rate, lr_scheduler_type="linear", warmup_steps=100, weight_decay=0.01, adam_beta2=0.98,
        save_steps=500, save_total_limit=1, use_cpu=device == "cpu", bf16=bf16, remove_unused_columns=False,
    )  # fmt: skip
    trainer = MiniTrainer(
        model, arguments, collate, [[examples[i] for i in batch] for batch in batches]
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(work) if work.is_dir() else None)
    return trainer.model


def new_policy(tokenizer, seed: int, size: str = "mini"):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    hidden, intermediate, layers, heads, kv_heads = SHAPES[size]
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=512, tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def judge_question(tokenizer) -> tuple[list[int], int, int]:
    """(ids of the question after a newline, id of yes, id of no)."""
    from reward_model.templates import PLAIN

    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    question = tokenizer("\n" + PLAIN.question, add_special_tokens=False)["input_ids"][
        len(newline) :
    ]
    yes, no = (
        tokenizer(f"? {word}", add_special_tokens=False)["input_ids"][-1] for word in ("Yes", "No")
    )
    return question, yes, no


# --- figures for the model cards ---


def policy_figures(policy, limit: int | None = None) -> dict:
    """Greedy accuracy on validation, and how often a step is right after a right beginning, at traps and elsewhere: Metrics."""
    from evaluation.metrics import rate_metric
    from reasoning.grading import grade_steps, is_correct
    from reasoning.problems import problems

    tasks = list(itertools.islice(problems("validation"), limit))
    answers = [
        answer
        for (answer,) in policy.generate(
            [task.prompt for task in tasks], progress="answering validation problems"
        )
    ]
    right: dict[bool, list[float]] = {True: [], False: []}
    for task, answer in zip(tasks, answers, strict=True):
        scores = [*grade_steps(answer.steps, task), *[0.0] * len(task.steps)]
        for k, trap in enumerate(task.traps):
            if all(scores[:k]):
                right[trap].append(scores[k])
    correct = [
        float(is_correct(answer.steps, task)) for task, answer in zip(tasks, answers, strict=True)
    ]
    return {
        "greedy accuracy": rate_metric(correct),
        "step right after a right beginning, at traps": rate_metric(right[True]),
        "step right after a right beginning, elsewhere": rate_metric(right[False]),
    }


def judge_figures(judge, tokenizer, policy, limit: int | None = None, seed: int = 1) -> dict:
    """AUROC and accuracy at .5 over the steps of fresh policy samples (temperature 1) of validation problems: Metrics."""
    import torch

    from evaluation.metrics import accuracy_metric, auroc_metric
    from reasoning.problems import problems

    question, yes, no = judge_question(tokenizer)
    tasks = list(itertools.islice(problems("validation"), limit))
    answers = policy.generate(
        [task.prompt for task in tasks],
        temperature=1.0,
        seed=seed,
        progress="sampling validation problems",
    )
    examples = list(
        judge_data(
            tokenizer,
            [(task, a.steps) for task, (a,) in zip(tasks, answers, strict=True) if a.steps],
        )
    )
    scores, labels, clusters = [], [], []
    for batch in bucketed([len(example["ids"]) for example in examples], random.Random(0)):
        inputs = collate_judge([[examples[i] for i in batch]], question, yes, no)
        verdicts, _ = inputs.pop("answers"), inputs.pop("trunk_labels")
        with torch.inference_mode():
            logits = (
                judge(**{name: value.to(judge.device) for name, value in inputs.items()})
                .logits.float()
                .cpu()
            )
        asked = verdicts >= 0  # (B, L), row by row in the order of the steps
        scores += (logits[asked][:, yes] - logits[asked][:, no]).sigmoid().tolist()
        labels += (verdicts[asked] == yes).tolist()
        clusters += [i for i in batch for _ in examples[i]["labels"]]
    auroc = auroc_metric(labels, scores, clusters)
    return {"step AUROC": auroc, "step accuracy at .5": accuracy_metric(labels, scores, clusters)}


# --- the build ---


def finish(model, tokenizer, folder: Path) -> None:
    """Save in half precision, whole or not at all."""
    working = folder.with_name(folder.name + ".tmp")
    model.cpu().half().save_pretrained(working)
    tokenizer.save_pretrained(working)
    working.rename(folder)


def card(folder: Path, title: str, text: str, figures: dict) -> None:
    from common.files import write_text

    rows = "".join(
        f"| {name} | {metric} | {metric.n} |\n" for name, metric in figures.items() if metric
    )
    table = f"| on validation problems | value and 95 % interval | n |\n|---|---|---|\n{rows}"
    write_text(folder / "README.md", [f"# {title}\n\n{text}\n\n{table}"])
    print(table, flush=True)


def sample_train(policy, count: int, path: Path, job: dict, seed: int) -> list[tuple]:
    """One policy sample (temperature 1) a train problem, kept while the build lasts."""
    from common.files import ResumableRows
    from reasoning.problems import problems

    unit = 1024
    tasks = list(itertools.islice(problems("train"), count))
    rows = ResumableRows(path, job, unit)
    for start in range(len(rows.rows), len(tasks), unit):
        chunk = tasks[start : start + unit]
        name = f"sampling for the judge, {start}/{len(tasks)}"
        answers = policy.generate(
            [task.prompt for task in chunk], temperature=1.0, seed=seed + start, progress=name
        )
        for (answer,) in answers:
            rows.append({"steps": answer.steps})
    return [
        (task, row["steps"]) for task, row in zip(tasks, rows.rows, strict=True) if row["steps"]
    ]


def make_policy(args: BuildArguments, tokenizer, work: Path, job: dict) -> None:
    """`work/policy-SIZE`, with a card; before, a trial of each learning rate if there are several."""
    from evaluation.metrics import mean_metric
    from lm.policy import Policy
    from reasoning.problems import problems

    examples: list[dict] = []

    def trained(name: str, rate: float, count: int) -> Policy:
        if not (work / name).exists():
            print(
                f"{name}: learning from {count} pretraining texts, learning rate {rate:g}",
                flush=True,
            )
            examples.extend(
                [] if examples else policy_data(tokenizer, args.policy_examples, args.seed)
            )
            model = new_policy(tokenizer, args.seed, args.size)
            finish(
                train(
                    model,
                    examples[:count],
                    collate_text,
                    work / f"{name}.training",
                    rate,
                    args.seed,
                ),
                tokenizer,
                work / name,
            )
        return Policy.load(str(work / name))

    tasks = [
        (task.prompt, [], task.steps)
        for task in itertools.islice(problems("validation"), args.validation)
    ]
    trials = {}
    for rate in args.learning_rate if len(args.learning_rate) > 1 else []:
        policy = trained(f"trial-{rate:g}", rate, args.trial_examples)
        trials[rate] = mean_metric(
            policy.logps(tasks, progress=f"solutions under learning rate {rate:g}")
        )
    best = max(trials, key=lambda rate: trials[rate].value, default=args.learning_rate[0])
    name = f"policy-{args.size}"
    policy = trained(name, best, args.policy_examples)
    hidden, _, layers, _, _ = SHAPES[args.size]
    parameters = f"{policy.model.num_parameters() / 1e6:.1f}M"
    values = job | {
        "learning_rate": f"{best:g}",
        "hidden": hidden,
        "layers": layers,
        "parameters": parameters,
    }
    text = POLICY_CARD.format(**values) + (TRIALS_CARD.format(**values) if trials else "")
    of_trials = {
        f"log-prob of reference solutions, nats a token, trial with {rate:g}": trials[rate]
        for rate in trials
    }
    card(work / name, name, text, policy_figures(policy, limit=args.validation) | of_trials)


def main() -> None:
    (args,) = parse_args(
        BuildArguments,
        description="Make policy-mini and judge-mini, or policy-large, from nothing.",
    )
    output = Path(args.output)
    policy_dir, judge_dir = output / f"policy-{args.size}", output / "judge-mini"
    folders = [policy_dir, judge_dir] if args.size == "mini" else [policy_dir]
    work = output / (".build" if args.size == "mini" else f".build-{args.size}")
    for folder in folders:
        check_output(str(folder), args.overwrite)
    job = {name: value for name, value in vars(args).items() if name not in ("output", "overwrite")}
    if work.exists() and not (
        (work / "job.json").is_file() and json.loads((work / "job.json").read_text()) == job
    ):
        shutil.rmtree(work)  # another job's half-built models
    work.mkdir(parents=True, exist_ok=True)
    (work / "job.json").write_text(json.dumps(job))

    from lm.miniature_tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    make_policy(args, tokenizer, work, job)
    if args.size == "mini":
        make_judge(args, tokenizer, work, job)

    for folder in folders:  # copied, so that a build killed here still has what it made
        arriving = work / "arriving"
        shutil.rmtree(arriving, ignore_errors=True)
        shutil.copytree(work / folder.name, arriving)
        shutil.rmtree(folder, ignore_errors=True)
        arriving.rename(folder)
    shutil.rmtree(work)
    print(
        f"wrote {policy_dir}"
        + (f" and {judge_dir} (with {JUDGE_FILE})" if judge_dir in folders else "")
    )


def make_judge(args: BuildArguments, tokenizer, work: Path, job: dict) -> None:
    """`work/judge-mini`, with its GGUF file and a card, from `work/policy-mini`."""
    from transformers import AutoModelForCausalLM

    from lm.policy import Policy

    policy = Policy.load(str(work / "policy-mini"))
    if not (work / "judge-mini").exists():
        print("samples of policy-mini for the judge", flush=True)
        samples = sample_train(policy, args.judge_samples, work / "samples.jsonl", job, args.seed)
        print("judge-mini: learning to judge steps", flush=True)
        question, yes, no = judge_question(tokenizer)
        examples = list(
            judge_data(tokenizer, [*judge_solutions(args.judge_examples, args.seed), *samples])
        )
        random.Random(args.seed).shuffle(examples)
        start = AutoModelForCausalLM.from_pretrained(work / "policy-mini", dtype="float32")
        collate = partial(collate_judge, question=question, yes=yes, no=no)
        model = train(start, examples, collate, work / "judge", args.judge_learning_rate, args.seed)
        finish(model, tokenizer, work / "judge-mini")
    judge = AutoModelForCausalLM.from_pretrained(work / "judge-mini", dtype="float32").to(
        policy.device
    )
    from lm.gguf_export import export_gguf

    export_gguf(str(work / "judge-mini"), str(work / "judge-mini" / JUDGE_FILE))
    figures = judge_figures(judge, tokenizer, policy, limit=args.validation)
    card(work / "judge-mini", "judge-mini", JUDGE_CARD.format(**job), figures)


POLICY_CARD = """A LLaMA of {parameters} parameters (hidden {hidden}, {layers} layers) made by
`python utils/build_embedded_models.py --size {size}` from random weights: {policy_examples} solved word problems of
`reasoning/problems.py`, each once, about 2,000 tokens a step, AdamW, peak learning rate {learning_rate} decayed linearly to 0, seed
{seed}. Its text has mistakes, as human text has: at stated traps the writer is wrong 60 % of the time, elsewhere 3 %. So it is
greedily wrong at traps, by design. Weights in half precision. Licence: as the repository."""

TRIALS_CARD = """

The learning rate is the best of several, each tried on the first {trial_examples} texts: the one under which the reference
solutions of validation problems were likeliest."""

JUDGE_CARD = """Answers "Right?" with Yes or No after every step of a solution, made by `python utils/build_embedded_models.py`. It
starts from policy-mini's weights and learns, with exact labels, from {judge_examples} solutions of pretraining problems (a quarter
right, the others with mistakes) and {judge_samples} policy-mini samples of train problems; AdamW, peak learning rate
{judge_learning_rate} decayed linearly to 0, seed {seed}. It stands in for a pretrained model that can do arithmetic. Weights in
half precision; `judge-mini.Q8_0.gguf` is the same model for llama.cpp and ctransformers. Licence: as the repository."""

if __name__ == "__main__":
    run(main)
