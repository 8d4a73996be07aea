"""Write several answers to every prompt, for a person to rank (data/answers.csv.gz).

    python utils/build_ranked_responses.py --rank_by exact --overwrite

The policy answers every prompt `--answers` times. Answer j gets temperature j and top-p j of the
lists (short lists are repeated) and the seed `--seed` + j. Its row keeps all three, so the same
model can give the same answer again. The answers get no ranks: utils/rank_responses.py shows them
to a person. A killed run resumes when it is started again.

`--rank_by exact` needs problems with reference steps. Each problem becomes a group of four answers,
one of each kind, which the exact checker ranks (`rule:exact`):

    1 right      every step is right
    2 flawed     the final answer is right, but a step is wrong
    3 wrong      well-formed with a wrong final answer, in length as close as possible to `right`
    4 malformed  cut off, or a step without an equation

Right and wrong answers are samples. If no flawed or malformed answer was sampled, one is made by
adding an error to a sample, and `generator` ends with +error. The column `category` holds the kind.
Default problems: the generated train problems from which no embedded model has learned.
"""

import hashlib
import itertools
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from common.cli import arg, check_least, check_outputs, parse_args, run
from common.engine import FATAL, Job, ShardArgs
from common.errors import RecordError, UserError
from common.files import at_root
from lm.known_words import MOST_TEXTS
from lm.prompting import is_chat
from lm.registry import PolicyArgs, check_policy, open_policy, policy_identity
from reasoning.answers import extract_answer
from reasoning.datasets.files import Dropped, FieldArgs, check_no_fields, load_rows
from reasoning.datasets.loading import convert_rows, load_problems
from reasoning.datasets.ranking import RankedResponse, check_groups, write_answers
from reasoning.grading import grade_steps, graded, is_correct, step_value
from reasoning.problems import changed_numbers, problems
from reasoning.records import Problem, Prompt
from reasoning.samples import FEW, SaveSamplesArgs, samples_file, show_samples, write_samples
from reasoning.samples import Sample as GradedSample
from reasoning.splits import default_split, refuse_held_out
from reasoning.steps import CLOSING_STEP, STEP_NUMBER, split_steps

UNIT = (
    128  # prompts answered together; with the same seeds such a group always gives the same answers
)
LEARNED = 12_000  # judge-mini learned from samples of the first 12,000 train problems
# Numbers of train problems whose answers no training sees: reward models are chosen on them.
VALIDATION = range(15_200, 18_000)
KINDS = ("right", "flawed", "wrong", "malformed")  # best first


@dataclass
class AnswerArguments(PolicyArgs, FieldArgs, SaveSamplesArgs, ShardArgs):
    input: str | None = arg(
        None,
        "prompts: rows with `prompt` and optionally `category`, or problems in any "
        "shape that reasoning/datasets/shapes.py knows; default: the generated train problems "
        f"from number {LEARNED + 1} on",
    )
    output: str = arg(at_root("data/answers.csv.gz"), "where the answers are written, a CSV table")
    chat: bool = arg(
        False, "send the prompt as a chat message, without the instruction to solve it step by step"
    )
    rank_by: str = arg(
        "nobody",
        "exact: groups of four that the checker ranks; nobody: answers without ranks",
        choices=["nobody", "exact"],
    )
    answers: int = arg(
        4, "answers per prompt; with --rank_by exact, samples from which four are taken"
    )
    temperature: list[float] = arg(
        [0.7, 1.0, 1.3, 1.0], "sampling temperatures of the answers in turn; 0 is greedy"
    )
    top_p: list[float] = arg(
        [1.0],
        "top-p of the answers in turn, above 0 and at most 1: only the most likely "
        "tokens whose probabilities add up to it are sampled",
    )
    max_new_tokens: int = arg(256, "most tokens per answer")
    seed: int = arg(0, "seed of the first answer")
    limit: int | None = arg(None, "use the first N prompts; default: all")
    overwrite: bool = arg(False, "replace the output")

    def __post_init__(self) -> None:
        check_least(self, answers=2, max_new_tokens=1, limit=1)
        if wrong := [value for value in self.temperature if not 0 <= value < float("inf")]:
            raise UserError(f"argument --temperature: expected 0 or more, got {wrong[0]}")
        if wrong := [value for value in self.top_p if not 0 < value <= 1]:
            raise UserError(f"argument --top_p: expected above 0 and at most 1, got {wrong[0]}")
        if not self.temperature or not self.top_p:
            raise UserError("arguments --temperature and --top_p: expected one number or more")
        if self.chat and self.prompt_template is not None:
            raise UserError("argument --prompt_template: --chat sends the prompt alone")
        if self.chat and self.rank_by == "exact":
            raise UserError(
                "argument --chat: --rank_by exact needs step-by-step solutions, which a chat "
                "message does not ask for"
            )

    def settings(self) -> list[dict]:
        """The sampling settings of each answer to a prompt."""
        in_turn = zip(itertools.cycle(self.temperature), itertools.cycle(self.top_p), strict=False)
        return [
            {"temperature": temperature, "top_p": top_p, "seed": self.seed + number}
            for number, (temperature, top_p) in zip(range(self.answers), in_turn, strict=False)
        ]


