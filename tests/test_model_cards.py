"""Model cards: the code runs as it stands and gives our figures; metadata and tables agree.

The code of a card runs in the folder of the model, without this repository, unless the model is an
adapter that only this repository can load."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from common.files import ROOT, write_records
from lm.policy import Policy
from lm.prompting import PLAIN_TEMPLATE
from lm.text_encoding import format_prompt
from reasoning.datasets.ranking import RankedResponse, write_answers
from reward_model.judges.hf import HFJudge
from reward_model.process_reward_model import ProcessRewardModel
from reward_model.response_reward_model import ResponseRewardModel
from tests.helpers.chat_models import CHATML, chat_model
from tests.helpers.reward_models import make_distilbert, make_prm
from tests.helpers.training import PROBLEMS, STEP_VALUES, flags, make_pairs, train_here
from trainer.model_card import QUESTION, STEPS, licence_of, reward_use

MINIATURES = sorted(path.parent.name for path in ROOT.glob("models/*-*/README.md"))
MINIATURES = [name for name in MINIATURES if not name.startswith("smollm2")]
FOLDERS = {name: ROOT / "models" / name for name in MINIATURES}


def code_of(card: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return code


def run_card(run_script, tmp_path: Path, model: Path, card: str | None = None) -> str:
    """What the code of a model's card prints."""
    script = tmp_path / "card.py"
    script.write_text(code_of(card or (model / "README.md").read_text("utf-8")), encoding="utf-8")
    done = run_script(script, cwd=model)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def ours(model: Path) -> str | list[float]:
    """What this repository says to the question and the steps of a card."""
    name, solution = str(model), (QUESTION, STEPS)
    pipeline = ModelCard.load(model / "README.md").data.pipeline_tag
    if model.name == "judge-mini":
        return HFJudge(name, device="cpu").score_steps([solution])[0]
    if pipeline == "token-classification":
        with ProcessRewardModel(name) as judge:
            return judge.score_steps([solution])[0]
    if pipeline == "text-classification":
        return [ResponseRewardModel(name, device="cpu").score_response(QUESTION, "\n".join(STEPS))]
    return Policy.load(name).texts([QUESTION])[0][0]


def check(printed: str, model: Path) -> None:
    expected = ours(model)
    if isinstance(expected, str):
        assert printed == expected
    else:
        numbers = [float(text) for text in re.findall(r"-?\d+\.\d{4,}(?:e-?\d+)?", printed)]
        assert numbers == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", MINIATURES)
def test_the_metadata_of_a_miniature_stand_in_its_table(name):
    card = ModelCard.load(FOLDERS[name] / "README.md")
    assert card.data.license == "mit" and card.data.model_name == name
    assert card.data.base_model in (None, *MINIATURES)
    rows = dict(re.findall(r"^\| (.+?) \| (-?[\d.]+)[ |]", card.text, re.MULTILINE))
    assert card.data.eval_results
    for result in card.data.eval_results:
        assert float(rows[result.metric_name]) == result.metric_value
    template, code = card.text.split("```text\n")[1].split("```")[0], code_of(card.text)
    assert template.startswith(PLAIN_TEMPLATE.rstrip("\n")) and json.dumps(PLAIN_TEMPLATE) in code
    assert len(code.splitlines()) <= 17  # the formatter breaks a line or two
    for title in ("Use", "Training", "Figures", "Licence"):
        assert f"\n## {title}\n\n" in card.text


@pytest.mark.process
@pytest.mark.parametrize("name", [n for n in MINIATURES if (FOLDERS[n] / "config.json").is_file()])
def test_the_code_of_a_miniature_runs_as_it_stands(run_script, tmp_path, name):
    check(run_card(run_script, tmp_path, FOLDERS[name]), FOLDERS[name])


ANSWERS = [
    RankedResponse(problem.prompt, text, rank, "rule:exact", split="train")
    for problem in PROBLEMS
    for rank, text in enumerate(("\n".join(problem.steps), "Step 1: 1 + 1 = 3"), 1)
]
SMALL = {"bf16": "false", "logs_dir": "logs", "logging_steps": 1, "warmup_steps": 0}
SMALL |= {"max_steps": 2, "save_strategy": "no", "learning_rate": 1e-2}
PPO = {"bf16": "false", "logs_dir": "logs", "judge_path": "prm", "max_new_tokens": 16}
PPO |= {"max_solution_steps": 2, "eval_limit": 1, "total_episodes": 8, "num_mini_batches": 2}
PPO |= {"eval_problems": "problems.jsonl", "per_device_train_batch_size": 4, "save_strategy": "no"}
ADAPTER = {"use_peft": "true", "lora_r": 2}
# command, model, data, more flags
TRAININGS = {
    "dpo": ("dpo", "plain", "pairs.jsonl", SMALL),
    "dpo adapter": ("dpo", "plain", "pairs.jsonl", SMALL | ADAPTER),
    "sft of a chat model": ("sft", "chat", "problems.jsonl", SMALL),
    "prm": ("prm", "plain", "values.jsonl", SMALL),
    "prm of a chat model": ("prm", "chat", "values.jsonl", SMALL | {"running_min": "true"}),
    "prm adapter": ("prm", "plain", "values.jsonl", SMALL | ADAPTER),
    "ppo": ("ppo", "plain", "values.jsonl", PPO),
    "reward": ("reward", "plain", "answers.csv", SMALL),
    "reward from a prm": ("reward", "prm", "answers.csv", SMALL),
    "reward of a chat model": ("reward", "chat", "answers.csv", SMALL),
    "reward adapter": ("reward", "plain", "answers.csv", SMALL | ADAPTER),
}


