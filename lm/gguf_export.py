"""Write a model as a GGUF file, which llama.cpp and the judges of GGUF files read.

A file names its architecture, and how its tokenizer splits a text before it merges bytes
(`tokenizer.ggml.pre`): llama.cpp has both in its code, so a model of another kind is refused.
"""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Regex, pre_tokenizers
from transformers import AutoConfig
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from common.errors import UserError, first_line
from common.outputs import replacing
from common.progress import Bar
from lm.loading import base_of, load_model, merge_adapter

# model type -> its name in llama.cpp, which rotates pairs of neighbours in a `llama` alone
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
_DIGITS = pre_tokenizers.Digits(individual_digits=True)
# name in llama.cpp -> how a byte-level tokenizer splits a text
PRE_TOKENIZERS = {"gpt-2": _WORDS, "smollm": pre_tokenizers.Sequence([_DIGITS, _WORDS])} | {
    name: pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated"), _BYTES]
    )
    for name in ("qwen2", "llama-bpe", "tekken", "gpt-4o")
}
# these split it in different ways
_PROBE = (
    "It's 12345 + 1 = 12346, I'D say (aB-cDE) 3.5\u00d7\u4e1c\u00e9e\u0301!!\r\n\n  x\t y  \n /n\n"
)


def export_gguf(model_dir: str | Path, output: str | Path, quantization: str = "Q8_0") -> None:
    """Write a model, or an adapter merged into its base, to the GGUF file `output`.

    Matrices get the quantization ("F32", "F16", "Q8_0" or "Q4_0"), or F16 where a row is no
    multiple of 32 numbers; norms and biases stay F32, which llama.cpp needs. Matrices are converted
    and written one at a time, so the memory needed is that of the stored model. The file is written
    whole or not at all. Raises UserError or ModelError if the model is of no kind in ARCHITECTURES
    or its tokenizer is neither SentencePiece-style nor one of PRE_TOKENIZERS."""
    model, tokenizer = _load(str(model_dir))
    config, weights = model.config, model.state_dict()
    kind = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(None, kind)
    writer.add_name(Path(model_dir).resolve().name)
    file_type = ("ALL_" if quantization == "F32" else "MOSTLY_") + quantization
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_size(config))
    if kind == "qwen3":
        writer.add_key_length(_head_size(config))
        writer.add_value_length(_head_size(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    is_byte_level = _add_vocabulary(writer, model_dir, tokenizer, config.vocab_size)

    if not is_byte_level:  # ctransformers, which reads no other tokenizers, needs both embeddings
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    elif config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    types = {}
    for name, weight in weights.items():
        stored = "F32" if weight.ndim == 1 else quantization
        if stored.startswith("Q") and weight.shape[-1] % 32:
            stored = "F16"
        types[name] = gguf.GGMLQuantizationType[stored]
        shape = gguf.quants.quant_shape_to_byte_shape(tuple(weight.shape), types[name])
        gguf_name = names.get_name(name, (".weight", ".bias"))
        size = math.prod(shape)
        writer.add_tensor_info(gguf_name, weight.shape, np.float32, size, raw_dtype=types[name])

    with replacing(output) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in Bar(weights.items(), desc="writing", unit="tensor"):
            array = weight.float().numpy()
            if kind == "llama" and "q_proj" in name:
                array = _permute(array, config.num_attention_heads)
            elif kind == "llama" and "k_proj" in name:
                array = _permute(array, config.num_key_value_heads)
            writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(array), types[name]))
        writer.close()


