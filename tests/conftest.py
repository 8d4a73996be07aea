"""Shared fixtures, made once: the tokenizer of the miniatures, a tiny LLaMA of random weights."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# tiny models: a second thread only waits for the first
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.helpers import properties, scripts  # noqa: F401 (the profiles of the property tests)


@pytest.fixture(autouse=True)
def no_training_variables_stay():
    """transformers tells accelerate of FSDP and DeepSpeed through variables; the next test must not
    inherit them."""
    yield
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_USE_", "FSDP_")):
            del os.environ[name]


@pytest.fixture(scope="session")
def tokenizer():
    from lm.miniature_tokenizer import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tokenizer, tmp_path_factory) -> str:
    """A model directory: LLaMA, hidden 64, 2 layers, GQA 4/2, random weights (seed 0), fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny") / "tiny-model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_gguf(tiny_model_dir, tmp_path_factory) -> str:
    """The tiny model as a GGUF file in F32."""
    from lm.gguf_export import export_gguf

    path = tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf"
    export_gguf(tiny_model_dir, path, "F32")
    return str(path)


@pytest.fixture
def run_script(tmp_path):
    """Run a script by its path, from an empty folder (tests/helpers/scripts.py)."""
    return partial(scripts.run_script, cwd=tmp_path)


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The directory of SmolLM2, made by `make smollm2` if it is not there.

    The test is skipped if it cannot be made."""
    folder = ROOT / "models/smollm2-135m-instruct"
    if not (folder / "config.json").is_file():
        command = ["make", "-o", ".venv/.installed", f"BIN={sys.executable}", "smollm2"]
        made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(made.stderr.splitlines()[0])
    return str(folder)
