"""Use a response reward model: python reward_model/score_responses.py COMMAND [ARGUMENTS]

    python reward_model/score_responses.py score --output data/scored.csv
    python reward_model/score_responses.py filter --help     all arguments of a command

Input and output are a table (.csv) or rows (.jsonl); both may be compressed (.csv.gz, .jsonl.gz).
"""

import itertools
import json
import math
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import DtypeArgs, arg, check_input, check_outputs, here, parse_args, run, unused
from common.engine import Job, ShardArgs
from common.errors import RecordError, UserError
from common.files import (
    at_root,
    counted,
    file_stem,
    file_type,
    read_rows,
    write_records,
    write_text,
)
from common.identity import content_hash, identity
from common.resumable import ResumableRows
from lm.known_words import MOST_TEXTS
from reasoning.datasets.files import read_table, table_lines
from reasoning.records import PreferencePair, Prompt
from reasoning.splits import refuse_held_out
from reasoning.steps import split_steps
from reward_model.protocols import Response
from reward_model.registry import ScorerArgs, check_scorer, open_scorer, warn_of_foreign_responses
from reward_model.score_checks import warn_of_scores

UNIT = 1024  # responses that are scored together
TEXTS = ("answer", "response", "steps")  # the fields that may hold the response


@dataclass
class ScoreArgs(ScorerArgs, DtypeArgs, ShardArgs):
    input: str = arg(
        at_root("data/answers.csv.gz"),
        "CSV or JSONL, in each row a `prompt` and a response: `answer`, `response` or `steps`",
    )
    output: str = arg("", "the result; score and filter write CSV or JSONL, as the input is")
    overwrite: bool = arg(False, "replace an existing output")


@dataclass
class FilterArgs(ScoreArgs):
    threshold: float | None = arg(
        None, "keep every row with at least this score (default: the best row of each prompt)"
    )


@dataclass
class Table:
    """The rows of a file, and how to write them: as CSV with these columns and this delimiter, or
    as JSONL if there are no columns."""

    rows: list[dict]
    columns: list[str] | None = None
    delimiter: str = ","

    def write(self, path: str, rows: list[dict]) -> None:
        if self.columns is None:
            write_records(path, rows)
            return
        write_text(path, table_lines(self.columns, rows, self.delimiter))


def read_responses(path: str) -> tuple[Table, list[Response]]:
    """The table, and the (prompt, response) of each of its rows.

    Raises RecordError with file and line."""
    if file_type(path) == ".jsonl":
        numbered = list(counted(read_rows(path), path))
        table = Table([row for _, row in numbered])
    else:
        delimiter, names, lines = read_table(path, ("prompt",))
        numbered = [(line, dict(zip(names, cells, strict=True))) for line, cells in lines]
        columns = list(dict.fromkeys([*names, "score"]))
        table = Table([row for _, row in numbered], columns, delimiter)
    responses = []
    for line, row in numbered:
        try:
            responses.append((Prompt.from_row(row).prompt, _response(row)))
        except RecordError as error:
            raise RecordError(f"{path}:{line}: {error}") from None
    if not responses:
        raise RecordError(f"{path}: no rows")
    return table, responses


def _response(row: dict) -> str:
    name = next((name for name in TEXTS if name in row), None)
    if name is None:
        raise RecordError(f"expected a field {', '.join(TEXTS[:2])} or {TEXTS[2]}")
    text = "\n".join(row[name]) if name == "steps" and isinstance(row[name], list) else row[name]
    if not isinstance(text, str) or not text.strip():
        raise RecordError(f"field '{name}': expected a text, got {json.dumps(text)[:60]}")
    return text


class Scoring:
    """Scores responses with the scorer that it holds.

    some: of those that it will score, to see whether the scorer knows their words."""

    def __init__(self, args: ScoreArgs, some: list[Response]):
        self.scorer = open_scorer(args)
        print(self.scorer)
        warn_of_foreign_responses(self.scorer, some)

    def __call__(self, start: int, responses: list[Response]) -> list[dict]:
        """A row for each response. `cut` of the first one: how many of them did not fit."""
        cut_before = self.scorer.cut
        rows: list[dict] = [{"score": score} for score in self.scorer.score(responses)]
        rows[0]["cut"] = self.scorer.cut - cut_before
        return rows

    def close(self) -> None:
        self.scorer.close()


def left_out(response: Response, reason: str) -> dict:
    return {"score": None}


@dataclass
class Scored:
    """What `scored` found, without the rows that are left out."""

    table: Table  # with the column `score`
    responses: list[Response]
    scores: list[float]
    job: ResumableRows

    def write(self, path: str, rows: list[dict]) -> None:
        self.table.write(path, rows)
        self.job.finish()


