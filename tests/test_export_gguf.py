"""utils/export_gguf.py: the file holds the same model and the same vocabulary."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from common.errors import ModelError, UserError
from lm.gguf_export import export_gguf
from lm.gguf_file import read_gguf
from tests.helpers.chat_models import CHATML, chat_model
from utils.import_gguf import import_gguf

TEXT = (
    "Problem: Mia has 12 apples. She buys 3 more. How many?\nSolution:\nStep 1: 12 + 3 = 15\nRight?"
)


@pytest.fixture(scope="module")
def parent(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


def logits_of(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer(TEXT, return_tensors="pt")).logits


@pytest.mark.parametrize(
    ("quantization", "tolerance"), [("F32", 1e-5), ("F16", 0.02), ("Q8_0", 0.5), ("Q4_0", 8)]
)
def test_transformers_reads_the_same_model_back(
    parent, tokenizer, tiny_model_dir, tmp_path, quantization, tolerance
):
    export_gguf(tiny_model_dir, tmp_path / "m.gguf", quantization)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    assert (logits_of(model, tokenizer) - logits_of(parent, tokenizer)).abs().max() < tolerance
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]  # the temporary file is gone


def test_metadata_and_vocabulary(tiny_gguf, tiny_model_dir, tokenizer):
    metadata = read_gguf(tiny_gguf).metadata
    ggml = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    assert metadata["general.name"] == "tiny-model"
    assert (metadata["llama.context_length"], metadata["llama.attention.head_count_kv"]) == (512, 2)
    assert ggml["tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert ggml["token_type"][:4] == [2, 3, 3, 6]  # unknown, control, control, byte
    assert (ggml["bos_token_id"], ggml["eos_token_id"]) == (1, 2)
    scores = dict(zip(ggml["tokens"], ggml["scores"], strict=True))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    made = list(dict.fromkeys("".join(merge) for merge in merges))
    assert [scores[piece] for piece in made] == [-float(rank) for rank in range(len(made))]


def test_tied_embeddings_chat_template_and_rows_that_do_not_fit_a_block(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3, hidden_size=48, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=3, num_key_value_heads=3, rope_theta=5000.0, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    (tmp_path / "tied" / "chat_template.jinja").write_text("<|user|>{{ messages }}")
    export_gguf(tmp_path / "tied", tmp_path / "m.gguf", "Q8_0")
    metadata = read_gguf(tmp_path / "m.gguf").metadata  # a missing output.weight would be refused
    assert metadata["tokenizer.chat_template"].startswith("<|user|>")
    # rows without a token are unused
    assert metadata["tokenizer.ggml.token_type"][-3:] == [5, 5, 5]
    assert metadata["llama.rope.freq_base"] == 5000
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    # 48 is no multiple of 32: mostly F16
    assert (logits_of(back, tokenizer) - logits_of(model, tokenizer)).abs().max() < 0.02


def test_several_chat_templates(tiny_model_dir, tmp_path):
    """They are in the file, and back in a directory that is made from it."""
    templates = {"default": CHATML, "tool_use": "{{ messages }} and tools"}
    chat_model(tiny_model_dir, tmp_path / "chat", templates)
    export_gguf(tmp_path / "chat", tmp_path / "m.gguf", "F32")
    file = read_gguf(tmp_path / "m.gguf")
    assert file.chat_templates == templates
    assert file.metadata["tokenizer.chat_template"] == CHATML
    import_gguf(tmp_path / "m.gguf", tmp_path / "back", "float32", "")
    back = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert back.chat_template == templates


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model_type": "qwen2"}, "'qwen2' model, expected the LLaMA"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "scaled rotary",
        ),
        ({"num_hidden_layers": 3}, "weights are missing"),
        ({"vocab_size": 300}, "no model can be loaded"),
    ],
)
def test_a_model_it_cannot_write_is_one_line(tiny_model_dir, tmp_path, change, expected):
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises((UserError, ModelError), match=expected):
        export_gguf(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_tokenizer_that_is_not_sentencepiece_is_one_line(tiny_model_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "\n": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("\n", behavior="isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    with pytest.raises(UserError, match="not SentencePiece-style"):
        export_gguf(folder, tmp_path / "m.gguf")


@pytest.mark.process
def test_the_script(run_script, tiny_model_dir, tmp_path):
    def export(model: object, output: Path):
        return run_script("utils/export_gguf.py", "--model_name_or_path", model, "--output", output)

    output = tmp_path / "out" / "m.gguf"
    result = export(tiny_model_dir, output)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(f"wrote {output}")
    before = output.read_bytes()
    result = export(tiny_model_dir, output)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "--overwrite" in result.stderr and output.read_bytes() == before
    result = export(tmp_path / "none", tmp_path / "x.gguf")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
