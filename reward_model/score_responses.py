"""A response reward model at work: python reward_model/score_responses.py COMMAND ...

python reward_model/score_responses.py score --help     a score for every response
python reward_model/score_responses.py filter --help    the best response to each prompt, or all over a threshold
python reward_model/score_responses.py pairs --help     preference pairs for `python train.py dpo`
"""

import csv
import io
import json
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_input, check_output, parse_args, run
from common.errors import RecordError, UserError
from common.files import at_root, read_rows, write_records, write_text
from reasoning.datasets.files import read_table
from reasoning.records import PreferencePair, Prompt
from reasoning.splits import refuse_held_out
from reasoning.steps import split_steps
from reward_model.registry import ScorerArgs, check_scorer, open_scorer

HELP = """usage: python reward_model/score_responses.py COMMAND [ARGUMENTS]

commands:
  score     writes the rows again, with a column `score`
  filter    writes the best row of each prompt, or with --threshold all rows that score as much
  pairs     writes preference pairs, the best response to each prompt against the worst (JSONL)

arguments of all:
  --input FILE           a table (.csv) or rows (.jsonl) with `prompt`, and `answer`, `response` or `steps`    [data/answers.csv]
  --output FILE          where the result goes
  --scorer MODEL         a reward model: a folder or a hub name    [saved_model/response_reward_model, else models/reward-mini]
  --overwrite            replace the output
"""
TEXTS = ("answer", "response", "steps")  # what a response is called


@dataclass
class ScoreArgs(ScorerArgs):
    input: str = field(
        default=at_root("data/answers.csv"),
        metadata={
            "help": "CSV or JSONL with a prompt and a response a row: `prompt`, and `answer`, `response` or `steps`"
        },
    )
    output: str | None = field(
        default=None, metadata={"help": "the result; rows are written as they came, CSV or JSONL"}
    )
    overwrite: bool = field(default=False, metadata={"help": "replace --output if it is there"})


@dataclass
class FilterArgs(ScoreArgs):
    threshold: float | None = field(
        default=None,
        metadata={
            "help": "keep every row that scores as much or more; without: the best row of each prompt"
        },
    )


