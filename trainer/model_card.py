"""Model cards that need nothing but transformers: what a model is, how it is asked, its figures.

A card shows the prompt template as text, and code that runs as it stands in the model's folder. Its
metadata are those that the hub reads: licence, base model, figures (model-index).
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from common.identity import adapter_base
from lm.prompting import FIELD, PLAIN_TEMPLATE, is_chat, is_plain
from lm.text_encoding import PLAIN_QUESTION, format_prompt
from reasoning.datasets.files import is_local
from reward_model.prm_formats import StepTokens
from reward_model.response_reward_model import ResponseTokens, format_of

RESPONSE = "{response}"
QUESTION = (
    "Mia has 20 apples. She buys 3 boxes with 4 apples each. How many apples does Mia have now?"
)
STEPS = ["Step 1: 3 + 4 = 7, 20 + 7 = 27", "Answer: 27"]
# pipeline tag -> class of transformers
CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "token-classification": "AutoModelForTokenClassification",
    "text-classification": "AutoModelForSequenceClassification",
}


@dataclass(frozen=True)
class Figure:
    """A figure of the metadata: its kind (`accuracy`), its name in words, and its value."""

    kind: str
    name: str
    value: float


@dataclass(frozen=True)
class Use:
    """How a model is used: its pipeline tag, and the section of the card with template and code."""

    pipeline: str
    text: str


@dataclass(frozen=True)
class About:
    """What the metadata of a card say besides figures.

    base: the model that training started from, a folder or a hub name; None: random weights. data,
    split: what the figures are of, a file or a hub name. licence: an identifier of the hub (`mit`);
    None: that of the base."""

    name: str
    base: str | None
    data: str
    split: str | None = None
    licence: str | None = None
    library: str = "transformers"
    tags: Sequence[str] = ()

    @property
    def base_name(self) -> str | None:
        """The base without the path of this machine."""
        return (
            Path(self.base).resolve().name if self.base and Path(self.base).is_dir() else self.base
        )

    @property
    def data_name(self) -> str:
        """The data without the path of this machine."""
        return Path(self.data).name if is_local(self.data) else self.data


def model_card(
    about: About, summary: str, use: Use, training: str, figures: Sequence[Figure], table: str
) -> str:
    """The text of a README.md. summary, training, table: Markdown, one sentence a line."""
    licence, base = about.licence, about.base_name
    if licence is None and about.base is not None:
        licence = licence_of(about.base)
    results = [_result(figure, use.pipeline, about) for figure in figures if isfinite(figure.value)]
    metadata = ModelCardData(
        license=licence,
        library_name=about.library,
        tags=[*about.tags],
        base_model=base,
        pipeline_tag=use.pipeline,
        model_name=about.name,
        eval_results=results or None,
    )
    of_base = f" It is that of the base model, {base}." if about.licence is None else ""
    unknown = f"That of the base model, {base}, whose card names none that could be read."
    sections = {
        "Use": use.text,
        "Training": training,
        "Figures": table,
        "Licence": f"`{licence}`.{of_base}" if licence else unknown,
    }
    parts = [f"---\n{metadata.to_yaml()}\n---", f"# {about.name}", summary.strip()]
    parts += [f"## {title}\n\n{text.strip()}" for title, text in sections.items()]
    return "\n\n".join(parts) + "\n"


def _result(figure: Figure, task: str, about: About) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type=re.sub(r"[^\w./]+", "-", about.data_name),
        dataset_name=about.data_name,
        dataset_split=about.split,
        metric_type=figure.kind,
        metric_name=figure.name,
        metric_value=round(figure.value, 6),
    )


def licence_of(model: str) -> str | None:
    """The licence that the card of a model names, or for an adapter the card of its base.

    None if there is none that can be read."""
    folder, data = Path(model), None
    # no card, no network, or metadata of another form: the card of the new model says so
    with suppress(Exception):
        if not folder.is_dir():
            data = HfApi().model_info(model, timeout=10).card_data
        elif (folder / "README.md").is_file():
            data = ModelCard.load(folder / "README.md").data
    licence = getattr(data, "license", None)
    if isinstance(licence, str):
        return licence
    base, _ = adapter_base(folder)
    return licence_of(base) if base else None


# --- how each kind of model is used ---


def policy_use(model: Any, tokenizer: Any, is_adapter: bool) -> Use:
    """A policy: it continues the prompt template."""
    template = format_prompt(FIELD, tokenizer)
    lines = [
        f"template = {template!r}",
        f'prompt = template.replace("{FIELD}", question)',
        f"inputs = {_tokenized('prompt', tokenizer)}",
        "output = model.generate(**inputs, max_new_tokens=256, do_sample=False)",
        'answer = output[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
    asked = "The model continues this text; `{prompt}` is the question:"
    wanted = "It writes one step a line, and ends with a line `Answer: ...`."
    if is_plain(tokenizer.chat_template):
        wanted += (
            "\nIts chat template writes the same text for one message of a user, so programs that "
            "send messages\n(`pipeline`, a server) can use the model as well."
        )
    return _use("text-generation", f"{asked}\n\n{_block(template)}\n\n{wanted}", lines)


def prm_use(model: Any, tokenizer: Any, is_adapter: bool) -> Use:
    """A process reward model in the format of reward_model/process_reward_model.py."""
    token, is_least = model.config.step_token, getattr(model.config, "running_min", False)
    text = (
        f"The model reads this text, with `{token}` and a line for every step:\n\n"
        + _block(StepTokens(tokenizer, token).text(FIELD, STEPS))
        + "\n\nThe value of a step is the sigmoid of the logit at its newline, 0 (wrong) to 1."
        + ("\nThe score of a step is the least value so far." if is_least else "")
        + "\nThe scripts of this repository take the folder with `--judge prm --judge_path FOLDER`."
    )
    if is_adapter:
        lines = [
            "from reward_model.process_reward_model import ProcessRewardModel",
            "",
            "with ProcessRewardModel(folder) as judge:",
            "    print(judge.score_steps([(question, steps)]))",
        ]
        return _clone_use("token-classification", text, lines)
    lines = [
        *_step_lines(token, tokenizer),
        f"token = tokenizer.convert_tokens_to_ids({token!r})",
        'begins = (inputs["input_ids"][0] == token).nonzero()[:, 0]',
        "ends = [*(begins[1:] - 1).tolist(), -1]",
        "values = model(**inputs).logits[0, ends, 0].sigmoid()",
        f"print(values{'.cummin(0).values' if is_least else ''}.tolist())",
    ]
    return _use("token-classification", text, lines)


def reward_use(model: Any, tokenizer: Any, is_adapter: bool) -> Use:
    """A response reward model: one number for a whole response."""
    question, token = format_of(model)
    reader = ResponseTokens(tokenizer, None, question, token)
    if reader.is_pair:
        shown = "[CLS] {prompt} [SEP] {response} [SEP]"
        lines = ['inputs = tokenizer(question, "\\n".join(steps), return_tensors="pt")']
    elif token:
        shown, lines = reader.text(FIELD, "\n".join(STEPS)), _step_lines(token, tokenizer)
    else:
        shown = reader.text(FIELD, RESPONSE) + (tokenizer.eos_token if reader.ends_with_eos else "")
        lines = [
            f"template = {shown!r}",
            f'text = template.replace("{FIELD}", question)',
            f'text = text.replace("{RESPONSE}", "\\n".join(steps))',
            f"inputs = {_tokenized('text', tokenizer)}",
        ]
    text = (
        f"The model reads this text:\n\n{_block(shown)}\n\n"
        "It gives one number to a whole response; of two answers to a prompt the better has more."
    )
    if is_adapter:
        lines = [
            "from reward_model.response_reward_model import ResponseRewardModel",
            "",
            "scorer = ResponseRewardModel(folder)",
            'print(scorer.score([(question, "\\n".join(steps))]))',
        ]
        return _clone_use("text-classification", text, lines)
    return _use("text-classification", text, [*lines, "print(model(**inputs).logits[0, 0].item())"])


def _step_lines(token: str, tokenizer: Any) -> list[str]:
    """Code that writes a prompt and steps with step tokens."""
    return [
        f"template = {format_prompt(FIELD, tokenizer)!r}",
        f'text = template.replace("{FIELD}", question)'
        f' + "".join(f"{token}{{step}}\\n" for step in steps)',
        f"inputs = {_tokenized('text', tokenizer)}",
    ]


def judge_use(tokenizer: Any) -> Use:
    """A causal LM without a chat template that is asked about every step."""
    vocabulary = tokenizer.get_vocab()
    spellings = [
        [piece for piece in (word, f"▁{word}", f"Ġ{word}") if piece in vocabulary]
        for word in ("Yes", "No")
    ]
    lines = [
        f"template = {PLAIN_TEMPLATE!r}",
        f"yes, no = (tokenizer.convert_tokens_to_ids(words) for words in {spellings})",
        "for k in range(len(steps)):",
        f'    text = template.replace("{FIELD}", question) + "\\n".join(steps[: k + 1])',
        f'    text += "\\n{PLAIN_QUESTION}"',
        '    chances = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].softmax(-1)',
        "    print(steps[k], (chances[yes].sum() / chances[[*yes, *no]].sum()).item())",
    ]
    shown = f"{PLAIN_TEMPLATE}{STEPS[0]}\n{PLAIN_QUESTION}"
    text = (
        f"The model is asked this about the first step:\n\n{_block(shown)}\n\n"
        "The score of the step is P(Yes) / (P(Yes) + P(No)) of the next token, 0 (wrong) to 1."
    )
    return _use("text-generation", text, lines)


def _tokenized(name: str, tokenizer: Any) -> str:
    """The call that tokenizes a text; a chat template writes the special tokens itself."""
    special = ", add_special_tokens=False" if is_chat(tokenizer) else ""
    return f'tokenizer({name}, return_tensors="pt"{special})'


def _block(text: str, language: str = "text") -> str:
    """A fenced block."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip(chr(10))}\n{fence}"


def _given(lines: Sequence[str]) -> list[str]:
    """The question, and the steps where the code uses them."""
    steps = [f"steps = {STEPS}"] if any("steps" in line for line in lines) else []
    return [f"question = {QUESTION!r}", *steps]


def _use(pipeline: str, text: str, lines: Sequence[str]) -> Use:
    name = CLASSES[pipeline]
    code = [
        f"from transformers import {name}, AutoTokenizer",
        "",
        'folder = "."  # the folder of this card, or the name of the model on the hub',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f'model = {name}.from_pretrained(folder, dtype="float32")',
        *_given(lines),
        *lines,
    ]
    return Use(pipeline, f"{text}\n\n{_block(chr(10).join(code), 'python')}")


def _clone_use(pipeline: str, text: str, lines: Sequence[str]) -> Use:
    """Of an adapter that only this repository can put on its base."""
    code = [
        "import sys",
        "",
        'sys.path.insert(0, "../..")  # a clone of the repository that trained the model',
        *lines[:2],
        'folder = "."  # the folder of this card',
        *_given(lines),
        *lines[2:],
    ]
    return Use(pipeline, f"{text}\n\n{_block(chr(10).join(code), 'python')}")