# The field names enter the hash that identifies a job: runs begun under other names do not resume.
@dataclass(frozen=True)
class PromptTask:
    """A prompt to answer."""

    prompt: str
    category: str = ""
    problem: Problem | None = None
    to_choose: bool = False  # its split is `validation` instead of `train`

    @property
    def split(self) -> str:
        """The split of the prompt and of all its answers."""
        split = default_split(self.prompt)
        return "validation" if self.to_choose and split == "train" else split


def read_tasks(args: AnswerArguments) -> list[PromptTask]:
    """The prompts to answer, each once. Raises UserError if one of them is held out."""
    if args.input is None:
        check_no_fields(args)
        unused = itertools.islice(enumerate(problems("train")), LEARNED, None)
        return [
            PromptTask(problem.prompt, "", problem, number in VALIDATION)
            for number, problem in itertools.islice(unused, args.limit)
        ]
    dropped = Dropped()
    if args.rank_by == "exact":
        loaded = load_problems(args.input, dropped=dropped, fields=args.field_names)
        rows = (PromptTask(problem.prompt, "", problem) for problem in loaded)
    else:
        rows = _prompts(args.input, dropped, args.field_names)
    tasks = list(itertools.islice({task.prompt: task for task in rows}.values(), args.limit))
    dropped.print(args.input)
    refuse_held_out(args.input, tasks)
    if args.rank_by == "exact" and (bare := [task for task in tasks if not task.problem.steps]):
        prompt = repr(bare[0].prompt[:60])
        raise UserError(f"{args.input}: --rank_by exact needs reference steps, {prompt} has none")
    return tasks


def _prompts(name: str, dropped: Dropped, fields: dict[str, str]) -> Iterator[PromptTask]:
    _, first = next(load_rows(name, fields=fields))
    if "prompt" not in first:
        loaded = load_problems(name, dropped=dropped, fields=fields)
        yield from (PromptTask(problem.prompt) for problem in loaded)
        return

    def convert(row: dict, dropped: Dropped) -> Iterator[PromptTask]:
        category = row.get("category") or ""
        if not isinstance(category, str):
            got = json.dumps(category)[:40]
            raise RecordError(f"field 'category': expected a text, got {got}")
        yield PromptTask(Prompt.from_row(row).prompt, category)

    rows = convert_rows(name, load_rows(name, dropped=dropped, fields=fields), convert, dropped)
    yield from (task for _, task in rows)


# --- groups of four, ranked by the exact checker ---


@dataclass(frozen=True)
class Sample:
    text: str
    finished: bool
    settings: dict
    note: str = ""  # the error that was added, if any


def kind_of(sample: Sample, problem: Problem) -> str:
    """One of KINDS, by the text alone.

    A well-formed text has lines `Step 1:`, `Step 2:` ... with an equation each, and then a line
    that states the answer."""
    steps = split_steps(sample.text)
    has_equations = all(
        STEP_NUMBER.match(step) and step_value(step)[0] is not None for step in steps[:-1]
    )
    has_answer = (
        len(steps) > 1 and CLOSING_STEP.match(steps[-1]) and extract_answer(steps[-1]) is not None
    )
    if not has_answer or not has_equations or any(step.endswith("=") for step in steps):
        return "malformed"
    if not is_correct(steps, problem):
        return "wrong"
    all_right = len(steps) == len(problem.steps) and all(grade_steps(steps, problem))
    return "right" if all_right else "flawed"


