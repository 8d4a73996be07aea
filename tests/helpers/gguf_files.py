"""A GGUF file of another kind than LLaMA with SentencePiece: Qwen2 with a byte-level BPE."""

import json
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.helpers.chat_models import CHATML
from tests.helpers.reward_models import TINY_SHAPE

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = ["Step 1: 12 + 3 = 15\n", "Mia has 12 apples.", "Answer: Yes", "Answer: No", " Yes No"] * 3


def write_qwen2(path: Path, quantization: str = "F32") -> str:
    """Write a tiny Qwen2 with biases and random weights, ChatML's template and 400 tokens or so.

    Its embeddings are tied: there is no output.weight. Returns the path."""
    tokenizer = Tokenizer(models.BPE())
    # as pre-tokenizer "gpt-2" of llama.cpp
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    spec = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(spec["vocab"], key=spec["vocab"].__getitem__)
    torch.manual_seed(0)
    shape = TINY_SHAPE | {"intermediate_size": 64}  # whole blocks of 32 numbers
    config = Qwen2Config(**shape, vocab_size=len(tokens), tie_word_embeddings=True)
    weights = Qwen2ForCausalLM(config).state_dict()
    for name, weight in weights.items():
        if name.endswith(".bias"):
            weight.normal_(std=0.3)

    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL if t in CONTROL else gguf.TokenType.NORMAL for t in tokens]
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in spec["merges"]])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHATML.replace("{{ bos_token }}", ""))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, weight in weights.items():
        if name == "lm_head.weight":
            continue
        kind = gguf.GGMLQuantizationType["F32" if weight.ndim == 1 else quantization]
        data = gguf.quants.quantize(weight.float().numpy(), kind)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)