def scored(args: ScoreArgs) -> Scored | None:
    """The scores of all responses; None if a part of them (--shard) was scored.

    A user's mistakes are found before the model is loaded."""
    if not args.output:
        raise UserError("argument --output: expected a file for the result")
    check_input(args.input)
    check_scorer(args)
    from lm.loading import scoring_identity  # torch would slow --help

    table, responses = read_responses(args.input)
    names = {"scorer": identity(args.scorer), "input": content_hash(args.input)}
    job = Job(args, names | scoring_identity(), responses, UNIT)
    check_outputs(job.outputs, [args.input, args.scorer], job.may_replace())
    rows = job.open()
    if len(rows):
        print(f"resuming: {len(rows)} of {len(responses)} responses are done")
    make_worker = partial(Scoring, args, job.some(MOST_TEXTS))
    job.fill(rows, make_worker, left_out, desc="scoring", noun="response")
    if job.is_part:
        return None
    found = rows.rows
    if cut := sum(row.get("cut", 0) for row in found):
        print(f"{cut} of {len(responses)} responses do not fit with their prompts", end="")
        print(": the start of the prompt was cut off")
    known = [row["score"] is not None for row in found]
    job.write_left_out(
        [row for row, is_known in zip(table.rows, known, strict=True) if not is_known]
    )
    table.rows = list(itertools.compress(table.rows, known))
    scores = [row["score"] for row in itertools.compress(found, known)]
    if not scores:
        rows.finish()
        raise UserError(f"no response could be scored: see {job.left_out_path}")
    advice = "what to do: give another --scorer; evaluation/eval_response_reward.py measures one"
    warn_of_scores(scores, advice)
    for row, score in zip(table.rows, scores, strict=True):
        row["score"] = round(score, 6)
    return Scored(table, list(itertools.compress(responses, known)), scores, rows)


def by_prompt(responses: list[Response]) -> dict[str, list[int]]:
    """Prompt -> the indices of its responses."""
    indices: dict[str, list[int]] = {}
    for index, (prompt, _) in enumerate(responses):
        indices.setdefault(prompt, []).append(index)
    return indices


# --- the commands ---


def write_scores(args: ScoreArgs) -> None:
    if (found := scored(args)) is None:
        return
    scores = found.scores
    found.write(args.output, found.table.rows)
    print(f"wrote {len(scores)} scores, {min(scores):.3f} to {max(scores):.3f}, to {args.output}")


def write_best(args: FilterArgs) -> None:
    if (found := scored(args)) is None:
        return
    scores = found.scores
    if args.threshold is None:
        groups = by_prompt(found.responses).values()
        kept = sorted(max(group, key=scores.__getitem__) for group in groups)
    else:
        kept = [index for index, score in enumerate(scores) if score >= args.threshold]
    found.write(args.output, [found.table.rows[index] for index in kept])
    print(f"wrote {len(kept)} of {len(scores)} rows to {args.output}")


# One row that `pairs` writes: two responses, split into lines. The scores are for the losses that
# weigh steps; every step has the probability that its side is the better one, sigmoid(r - r of the
# other side).   {"prompt": "Mia has 12 apples. ...", "chosen": ["Step 1: 12 + 14 = 26", ...],
# "rejected": ["Step 1: 12 + 14 = 16", ...], "prefix": [], "chosen_scores": [0.97, ...],
# "rejected_scores": [0.03, ...]}
def write_pairs(args: ScoreArgs) -> None:
    if args.output and file_type(args.output) != ".jsonl":
        raise UserError(f"argument --output: expected a .jsonl file, got {args.output}")
    if (found := scored(args)) is None:
        return
    table, responses, scores = found.table, found.responses, found.scores
    kept_back = {
        prompt
        for row, (prompt, _) in zip(table.rows, responses, strict=True)
        if row.get("split") not in (None, "", "train")
    }
    pairs, skipped = [], 0
    for prompt, group in by_prompt(responses).items():
        if prompt in kept_back:
            continue
        best, worst = (choose(group, key=scores.__getitem__) for choose in (max, min))
        better, worse = (split_steps(responses[index][1]) for index in (best, worst))
        if better == worse or scores[best] == scores[worst]:
            skipped += 1
            continue
        row = asdict(PreferencePair.from_solutions(prompt, better, worse))
        probability = round(1 / (1 + math.exp(max(-700.0, scores[worst] - scores[best]))), 6)
        row["chosen_scores"] = [probability] * len(row["chosen"])
        row["rejected_scores"] = [round(1 - probability, 6)] * len(row["rejected"])
        pairs.append(PreferencePair.from_row(row))
    refuse_held_out(args.input, pairs)
    if kept_back:
        print(f"{len(kept_back)} prompts left out: they are not of the split train")
    if skipped:
        print(f"{skipped} prompts left out: they have one response, or equal ones")
    if not pairs:
        found.job.finish()
        raise UserError(f"{args.input}: no prompt gives a pair, nothing was written")
    write_records(args.output, pairs)
    found.job.finish()
    trained = unused(at_root(f"saved_model/{file_stem(args.output)}"))
    flags = ("--dataset_name", args.output, "--output_dir", trained, "--loss_type", "sigmoid")
    print(f"wrote {len(pairs)} pairs to {args.output}")
    print(f"next: {here('python train.py dpo', *flags)}")


# command -> (its function, its arguments, what it does)
COMMANDS = {
    "score": (write_scores, ScoreArgs, "write the rows again with a column `score`"),
    "filter": (
        write_best,
        FilterArgs,
        "write the best row of each prompt, or with --threshold all rows with at least that score",
    ),
    "pairs": (
        write_pairs,
        ScoreArgs,
        "write preference pairs for `python train.py dpo`: for each prompt the best response "
        "against the worst",
    ),
}


def main() -> None:
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__)
        print(
            "commands:", *(f"  {name:8}{what}" for name, (*_, what) in COMMANDS.items()), sep="\n"
        )
        return
    if command not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise UserError(f"unknown command {command}: expected one of {known} (see --help)")
    function, arguments, what = COMMANDS[command]
    (args,) = parse_args(arguments, description=what, args=argv, command=command)
    function(args)


if __name__ == "__main__":
    run(main)
