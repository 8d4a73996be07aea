"""A tokenizer that does not fit its model, or lacks what training and sampling need."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, normalizers, processors
from transformers import AutoConfig, AutoTokenizer

from common.errors import ModelError
from common.files import write_records
from lm.loading import load_model
from lm.policy import Policy
from lm.text_encoding import encode_prompt, encode_steps
from tests.helpers.scripts import run_script
from tests.helpers.training import make_pairs

PAIRS = make_pairs(8)
EOS = 2


@pytest.fixture
def model_dir(tiny_model_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def change(file: Path, **values) -> None:
    """Set keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without_eos(folder: Path, also_in_the_model: bool = False) -> Path:
    change(folder / "tokenizer_config.json", eos_token=None)
    if also_in_the_model:
        change(folder / "generation_config.json", eos_token_id=None)
        change(folder / "config.json", eos_token_id=None)
    return folder


def appending_eos(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", EOS)]
    )
    tokenizer.save_pretrained(folder)
    return folder


def change_tokens(folder: Path, change) -> None:
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    change(tokenizer)
    tokenizer.save(str(file))


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_a_missing_eos_is_taken_from_the_model(model_dir, file):
    other = {"generation_config.json": "config.json"}.get(file, "generation_config.json")
    change(without_eos(model_dir) / file, eos_token_id=[EOS, 3])
    change(model_dir / other, eos_token_id=None)
    _, tokenizer = load_model(str(model_dir), "float32")
    assert tokenizer.eos_token == "</s>"
    assert encode_steps(tokenizer, "2 + 2?", [], ["Answer: 4"])[0][-1] == EOS


def test_without_any_eos_a_policy_is_refused(model_dir):
    without_eos(model_dir, also_in_the_model=True)
    load_model(str(model_dir), "float32")  # a judge needs no EOS
    with pytest.raises(ModelError, match=r"neither its tokenizer nor .* names an end-of-text"):
        Policy.load(str(model_dir))


def test_an_eos_that_the_tokenizer_appends_is_not_used(model_dir, tiny_model_dir):
    changed, plain = Policy.load(str(appending_eos(model_dir))), Policy.load(tiny_model_dir)
    prompts = ["2 + 2?", "Mia has 2 apples."]
    assert EOS in changed.tokenizer(prompts[0])["input_ids"]
    assert EOS not in encode_prompt(changed.tokenizer, prompts[0])
    assert changed.generate(prompts, 2, 1.0) == plain.generate(prompts, 2, 1.0)


def test_tokens_without_an_embedding(model_dir, capsys):
    rows = AutoConfig.from_pretrained(model_dir).vocab_size
    change_tokens(model_dir, lambda tokenizer: tokenizer.add_special_tokens(["<pad>"]))
    change(model_dir / "tokenizer_config.json", pad_token="<pad>")
    assert AutoTokenizer.from_pretrained(model_dir).pad_token_id == rows
    _, tokenizer = load_model(str(model_dir), "float32")
    assert tokenizer.pad_token_id == EOS
    change_tokens(model_dir, lambda tokenizer: tokenizer.add_tokens(["apples"]))
    with pytest.raises(ModelError, match=rf"id of its token 'apples' is {rows + 1}, but .* {rows}"):
        load_model(str(model_dir), "float32")
    assert "warning" not in capsys.readouterr().err


def test_a_tokenizer_that_drops_line_breaks(model_dir):
    one_line = normalizers.Replace("\n", " ")
    change_tokens(model_dir, lambda tokenizer: setattr(tokenizer, "normalizer", one_line))
    with pytest.raises(ModelError, match="drops line breaks"):
        load_model(str(model_dir), "float32")


@pytest.mark.process
@pytest.mark.parametrize("command", ["dpo", "sft"])
def test_training_takes_the_eos_of_the_model_or_says_what_is_missing(command, model_dir, tmp_path):
    """And it writes the same model, whatever the tokenizer appends."""
    write_records(tmp_path / "pairs.jsonl", PAIRS)

    def train(model: Path):
        return run_script(
            "train.py", command, "--model_name_or_path", model, "--dataset_name", "pairs.jsonl",
            "--output_dir", f"out_{model.name}", "--max_steps", 1, "--logs_dir", "logs",
            "--bf16", "false", cwd=tmp_path,
        )  # fmt: skip

    plain, appends, endless, no_eos = (
        Path(shutil.copytree(model_dir, tmp_path / name))
        for name in ("plain", "appends", "endless", "no_eos")
    )
    appending_eos(appends)
    without_eos(no_eos)
    without_eos(endless, also_in_the_model=True)
    for model in (plain, appends, no_eos):
        done = train(model)
        assert done.returncode == 0, done.stderr
    weights = {
        (tmp_path / f"out_{model.name}" / "model.safetensors").read_bytes()
        for model in (plain, appends, no_eos)
    }
    assert len(weights) == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out_no_eos").eos_token == "</s>"
    done = train(endless)
    assert done.returncode == 2 and "no end-of-text token" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out_endless" / "config.json").exists()
