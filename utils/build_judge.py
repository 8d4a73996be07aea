"""Make judge-mini: a step judge that answers "Right?" after every step with Yes or No.

    python utils/build_judge.py --overwrite        (or: make models-judge)

It starts from policy-surprisal, which is policy-mini with two layers that hold how unlikely
policy-mini found each token (utils/add_surprisal_layers.py). It learns from reference solutions,
solutions with mistakes and policy-mini's own samples, with exact labels. It is also written as a
GGUF file. The script resumes after an interruption."""

import itertools
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_model, parse_args, run
from common.files import at_root
from common.identity import identity
from common.resumable import ResumableRows
from evaluation.metrics import accuracy_metric, auroc_metric
from lm.text_encoding import encode_steps
from reasoning.grading import grade_steps
from reasoning.problems import corrupted, problems, stories
from reward_model.templates import PLAIN
from utils.build_policy import bucketed, building, card, finish, job_of, train

JUDGE_FILE = "judge-mini.Q8_0.gguf"

# Markdown, one sentence a line
JUDGE_SUMMARY = """
A step judge: it answers "Right?" with Yes or No after every step of a solution.
It was made by `python utils/build_judge.py` and takes the place of a pretrained model that can do arithmetic.
"""  # noqa: E501
JUDGE_TRAINING = """
- Training starts from policy-surprisal: policy-mini with two layers that hold how unlikely it found each token.
- Data with exact labels: {examples} solutions of pretraining problems (a quarter right, the others with mistakes)
  and {samples} policy-mini samples of train problems.
- AdamW, peak learning rate {learning_rate}, decayed linearly to 0, seed {seed}.
- Weights in half precision; `judge-mini.Q8_0.gguf` is the same model for llama.cpp and ctransformers.
"""  # noqa: E501
# of the metadata
JUDGE_KINDS = {"step AUROC": "step_auroc", "step accuracy at .5": "step_accuracy"}


@dataclass
class JudgeBuildArguments:
    model_name_or_path: str = arg(
        at_root("models/policy-surprisal"), "the model from which the judge starts"
    )
    policy: str = arg(at_root("models/policy-mini"), "the policy whose samples are judged")
    output: str = arg(at_root("models"), "folder of judge-mini/")
    examples: int = arg(16_000, "solutions that are written for the judge, right and wrong")
    samples: int = arg(10_000, "samples of the policy, one a train problem")
    learning_rate: float = arg(5e-4, "peak learning rate of AdamW, decayed linearly to 0")
    validation: int = arg(2000, "validation problems for the model card")
    seed: int = arg(0, "seed of the mistakes and of the order")
    overwrite: bool = arg(False, "replace a finished model")


# torch, transformers and the modules that load them are imported in the functions below, because
# they would slow --help.

# --- training data ---


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


def judge_question(tokenizer: Any) -> tuple[list[int], int, int]:
    """(ids of the question after a newline, id of yes, id of no)."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    question = ids("\n" + PLAIN.question)[len(ids("\n")) :]
    return question, ids("? Yes")[-1], ids("? No")[-1]


def sample_train(policy: Any, count: int, path: Path, job: dict, seed: int) -> list[tuple]:
    """(problem, steps) of one policy sample (temperature 1) for each train problem.

    The samples are kept in `path` until the build ends."""
    unit = 1024
    train_problems = list(itertools.islice(problems("train"), count))
    rows = ResumableRows(path, job, unit)
    for start in range(len(rows), len(train_problems), unit):
        prompts = [problem.prompt for problem in train_problems[start : start + unit]]
        progress = f"sampling for the judge, {start}/{len(train_problems)}"
        samples = policy.generate(prompts, temperature=1.0, seed=seed + start, progress=progress)
        for (sample,) in samples:
            rows.append({"steps": sample.steps})
    pairs = zip(train_problems, rows.rows, strict=True)
    return [(problem, row["steps"]) for problem, row in pairs if row["steps"]]


# --- training ---


def judge_loss(model: Any, inputs: dict) -> Any:
    """Cross-entropy of the answers plus that of the tokens of right steps."""
    # torch would slow --help
    from torch.nn.functional import cross_entropy

    answers, trunk_labels = inputs.pop("answers"), inputs.pop("trunk_labels")
    logits = model(**inputs).logits.float()
    trunk_logits, trunk_labels = logits[:, :-1].flatten(0, 1), trunk_labels[:, 1:].flatten()
    loss = cross_entropy(logits.flatten(0, 1), answers.flatten())
    return loss + cross_entropy(trunk_logits, trunk_labels)


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


def make_judge(args: JudgeBuildArguments, work: Path, job: dict) -> None:
    """Make `work/judge-mini` with its GGUF file and its card."""
    # torch would slow --help
    from lm.gguf_export import export_gguf
    from lm.loading import load_model
    from lm.policy import Policy
    from trainer.model_card import judge_use

    policy, folder = Policy.load(args.policy), work / "judge-mini"
    tokenizer = policy.tokenizer
    if not folder.exists():
        samples = sample_train(policy, args.samples, work / "samples.jsonl", job, args.seed)
        question, yes, no = judge_question(tokenizer)
        solutions = [*judge_solutions(args.examples, args.seed), *samples]
        examples = list(judge_data(tokenizer, solutions))
        random.Random(args.seed).shuffle(examples)
        model, _ = load_model(args.model_name_or_path, "float32")
        # an LLM judge needs no step token of a PRM
        model.resize_token_embeddings(len(tokenizer))
        collate = partial(collate_judge, question=question, yes=yes, no=no)
        rate, checkpoints = args.learning_rate, work / "training"
        model = train(model, examples, collate, checkpoints, rate, args.seed, judge_loss)
        finish(model, tokenizer, folder)
    judge, _ = load_model(str(folder), "float32")
    export_gguf(folder, folder / JUDGE_FILE)
    figures = judge_figures(judge.to(policy.device), tokenizer, policy, args.validation)
    use, base = judge_use(tokenizer), args.model_name_or_path
    card(folder, JUDGE_SUMMARY, JUDGE_TRAINING.format(**job), use, figures, JUDGE_KINDS, base)


def main() -> None:
    (args,) = parse_args(JudgeBuildArguments, description=__doc__.split("\n\n")[0])
    models = (args.model_name_or_path, args.policy)
    for model in models:
        check_model(model)
    job = {**job_of(args), "identities": [*map(identity, models)]}
    folder = Path(args.output) / "judge-mini"
    with building(folder, job, args.overwrite) as work:
        make_judge(args, work, job)
    print(f"wrote {folder} (with {JUDGE_FILE})")


if __name__ == "__main__":
    run(main)