def _load(model_dir: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a kind that the GGUF keys describe; an adapter is merged."""
    try:
        base, is_adapter = base_of(model_dir)
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{model_dir} cannot be loaded: {first_line(error)}") from None
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"{model_dir} is a '{config.model_type}' model, which this export does not write "
            f"(it writes {', '.join(ARCHITECTURES)}); llama.cpp's convert_hf_to_gguf.py knows more"
        )
    head_size = config.hidden_size // config.num_attention_heads
    rope_type = config.rope_parameters.get("rope_type", "default")
    has_window = config.sliding_window if config.model_type == "mistral" else False
    unsupported = {
        "scaled rotary positions": rope_type != "default",
        "biases": getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False),
        f"activation '{config.hidden_act}'": config.hidden_act != "silu",
        "heads of a size other than hidden size / heads": config.model_type != "qwen3"
        and _head_size(config) != head_size,
        "a sliding window": has_window or getattr(config, "use_sliding_window", False),
    }
    for feature, present in unsupported.items():
        if present:
            raise UserError(f"{model_dir} has {feature}, which this export does not write")
    model, tokenizer = load_model(model_dir, "float32" if is_adapter else "auto")
    return merge_adapter(model), tokenizer


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _permute(weight: Any, heads: int) -> Any:
    """Q or K rows (heads * d, in) in the order of llama.cpp's rotary embedding.

    It rotates pairs of neighbours; transformers rotates row i with row i + d / 2 of a head."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def pre_tokenizer_of(tokenizer: Any) -> str | None:
    """llama.cpp's name for how a byte-level BPE tokenizer splits a text; None if it has none."""
    splits = tokenizer.backend_tokenizer.pre_tokenizer
    if splits is None:
        return None
    pieces = splits.pre_tokenize_str(_PROBE)
    same = (name for name, pre in PRE_TOKENIZERS.items() if pre.pre_tokenize_str(_PROBE) == pieces)
    return next(same, None)


def _add_vocabulary(writer: Any, model_dir: str | Path, tokenizer: Any, size: int) -> bool:
    """Add the tokens, their types, and what says how to join them; True for a byte-level tokenizer.

    size: the rows of the embedding; those without a token become unused tokens `[PAD<id>]`.
    A byte-level file lists the merges. In a SentencePiece-style one llama.cpp joins the two
    neighbours whose joined text has the highest score, so the score of a token is minus the rank of
    the first merge that makes it."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {}}
    vocab = tokenizer.get_vocab()
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)}
    is_bpe = spec["model"].get("type") == "BPE" and not any(
        spec["model"].get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix")
    )
    pre = pre_tokenizer_of(tokenizer) if is_bpe else None
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    puts_space = "".join(tokenizer.convert_ids_to_tokens(ids[:1])).startswith("▁")
    has_bytes = spec["model"].get("byte_fallback") and byte_tokens <= vocab.keys()
    if pre is None and not (is_bpe and has_bytes and puts_space):
        raise UserError(
            f"{model_dir} has a tokenizer that llama.cpp would not read as it is: expected "
            f"byte-level BPE with the words of {', '.join(PRE_TOKENIZERS)}, or SentencePiece-style "
            "BPE with byte fallback, 256 byte tokens and a space put in front"
        )
    count = max(vocab.values()) + 1
    if count > size:
        raise UserError(f"{model_dir} has {count} tokens, but embeddings for {size}")

    added = {token["content"]: token["special"] for token in spec["added_tokens"]}
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, index in vocab.items():
        tokens[index] = token
        if pre is None and token == tokenizer.unk_token:
            types[index] = gguf.TokenType.UNKNOWN
        elif pre is None and token in byte_tokens:
            types[index] = gguf.TokenType.BYTE
        elif token in added:
            kinds = gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL
            types[index] = kinds[added[token]]
        else:
            types[index] = gguf.TokenType.NORMAL

    writer.add_tokenizer_model("llama" if pre is None else "gpt2")
    writer.add_token_list(tokens)
    if pre is None:
        ranks: dict[str, int] = {}
        for merge in spec["model"]["merges"]:
            ranks.setdefault("".join(merge), len(ranks))
        writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
    else:
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges([" ".join(merge) for merge in spec["model"]["merges"]])
        writer.add_add_space_prefix(False)
    writer.add_token_types(types)
    first, bos = tokenizer("a")["input_ids"][0], tokenizer.bos_token_id
    writer.add_add_bos_token(bos is not None and first == bos)
    for add, index in {
        writer.add_bos_token_id: bos,
        writer.add_eos_token_id: tokenizer.eos_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }.items():
        if index is not None:
            add(index)
    templates = tokenizer.chat_template
    if isinstance(templates, dict):  # several, by name
        named = [{"name": name, "template": text} for name, text in templates.items()]
        writer.add_chat_template(named)
    elif templates:
        writer.add_chat_template(templates)
    return pre is not None