def group_of_four(
    problem: Problem, samples: list[Sample], rng: random.Random
) -> tuple[dict[str, Sample] | None, str]:
    """(kind -> sample, why there is no group)"""
    found: dict[str, list[Sample]] = {kind: [] for kind in KINDS}
    for sample in samples:
        found[kind_of(sample, problem)].append(sample)
    for kind in ("right", "wrong"):
        if not found[kind]:
            return None, f"no {kind} sample"
    right = found["right"][0]
    wrong = min(found["wrong"], key=lambda sample: _distance(sample.text, right.text))
    flawed = found["flawed"][0] if found["flawed"] else add_error(right, "flawed", problem, rng)
    if found["malformed"]:
        malformed = found["malformed"][0]
    else:
        malformed = add_error(rng.choice([right, wrong]), "malformed", problem, rng)
    if flawed is None or malformed is None:
        return None, "no error could be added"
    return dict(zip(KINDS, (right, flawed, wrong, malformed), strict=True)), ""


def _distance(text: str, other: str) -> tuple[int, int]:
    """The difference in lines, then in characters."""
    return abs(text.count("\n") - other.count("\n")), abs(len(text) - len(other))


def add_error(sample: Sample, kind: str, problem: Problem, rng: random.Random) -> Sample | None:
    """The sample with a random error that makes it of this kind; None if no error does."""
    ways = list((changed_numbers if kind == "flawed" else _broken)(split_steps(sample.text), rng))
    rng.shuffle(ways)
    for steps, note in ways:
        made = Sample("\n".join(steps), sample.finished, sample.settings, note)
        if kind_of(made, problem) == kind:
            return made
    return None