@pytest.mark.process
@pytest.mark.parametrize(
    "name",
    [name if name == "dpo" else pytest.param(name, marks=pytest.mark.slow) for name in TRAININGS],
)
def test_what_a_training_writes(run_script, tmp_path, tiny_model_dir, monkeypatch, name):
    """In a clone, for the adapters that need one."""
    command, model, data, more = TRAININGS[name]
    clone = tmp_path / "clone"
    clone.mkdir()
    for package in ("common", "lm", "reasoning", "reward_model"):
        (clone / package).symlink_to(ROOT / package)
    write_records(clone / "pairs.jsonl", make_pairs(24))
    write_records(clone / "values.jsonl", STEP_VALUES)
    write_records(clone / "problems.jsonl", PROBLEMS)
    write_answers(clone / "answers.csv", ANSWERS)
    make_prm(tiny_model_dir, clone / "prm")
    base = {"plain": tiny_model_dir, "prm": "prm"}.get(model)
    base = base or chat_model(tiny_model_dir, clone / "chat", CHATML)
    given = {"dataset_name": data, "model_name_or_path": base, "output_dir": "saved_model/out"}
    card = clone / Path(base, "README.md")
    if model != "plain":
        card.write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    train_here(clone, monkeypatch, command, *flags(**given, **more))

    folder = clone / "saved_model/out"
    check(run_card(run_script, tmp_path, folder), folder)
    text = (folder / "README.md").read_text("utf-8")
    assert str(tmp_path) not in text
    metadata = ModelCard(text).data
    assert metadata.base_model == Path(base).name
    assert metadata.license == (None if model == "plain" else "apache-2.0")
    assert metadata.library_name == ("peft" if "adapter" in name else "transformers")
    last = dict(re.findall(r"^\| (.+?) \| .* \| (\S+) \|$", text, re.MULTILINE))
    assert metadata.eval_results
    for result in metadata.eval_results:
        assert result.dataset_name == data and result.dataset_split == "train"
        assert float(last[result.metric_name]) == pytest.approx(result.metric_value, rel=1e-3)


@pytest.mark.process
def test_a_reward_model_that_reads_two_sentences(run_script, tmp_path):
    """With texts short enough for the tiny model."""
    folder = Path(make_distilbert(tmp_path / "bert"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    card = reward_use(model, tokenizer, is_adapter=False).text
    card = card.replace(repr(QUESTION), "'2+3=?'").replace(str(STEPS), "['2+3=5', '5']")
    printed = run_card(run_script, tmp_path, folder, card)
    scorer = ResponseRewardModel(str(folder), device="cpu")
    expected = scorer.score_response("2+3=?", "2+3=5\n5")
    assert float(printed.split()[-1]) == pytest.approx(expected, abs=1e-4)


def test_the_licence_of_a_base(tmp_path):
    """The card's own, or that of an adapter's base; None for a card that names none."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{base}"}}')
    assert licence_of(str(base)) is None and licence_of(str(adapter)) is None
    (base / "README.md").write_text("---\nlicense: [wrong\n---\n")
    assert licence_of(str(adapter)) is None
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert licence_of(str(base)) == licence_of(str(adapter)) == "apache-2.0"
    (adapter / "README.md").write_text("---\nlicense: mit\n---\n")
    assert licence_of(str(adapter)) == "mit"


class Hub(BaseHTTPRequestHandler):
    """A stand-in for the hub, which knows one model."""

    def do_GET(self) -> None:
        known = self.path.startswith("/api/models/me/base")
        data = json.dumps({"id": "me/base", "cardData": {"license": "llama3.2"}}).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


def test_the_licence_of_a_base_on_the_hub(monkeypatch):
    """None if the hub does not know the base, or cannot be reached."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # of the tests
        assert licence_of("me/base") == "llama3.2" and licence_of("me/other") is None
        server.shutdown()
    assert licence_of("me/base") is None


def test_a_chat_template_stands_in_the_card_as_text(tmp_path, tiny_model_dir):
    from trainer.model_card import policy_use

    folder = chat_model(tiny_model_dir, tmp_path / "chat", CHATML)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = policy_use(None, tokenizer, False).text
    written = format_prompt("{prompt}", tokenizer)
    assert f"```text\n{written.rstrip()}\n```" in text and repr(written) in text
    assert "add_special_tokens=False" in text
