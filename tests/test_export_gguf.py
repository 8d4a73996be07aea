"""utils/export_gguf.py: the file holds the same model and the same vocabulary."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
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
from reward_model.judges.hf import HFJudge
from reward_model.judges.llamacpp import LlamaCppJudge
from tests.helpers.chat_models import CHATML, chat_model
from tests.helpers.families import make_family
from tests.test_gguf_judge import in_this_process
from tests.test_llamacpp_judge import SOLUTIONS, STRANGE, ids_of, largest_difference
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
        ({"model_type": "gemma"}, "'gemma' model, which this export does not write"),
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


@pytest.mark.process  # the llama.cpp judge has a process of its own
@pytest.mark.parametrize("family", ["smollm2", "qwen2", "qwen3", "llama3", "mistral"])
def test_families_are_read_back(tmp_path, family):
    """By transformers with equal ids and logits, by llama.cpp with equal ids and scores."""
    changes = {"sliding_window": None} if family == "mistral" else {}
    folder = make_family(family, tmp_path / "model", **changes)
    export_gguf(folder, tmp_path / "m.gguf", "F32")
    before = AutoTokenizer.from_pretrained(folder)
    after = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert before.chat_template == after.chat_template
    assert (before.eos_token, before.pad_token) == (after.eos_token, after.pad_token)
    text = f"{TEXT}\n\nIt's 1234 + (56) = I'D\t say  \n"
    assert before(text)["input_ids"] == after(text)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    assert (logits_of(model, before) - logits_of(back, before)).abs().max() < 1e-5
    assert back.config.tie_word_embeddings == (family in ("smollm2", "qwen2"))

    hf = HFJudge(folder, device="cpu")
    with LlamaCppJudge(tmp_path / "m.gguf", threads=1) as judge:
        assert judge.template_name == hf.template_name
        scores = judge.score_steps(SOLUTIONS)
        with in_this_process(judge) as native:
            # llama.cpp does not compose letters and accents, as Qwen's normalizer does
            for words in (
                "12345 It's I'D\n\nx",
                *(text for text in STRANGE if "\u0301" not in text),
            ):
                steps = [words, "Step 1: 12 + 3 = 15", words]
                assert ids_of(judge, native, words, steps) == hf._texts(words, steps, 2)[0], words
    assert largest_difference(scores, hf.score_steps(SOLUTIONS)) < 2e-3
    assert len({score for steps in scores for score in steps}) > 8


def test_an_adapter_is_merged(tmp_path):
    """The file holds the tuned model, not its base, and the adapter's chat template."""
    folder = make_family("smollm2", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    before = logits_of(base, tokenizer)
    torch.manual_seed(1)
    lora = get_peft_model(base, LoraConfig(r=2, init_lora_weights=False)).eval()
    tuned = logits_of(lora, tokenizer)
    lora.save_pretrained(tmp_path / "adapter")
    export_gguf(tmp_path / "adapter", tmp_path / "m.gguf", "F32")
    back = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf"), tokenizer)
    assert (back - tuned).abs().max() < 1e-4 < (before - tuned).abs().max()
    assert read_gguf(tmp_path / "m.gguf", any_kind=True).chat_templates["default"]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gemma3", "'gemma3_text' model, which this export does not write"),
        ("phi3", "'phi3' model, which"),
        ("gpt2", "'gpt2' model, which"),
        ("mistral", "a sliding window, which this export does not write"),
    ],
)
def test_a_family_it_cannot_write_is_one_line(tmp_path, family, expected):
    folder = make_family(family, tmp_path / "model")
    with pytest.raises(UserError, match=expected):
        export_gguf(folder, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_a_tokenizer_that_llamacpp_would_read_otherwise_is_one_line(tiny_model_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "\n": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("\n", behavior="isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder)
    with pytest.raises(UserError, match=r"a tokenizer that llama\.cpp would not read as it is"):
        export_gguf(folder, tmp_path / "m.gguf")


def test_a_byte_level_tokenizer_with_other_words_is_one_line(tmp_path):
    folder = make_family("smollm2", tmp_path / "model")
    spec = json.loads((tmp_path / "model/tokenizer.json").read_text())
    spec["pre_tokenizer"]["pretokenizers"][0] = {
        "type": "Split", "pattern": {"Regex": "[0-9]{2}"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(UserError, match="byte-level BPE with the words of gpt-2, smollm, qwen2"):
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
