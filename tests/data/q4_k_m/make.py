"""How tiny.Q4_K_M.gguf was made. README.md beside this file has the commands.

python tests/data/q4_k_m/make.py parent PARENT.F32.gguf           # in this repository's environment
python tests/data/q4_k_m/make.py quantize PARENT.F32.gguf OUTPUT  # where llama-cpp-python is
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]


def write_parent(folder: str | Path) -> None:
    """Write the fp32 parent as a model directory, with the tokenizer beside this file.

    LLaMA, hidden 256 (K-quants need rows of 256 numbers), 2 layers, GQA 4/2. The weights come from
    numpy's RandomState(0), which gives the same numbers on every machine and in every version.
    Values and embeddings are large enough that scores differ from step to step."""
    import numpy as np
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(HERE)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        rms_norm_eps=1e-5, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    random = np.random.RandomState(0)
    scale = {"embed_tokens": 16.0, "v_proj": 2.0, "o_proj": 2.0}  # in units of 1 / sqrt(row)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim == 2:
                size = scale.get(name.split(".")[-2], 1.0) / weight.shape[1] ** 0.5
                weight.copy_(
                    torch.from_numpy(
                        random.standard_normal(weight.shape).astype(np.float32) * np.float32(size)
                    )
                )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def quantize(parent: str, output: str) -> None:
    """Write the Q4_K_M of a GGUF file with llama.cpp's own quantizer, on one thread."""
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, 1
    if llama_cpp.llama_model_quantize(parent.encode(), output.encode(), settings):
        raise SystemExit(f"{parent} could not be quantized")


if __name__ == "__main__":
    if sys.argv[1] == "parent":
        import tempfile

        sys.path.insert(0, str(ROOT))
        from lm.gguf_export import export_gguf

        with tempfile.TemporaryDirectory() as folder:
            write_parent(f"{folder}/tiny")  # the file's name for itself
            export_gguf(f"{folder}/tiny", sys.argv[2], "F32")
    else:
        quantize(sys.argv[2], sys.argv[3])
