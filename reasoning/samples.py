"""Show samples with the grader's verdict, where sampling gave little or nothing to learn from."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cli import arg, check_output
from common.errors import UserError, short
from common.files import file_stem, read_rows, write_records

SHOWN = 3
FEW = 0.05  # of the problems: fewer results are few


# One row of NAME.samples.jsonl:
#   {"prompt": "Mia has 12 apples. ...", "steps": ["Step 1: 12 + 14 = 26", "Answer: 26"],
#    "verdict": "wrong",        what the grader says: see reasoning/grading.py::verdict
#    "stated": "26",            the answer that was read in the last step, if there is one
#    "reference": "52",         the right answer, if it is known
#    "scores": [0.98, 0.02]}    the judge's scores, if there is a judge
@dataclass(frozen=True)
class Sample:
    """A sampled solution with its verdict."""

    prompt: str
    steps: list[str]
    verdict: str
    stated: str | None = None
    reference: str | None = None
    scores: list[float] | None = None

    def lines(self) -> list[str]:
        last = short(self.steps[-1]) if self.steps else "nothing"
        answers = [] if self.stated is None else [f"it states {short(self.stated)}"]
        answers += [] if self.reference is None else [f"the reference is {short(self.reference)}"]
        lines = [
            f"  problem    {short(self.prompt)}",
            f"  last step  {last} (of {len(self.steps)})",
            f"  verdict    {'; '.join([self.verdict, ', '.join(answers)]).removesuffix('; ')}",
        ]
        if self.scores is not None:
            lines.append(f"  scores     {' '.join(f'{score:.3f}' for score in self.scores)}")
        return lines


@dataclass(kw_only=True)
class SaveSamplesArgs:
    """Mixed into the arguments of a script that samples."""

    save_samples: bool = arg(
        False,
        "also write every sample to NAME.samples.jsonl beside the output, with its verdict if "
        "answers are known, and with its scores if it was judged",
    )


# verdict -> what to do if most samples have it
ADVICE = {
    "right": "the problems are too easy for this model: give harder ones or a higher --temperature",
    "wrong": "the problems are too hard for this model, or its template is not the one it knows: "
    "give a stronger --model_name_or_path, or more --samples",
    "cut": "the model does not stop within --max_new_tokens: give more of them, or a model that "
    "was trained to end its answers",
    "no answer": "the model does not write `Answer: ...` at the end: give a chat model, or train "
    "it first on solutions of this form (train.py sft)",
    "empty": "the model ends at once: its template is not the one it knows",
}


def samples_file(output: str | Path, overwrite: bool) -> Path:
    """The file of the samples, beside an output. Raises UserError for a file of another kind."""
    path = Path(output).with_name(f"{file_stem(output)}.samples.jsonl")
    try:
        is_own = path.is_file() and "verdict" in next(read_rows(path))[1]
    except (UserError, StopIteration, TypeError):
        is_own = False
    check_output(str(path), overwrite or is_own)
    return path


def three(samples: Sequence[Sample]) -> list[Sample]:
    """Up to three samples, of different verdicts if there are any."""
    first = {sample.verdict: sample for sample in reversed(samples)}
    others = [sample for sample in samples if sample not in first.values()]
    return [*sorted(first.values(), key=samples.index), *others][:SHOWN]


def show_samples(samples: Sequence[Sample], path: Path | None = None) -> None:
    """Print three samples and what to do, and write the three to a file."""
    shown = three(samples)
    if not shown:
        return
    print(f"{len(shown)} of the samples, with the grader's verdict:")
    print("\n\n".join("\n".join(sample.lines()) for sample in shown))
    common = Counter(sample.verdict for sample in samples).most_common(1)[0][0]
    if common in ADVICE:
        print(f"what to do: {ADVICE[common]}")
    if path is not None:
        write_records(path, shown)
        print(f"wrote these samples, whole, to {path}")


def write_samples(path: Path, rows: Iterable[dict]) -> None:
    """Write all samples of --save_samples: of every row its list `all`, each a Sample as a dict."""
    count = write_records(path, (Sample(**each) for row in rows for each in row.get("all", ())))
    print(f"wrote all {count} samples to {path}")
