"""Tasks for lm-evaluation-harness, in the templates and with the graders of this repository.

The YAML files beside this one name the tasks; docs/lm_eval.md has the commands. The harness imports
this file by its path."""

import itertools
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from common.files import at_root
from evaluation.metrics import processbench_metrics
from lm.prompting import FIELD, PLAIN_TEMPLATE
from lm.text_encoding import CHAT_INSTRUCTION
from reasoning.answers import extract_answer, same_answer
from reasoning.datasets.files import Dropped
from reasoning.datasets.loading import load_problems, load_step_labels
from reasoning.steps import split_steps, stated_answer
from reward_model.templates import CHAT, PLAIN

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
# the words that a judge answers with, as they may follow its question
VERDICTS = ("Yes", " Yes", "No", " No")


class _Task(ConfigurableTask):
    """A task whose data this repository loads, in any shape that it knows.

    Its YAML names the data set as `dataset_path` (a file of the repository, or a name on the hub),
    `dataset_name` and `test_split`. `--metadata TASK=FILE` names another one."""

    load: Callable
    is_chat = False
    has_plain_chat = False  # whether the model's chat template writes the plain template

    def __init__(self, config: dict):
        config.pop("class")  # the harness leaves it in
        super().__init__(config=config)

    def download(self, dataset_kwargs: dict | None = None, **kwargs: Any) -> None:
        """Load the rows. Odd rows are left out and printed. Raises RecordError."""
        config, path = self.config, at_root(self.config.dataset_path)
        name = path if Path(path).exists() else config.dataset_path
        name = (config.metadata or {}).get(config.task, name)
        dropped = Dropped()
        records = self.load(name, config.dataset_name, config.test_split, dropped)
        rows = [vars(record) for record in records]
        dropped.print(name)
        self.dataset = {config.test_split: Dataset.from_list(rows)}

    def fewshot_context(self, *args: Any, **kwargs: Any) -> Any:
        """The prompt of a row. With --apply_chat_template it is a user's message."""
        write = kwargs.get("chat_template") if kwargs.get("apply_chat_template") else None
        if write:
            written = write([{"role": "user", "content": FIELD}])
            self.has_plain_chat = PLAIN_TEMPLATE in written
            self.is_chat = not self.has_plain_chat
        return super().fewshot_context(*args, **kwargs)


class WordProblems(_Task):
    """Solve a problem step by step."""

    load = staticmethod(load_problems)

    def doc_to_text(self, doc: dict, doc_to_text: Any = None) -> str:
        if self.is_chat:
            return CHAT_INSTRUCTION + doc["prompt"]
        if self.has_plain_chat:
            return doc["prompt"]
        return PLAIN_TEMPLATE.replace("{prompt}", doc["prompt"])


def strict(responses: Sequence[list[str]], docs: Sequence[dict]) -> list[str | None]:
    """The answer that the last step of every response states, as in all scripts here."""
    return [stated_answer(split_steps(response)) for response, *_ in responses]


def flexible(responses: Sequence[list[str]], docs: Sequence[dict]) -> list[str | None]:
    """The last answer that a response states anywhere, or else its last number."""
    return [
        extract_answer(response) or next(reversed(NUMBER.findall(response)), None)
        for response, *_ in responses
    ]


def accuracy(doc: dict, results: list[str | None]) -> dict[str, float]:
    """Whether the extracted answer is the right one."""
    return {"accuracy": float(same_answer(results[0], doc["answer"]))}


class StepJudge(_Task):
    """Find the first wrong step of a solution, as ProcessBench asks (Zheng et al. 2024).

    The causal LM is asked about every step, as `--judge hf` asks it. It reports the first step with
    P(Yes) < P(No)."""

    load = staticmethod(load_step_labels)

    def _question(self, doc: dict, k: int) -> str:
        """The question about step k."""
        template = CHAT if self.is_chat else PLAIN
        before = template.before.replace("{prompt}", doc["prompt"])
        return before + "".join(f"{step}\n" for step in doc["steps"][: k + 1]) + template.question

    def doc_to_text(self, doc: dict, doc_to_text: Any = None) -> str:
        return self._question(doc, len(doc["steps"]) - 1)

    def construct_requests(
        self, doc: dict, ctx: str, chat_template: Callable | None = None, **kwargs: Any
    ) -> list[Instance]:
        """Four continuations a step: every verdict, with and without a space before it."""
        kwargs.pop("apply_chat_template", None)
        questions = [self._question(doc, k) for k in range(len(doc["steps"]))]
        if self.is_chat and chat_template:
            questions = [chat_template([{"role": "user", "content": text}]) for text in questions]
        pairs = itertools.product(questions, VERDICTS)
        return [
            Instance(request_type="loglikelihood", doc=doc, arguments=pair, idx=i, **kwargs)
            for i, pair in enumerate(pairs)
        ]


METRICS = ("processbench_f1", "processbench_error_accuracy", "processbench_correct_accuracy")


def verdicts(doc: dict, results: list[tuple[float, bool]]) -> dict[str, tuple]:
    """(labels, scores) of the steps, for every metric: a metric is of all solutions together."""
    logps = np.array([logp for logp, _ in results]).reshape(-1, 2, 2)  # step, verdict, space
    yes, no = np.logaddexp.reduce(logps, axis=2).T
    scores = 1 / (1 + np.exp(no - yes))
    return dict.fromkeys(METRICS, (doc["labels"], scores.tolist()))


def _processbench(name: str, solutions: Sequence[tuple[list, list[float]]]) -> float:
    """A metric of ProcessBench, 0 to 1; NaN where the solutions have no such kind."""
    labels, scores = zip(*solutions, strict=True)
    metrics = processbench_metrics(labels, scores, range(len(solutions)))
    return metrics[name].value if name in metrics else nan


f1, error_accuracy, correct_accuracy = (partial(_processbench, name) for name in METRICS)