@dataclass
class Table:
    """The rows of a file, and how they are written again: as CSV with these columns and this delimiter, or as JSONL."""

    rows: list[dict]
    columns: list[str] | None = None
    delimiter: str = ","

    def write(self, path: str, rows: list[dict]) -> None:
        if self.columns is None:
            write_records(path, rows)
            return
        text = io.StringIO(newline="")
        # csv quotes a lone \r only where \r ends lines
        writer = csv.DictWriter(text, self.columns, delimiter=self.delimiter, lineterminator="\r\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, [text.getvalue()])


def read_responses(path: str) -> tuple[Table, list[tuple[str, str]]]:
    """The table, and (prompt, response) of each of its rows. Raises RecordError with file and line."""
    if path.endswith(".jsonl"):
        numbered = list(read_rows(path))
        table = Table([row for _, row in numbered])
        lines = [number for number, _ in numbered]
    else:
        table, lines = _read_csv(path)
    pairs = []
    for line, row in zip(lines, table.rows, strict=True):
        try:
            pairs.append((Prompt.from_row(row).prompt, _response(row)))
        except RecordError as error:
            raise RecordError(f"{path}:{line}: {error}") from None
    if not pairs:
        raise RecordError(f"{path}: no rows")
    return table, pairs


def _read_csv(path: str) -> tuple[Table, list[int]]:
    delimiter, names, rows = read_table(path, ("prompt",))
    rows = [(line, dict(zip(names, cells, strict=True))) for line, cells in rows]
    return Table([row for _, row in rows], list(dict.fromkeys([*names, "score"])), delimiter), [
        line for line, _ in rows
    ]


def _response(row: dict) -> str:
    name = next((name for name in TEXTS if name in row), None)
    if name is None:
        raise RecordError(f"expected a field {', '.join(TEXTS[:2])} or {TEXTS[2]}")
    text = "\n".join(row[name]) if name == "steps" and isinstance(row[name], list) else row[name]
    if not isinstance(text, str) or not text.strip():
        raise RecordError(f"field '{name}': expected a text, got {json.dumps(text)[:60]}")
    return text


def scored(args: ScoreArgs) -> tuple[Table, list[tuple[str, str]], list[float]]:
    """The table, its (prompt, response) pairs and their scores. A user's mistakes are found before the model is loaded."""
    if args.output is None:
        raise UserError("argument --output: expected a file that the result is written to")
    check_input(args.input)
    check_output(args.output, args.overwrite)
    table, pairs = read_responses(args.input)
    check_scorer(args)
    with open_scorer(args) as scorer:
        print(scorer)
        scores = scorer.score(pairs, progress="responses")
        if scorer.cut:
            print(
                f"{scorer.cut} of {len(pairs)} responses do not fit with their prompts, which lost their beginning"
            )
    for row, score in zip(table.rows, scores, strict=True):
        row["score"] = round(score, 6)
    return table, pairs, scores


def by_prompt(pairs: list[tuple[str, str]]) -> dict[str, list[int]]:
    """Prompt -> the places of its responses."""
    places: dict[str, list[int]] = {}
    for place, (prompt, _) in enumerate(pairs):
        places.setdefault(prompt, []).append(place)
    return places


def score(argv: list[str]) -> None:
    """A score for every response."""
    (args,) = parse_args(ScoreArgs, description="A score for every response.", args=argv)
    table, _, scores = scored(args)
    table.write(args.output, table.rows)
    print(f"wrote {len(scores)} scores, {min(scores):.3f} to {max(scores):.3f}, to {args.output}")


def keep(argv: list[str]) -> None:
    """The best response to each prompt, or all over a threshold."""
    (args,) = parse_args(
        FilterArgs,
        description="The best response to each prompt, or all over a threshold.",
        args=argv,
    )
    if args.threshold is not None and not math.isfinite(args.threshold):
        raise UserError(f"argument --threshold: expected a number, got {args.threshold}")
    table, pairs, scores = scored(args)
    if args.threshold is None:
        places = sorted(max(places, key=scores.__getitem__) for places in by_prompt(pairs).values())
    else:
        places = [place for place, value in enumerate(scores) if value >= args.threshold]
    table.write(args.output, [table.rows[place] for place in places])
    print(f"wrote {len(places)} of {len(scores)} rows to {args.output}")


# One row of what `pairs` writes: the responses line by line. The scores are there for the losses that weigh steps; every step has
# the probability that its side is the better one, sigmoid(r - r of the other side).
#   {"prompt": "Mia has 12 apples. ...", "chosen": ["Step 1: 12 + 14 = 26", ...], "rejected": ["Step 1: 12 + 14 = 16", ...],
#    "prefix": [], "chosen_scores": [0.97, ...], "rejected_scores": [0.03, ...]}
def pairs(argv: list[str]) -> None:
    """Preference pairs: the best response to each prompt against the worst."""
    (args,) = parse_args(
        ScoreArgs,
        description="Preference pairs: the best response to each prompt against the worst.",
        args=argv,
    )
    if args.output is not None and not args.output.endswith(".jsonl"):
        raise UserError(f"argument --output: expected a .jsonl file, got {args.output}")
    table, texts, scores = scored(args)
    kept_back = {
        text[0]
        for row, text in zip(table.rows, texts, strict=True)
        if row.get("split") not in (None, "", "train")
    }
    written, skipped = [], 0
    for prompt, places in by_prompt(texts).items():
        if prompt in kept_back:
            continue
        best, worst = (choose(places, key=scores.__getitem__) for choose in (max, min))
        better, worse = (split_steps(texts[place][1]) for place in (best, worst))
        if better == worse or scores[best] == scores[worst]:
            skipped += 1
            continue
        pair = asdict(PreferencePair.of_solutions(prompt, better, worse))
        probability = round(1 / (1 + math.exp(max(-700.0, scores[worst] - scores[best]))), 6)
        pair["chosen_scores"] = [probability] * len(pair["chosen"])
        pair["rejected_scores"] = [round(1 - probability, 6)] * len(pair["rejected"])
        written.append(PreferencePair.from_row(pair))
    refuse_held_out(args.input, written)
    for count, why in (
        (len(kept_back), "are not of the split train"),
        (skipped, "have one response, or equal ones"),
    ):
        if count:
            print(f"{count} prompts left out: they {why}")
    if not written:
        raise UserError(f"{args.input}: no prompt gives a pair, nothing was written")
    write_records(args.output, written)
    print(
        f"wrote {len(written)} pairs to {args.output}: python train.py dpo --dataset_name {args.output} --loss_type sigmoid"
    )


COMMANDS = {"score": score, "filter": keep, "pairs": pairs}


def main() -> None:
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(HELP, end="")
        return
    if command not in COMMANDS:
        raise UserError(
            f"unknown command {command}: expected one of {', '.join(COMMANDS)} (see --help)"
        )
    COMMANDS[command](argv)


if __name__ == "__main__":
    run(main)
