"""The known shapes of data sets, and how a row of each becomes a record of this project.

reasoning/datasets/loading.py recognizes the shape of a data set and applies its conversion
(problem_shapes.py, step_shapes.py and preference_shapes.py beside this file). A conversion takes a
row and `dropped` (reasoning/datasets/files.py), and yields records. A row that does not have the
form of its shape raises RecordError. A row that has the form but cannot be used (an answer
`notfound`, a question without a step) is left out and counted in `dropped`. The caller leaves out
rows that lack a field of their shape or have it empty.

A step is one line (reasoning/steps.py). A published step with line breaks, mostly LaTeX, is joined
into one line, so that splitting the response again gives equally many steps. Its words stay as
published, `Step 3:` included, except that the annotations of GSM8K (`<<48/2=24>>`) are removed. A
text without marked steps is cut by `split_text`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from common.files import Readable
from reasoning.datasets.files import Dropped
from reasoning.datasets.preference_shapes import has_steps, own_pair, step_dpo_pair, trl_pair
from reasoning.datasets.problem_shapes import (
    asdiv_problem,
    calculator_problem,
    gsm8k_problem,
    math_problem,
    own_problem,
    placeholder_problem,
    problem_with_answer,
    svamp_problem,
)
from reasoning.datasets.row_fields import is_empty
from reasoning.datasets.step_shapes import (
    omegaprm_values,
    own_labels,
    own_value,
    prm800k_labels,
    processbench_labels,
    shepherd_labels,
    three_column_value,
    trl_labels,
)
from reasoning.records import LabelledSolution, PreferencePair, Problem, StepValue

KINDS: dict[str, type[Readable]] = {
    "problems": Problem,
    "pairs": PreferencePair,
    "step_labels": LabelledSolution,
    "step_values": StepValue,
}


@dataclass(frozen=True)
class Shape:
    """How to recognize a data set, and what can be made of it.

    fields: every row has them. gives: kind of record (a key of KINDS) -> conversion, best kind
    first. test: a further condition on the row. may_be_empty: of the fields."""

    name: str
    fields: tuple[str, ...]
    gives: dict[str, Callable[[dict, Dropped], Iterator]]
    test: Callable[[dict], bool] = lambda row: True
    may_be_empty: tuple[str, ...] = ()

    @property
    def needed(self) -> list[str]:
        """The fields that no usable row has empty."""
        return [field for field in self.fields if field not in self.may_be_empty]

    def fits(self, row: dict, with_values: bool) -> bool:
        """Whether a row has the fields, and with_values has a value in each that needs one."""
        if any(field not in row for field in self.fields):
            return False
        if with_values and any(is_empty(row[field]) for field in self.needed):
            return False
        return self.test(row)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.fields)})"


# The first shape that fits a row is the row's shape. The comments give the source of a shape: its
# name on the hub, or its repository.
SHAPES = [
    Shape(  # xinlai/Math-Step-DPO-10K
        "Step-DPO",
        ("prompt", "initial_reason_steps", "chosen", "rejected"),
        {"pairs": step_dpo_pair, "problems": problem_with_answer("prompt", "answer")},
        may_be_empty=("initial_reason_steps", "chosen", "rejected"),
    ),
    Shape(  # github.com/openai/prm800k
        "PRM800K",
        ("question", "label"),
        {
            "step_labels": prm800k_labels,
            "problems": problem_with_answer("question.problem", "question.ground_truth_answer"),
        },
        lambda row: isinstance(row["question"], dict),
    ),
    # peiyi9979/Math-Shepherd
    Shape("Math-Shepherd", ("input", "label"), {"step_labels": shepherd_labels}),
    # Qwen/ProcessBench
    Shape("ProcessBench", ("problem", "steps", "label"), {"step_labels": processbench_labels}),
    Shape(  # openreasoner/MATH-APS
        "OmegaPRM",
        ("question", "reasoning_steps"),
        {
            "step_values": omegaprm_values,
            "problems": problem_with_answer("question", "final_answer"),
        },
    ),
    Shape(
        "TRL stepwise supervision", ("prompt", "completions", "labels"), {"step_labels": trl_labels}
    ),
    Shape("labelled solutions", ("prompt", "steps", "labels"), {"step_labels": own_labels}),
    Shape("step values", ("prompt", "step", "score"), {"step_values": own_value}),
    # CSV of utils/build_mcts_dataset.py
    Shape("three columns", ("question", "next_step", "score"), {"step_values": three_column_value}),
    Shape("pairs of steps", ("prompt", "chosen", "rejected"), {"pairs": own_pair}, has_steps),
    Shape(
        "TRL preference",
        ("chosen", "rejected"),
        {"pairs": trl_pair},
        lambda row: not has_steps(row),
    ),
    Shape(  # axolotl, argilla
        "responses", ("chosen_response", "rejected_response"), {"pairs": trl_pair}
    ),
    # ms-swift
    Shape("messages", ("messages", "rejected_response"), {"pairs": trl_pair}),
    Shape(
        "problems", ("prompt", "answer"), {"problems": own_problem}, lambda row: "rank" not in row
    ),
    Shape("MATH", ("problem", "solution"), {"problems": math_problem}),
    Shape(  # mwpt5/MAWPS, cq01/mawps-asdiv-a_svamp; MAWPS and ASDiv in github.com/arkilpatel/SVAMP
        "number placeholders",
        ("question", "numbers", "equation", "answer"),
        {"problems": placeholder_problem},
    ),
    Shape(  # EleutherAI/asdiv, github.com/chaochun/nlu-asdiv-dataset
        "ASDiv",
        ("body", "question", "formula", "answer"),
        {"problems": asdiv_problem},
        may_be_empty=("body",),
    ),
    Shape(  # ChilleD/SVAMP, github.com/arkilpatel/SVAMP
        "SVAMP",
        ("body", "question", "equation", "answer"),
        {"problems": svamp_problem},
        may_be_empty=("body",),
    ),
    # MU-NLPC/Calc-mawps, MU-NLPC/Calc-svamp, MU-NLPC/Calc-asdiv_a
    Shape("Calc-X", ("question", "chain", "result"), {"problems": calculator_problem}),
    Shape("GSM8K", ("question", "answer"), {"problems": gsm8k_problem}),
    Shape(
        "problem and answer",
        ("problem", "answer"),
        {"problems": problem_with_answer("question", "answer")},
    ),
]