def _broken(steps: list[str], rng: random.Random) -> Iterator[tuple[list[str], str]]:
    """(steps, note) for three ways to make a solution malformed."""
    text, body = "\n".join(steps), "\n".join(steps[:-1])
    yield split_steps(text[: rng.randrange(len(body) // 2, len(body))]), "put in: cut off"
    yield steps[:-1], "put in: no closing line"
    k = rng.randrange(len(steps) - 1)
    without_result = steps[k][: steps[k].rindex("=") + 1]
    yield (
        [*steps[:k], without_result, *steps[k + 1 :]],
        f"put in: step {k + 1} without its result",
    )


# --- rows ---


def ranked_rows(
    task: PromptTask, samples: list[Sample], generator: str
) -> tuple[list[RankedResponse], str]:
    """(a group of four in random order, why there is none)"""
    rng = random.Random(task.prompt)
    group, why_not = group_of_four(task.problem, samples, rng)
    rows = [
        RankedResponse(
            task.prompt,
            "\n".join(split_steps(sample.text)),
            rank,
            "rule:exact",
            kind,
            f"{generator}+error" if sample.note else generator,
            **sample.settings,
            split=task.split,
            note=sample.note,
        )
        for rank, (kind, sample) in enumerate((group or {}).items(), 1)
    ]
    rng.shuffle(rows)
    return rows, why_not


def unranked_rows(
    task: PromptTask, samples: list[Sample], generator: str
) -> tuple[list[RankedResponse], str]:
    """(the answers that differ, why there are fewer than two)"""
    different: dict[str, Sample] = {}
    for sample in samples:
        if sample.text:
            different.setdefault(sample.text, sample)
    rows = [
        RankedResponse(
            task.prompt,
            text,
            category=task.category,
            generator=generator,
            **sample.settings,
            split=task.split,
        )
        for text, sample in different.items()
    ]
    return (rows, "") if len(rows) > 1 else ([], "all answers equal or empty")


def main() -> None:
    (args,) = parse_args(AnswerArguments, description=__doc__.split("\n\n")[0])
    tasks = read_tasks(args)
    check_policy(args)
    identity = {name: getattr(args, name) for name in ("rank_by", "chat", "max_new_tokens")}
    identity |= policy_identity(args)
    identity["settings"] = args.settings()
    content = json.dumps([asdict(task) for task in tasks])
    identity["tasks"] = hashlib.sha256(content.encode()).hexdigest()
    if args.save_samples:
        identity["save_samples"] = True
    job = Job(args, identity, tasks, UNIT)
    may_replace = job.may_replace()
    check_outputs(job.outputs, [args.input, args.model_name_or_path], may_replace)
    samples_path = None if job.is_part else samples_file(args.output, may_replace)

    rows = job.open()
    if len(rows):
        print(f"resuming: {len(rows)} of {len(tasks)} prompts are done")
    prompts = [task.prompt for task in job.some(MOST_TEXTS)]
    job.fill(rows, partial(Answering, args, prompts), unanswered, desc="answering", noun="prompt")
    if job.is_part:
        return
    found = rows.rows
    answers = [RankedResponse(**answer) for row in found for answer in row["answers"]]
    print_summary(args, found, answers)
    if sum(not row["why_not"] for row in found) < FEW * len(tasks):
        samples = [GradedSample(**row["sample"]) for row in found if row.get("sample")]
        show_samples(samples, samples_path)
    if args.save_samples:
        write_samples(samples_path, found)
    pairs = zip(tasks, found, strict=True)
    job.write_left_out([Prompt(task.prompt) for task, row in pairs if row["why_not"] == FATAL])
    if not answers:
        rows.finish()
        raise UserError(
            f"no group of answers could be made, nothing was written to {args.output} (see above)"
        )
    check_groups(answers, args.output)
    write_answers(args.output, answers)
    rows.finish()
    print(f"wrote {len(answers)} answers to {args.output}")


class Answering:
    """Answers prompts with the policy that it holds.

    prompts: some of those that it will answer, to see whether the policy knows their words."""

    def __init__(self, args: AnswerArguments, prompts: list[str]):
        self.args, self.policy = args, open_policy(args, prompts, args.chat)
        local = args.policy_base_url is None
        if args.chat and local and not is_chat(self.policy.tokenizer):
            raise UserError(f"argument --chat: {args.model_name_or_path} has no chat template")
        path = Path(args.model_name_or_path)
        self.generator = path.resolve().name if path.is_dir() else args.model_name_or_path

    def __call__(self, start: int, group: list[PromptTask]) -> list[dict]:
        """A row for each prompt: its answers, or the reason why there are none, and counts."""
        args = self.args
        make_rows = ranked_rows if args.rank_by == "exact" else unranked_rows
        options = {"max_new_tokens": args.max_new_tokens, "chat": args.chat}
        prompts = [task.prompt for task in group]
        columns = [
            [Sample(*text, how) for text in self.policy.texts(prompts, **how, **options)]
            for how in args.settings()
        ]
        rows = []
        for task, *samples in zip(group, *columns, strict=True):
            answers, why_not = make_rows(task, samples, self.generator)
            kinds = {}
            if task.problem:
                kinds = Counter(kind_of(sample, task.problem) for sample in samples)
            counts = {"ended": sum(sample.finished for sample in samples), "kinds": kinds}
            row = {"answers": list(map(asdict, answers)), "why_not": why_not, **counts}
            if why_not:  # a sample that shows why
                row["sample"] = with_verdict(task, samples[0])
            if args.save_samples:
                row["all"] = [with_verdict(task, sample) for sample in samples]
            rows.append(row)
        return rows

    def close(self) -> None:
        """Nothing is open."""


def with_verdict(task: PromptTask, sample: Sample) -> dict:
    """A row of the file of samples."""
    return asdict(graded(task.prompt, split_steps(sample.text), sample.finished, task.problem))


def unanswered(task: PromptTask, reason: str) -> dict:
    """The row of a prompt that is left out."""
    return {"answers": [], "why_not": reason, "ended": 0, "kinds": {}}


def print_summary(args: AnswerArguments, rows: list[dict], answers: list[RankedResponse]) -> None:
    samples, ended = len(rows) * args.answers, sum(row["ended"] for row in rows)
    print(f"{len(rows)} prompts, {samples} samples, {ended} ended by themselves")
    kinds = sum((Counter(row["kinds"]) for row in rows), Counter())
    if kinds:
        shares = [f"{kind} {kinds[kind]} ({kinds[kind] / samples:.3f})" for kind in KINDS]
        print(f"samples: {', '.join(shares)}")
    if args.rank_by == "exact":
        made = Counter(answer.category for answer in answers if answer.note)
        counts = ", ".join(f"{kind} {made[kind]}" for kind in KINDS if made[kind])
        print(f"made by adding an error: {counts or 'none'}")
    why_not = Counter(row["why_not"] for row in rows if row["why_not"])
    dropped = ", ".join(f"{why}: {count}" for why, count in why_not.most_common())
    groups = Counter({answer.prompt: answer.split for answer in answers}.values())
    splits = ", ".join(f"{count} {split}" for split, count in groups.most_common()) or "none"
    without = f"; prompts without a group: {dropped}" if dropped else ""
    print(f"{sum(groups.values())} groups ({splits}){without}")


if __name__ == "__main__":
    run(main)
