"""Write a LLaMA model as a GGUF file, which llama.cpp and the GGUF judge read."""

import json
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tqdm import tqdm
from transformers import AutoConfig

from common.errors import UserError, first_line
from common.files import replacing
from lm.loading import base_of, load_model, merge_adapter


def export_gguf(model_dir: str | Path, output: str | Path, quantization: str = "Q8_0") -> None:
    """Write a model, or an adapter merged into its base, to the GGUF file `output`.

    Matrices get the quantization ("F32", "F16", "Q8_0" or "Q4_0"), or F16 where a row is no
    multiple of 32 numbers; norms stay F32, which llama.cpp needs. Matrices are converted and
    written one at a time, so the memory needed is that of the stored model. The file is written
    whole or not at all. Raises UserError or ModelError if the model is no LLaMA or its tokenizer is
    not SentencePiece-style."""
    model, tokenizer = _load(str(model_dir))
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(None, "llama")
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
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _add_vocabulary(writer, model_dir, tokenizer, config.vocab_size)

    # llama.cpp needs both of two tied embeddings
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    types = {}
    for name, weight in weights.items():
        kind = "F32" if weight.ndim == 1 else quantization
        if kind.startswith("Q") and weight.shape[-1] % 32:
            kind = "F16"
        types[name] = gguf.GGMLQuantizationType[kind]
        shape = gguf.quants.quant_shape_to_byte_shape(tuple(weight.shape), types[name])
        gguf_name = names.get_name(name, (".weight",))
        size = math.prod(shape)
        writer.add_tensor_info(gguf_name, weight.shape, np.float32, size, raw_dtype=types[name])

    with replacing(output) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, weight in tqdm(weights.items(), desc="writing", unit="tensor"):
            array = weight.float().numpy()
            if "q_proj" in name:
                array = _permute(array, config.num_attention_heads)
            elif "k_proj" in name:
                array = _permute(array, config.num_key_value_heads)
            writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(array), types[name]))
        writer.close()


def _load(model_dir: str) -> tuple[Any, Any]:
    """(model, tokenizer) of a LLaMA that the GGUF keys describe; an adapter is merged."""
    try:
        base, is_adapter = base_of(model_dir)
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{model_dir} cannot be loaded: {first_line(error)}") from None
    if config.model_type != "llama":
        raise UserError(
            f"{model_dir} is a '{config.model_type}' model, expected the LLaMA architecture"
        )
    head_size = config.hidden_size // config.num_attention_heads
    rope_type = config.rope_parameters.get("rope_type", "default")
    unsupported = {
        "scaled rotary positions": rope_type != "default",
        "biases": config.attention_bias or config.mlp_bias,
        f"activation '{config.hidden_act}'": config.hidden_act != "silu",
        "heads of a size other than hidden size / heads": config.head_dim != head_size,
    }
    for feature, present in unsupported.items():
        if present:
            raise UserError(f"{model_dir} has {feature}, which this export does not write")
    model, tokenizer = load_model(model_dir, "float32" if is_adapter else "auto")
    return merge_adapter(model), tokenizer


def _permute(weight: Any, heads: int) -> Any:
    """Q or K rows (heads * d, in) in the order of llama.cpp's rotary embedding.

    It rotates pairs of neighbours; transformers rotates row i with row i + d / 2 of a head."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _add_vocabulary(writer: Any, model_dir: str | Path, tokenizer: Any, size: int) -> None:
    """Add the tokens, their scores and their types.

    size: the rows of the embedding; those without a token become unused tokens `[PAD<id>]`.
    llama.cpp joins the two neighbours whose joined text has the highest score, so the score of a
    token is minus the rank of the first merge that makes it."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {}}
    vocab = tokenizer.get_vocab()
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)}
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    puts_space = "".join(tokenizer.convert_ids_to_tokens(ids[:1])).startswith("▁")
    if not (spec["model"].get("byte_fallback") and byte_tokens <= vocab.keys() and puts_space):
        raise UserError(
            f"{model_dir} has a tokenizer that is not SentencePiece-style: expected BPE with byte "
            "fallback, 256 byte tokens and a space put in front"
        )
    count = max(vocab.values()) + 1
    if count > size:
        raise UserError(f"{model_dir} has {count} tokens, but embeddings for {size}")

    ranks: dict[str, int] = {}
    for merge in spec["model"]["merges"]:
        ranks.setdefault("".join(merge), len(ranks))
    added = {token["content"]: token["special"] for token in spec["added_tokens"]}
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for token, index in vocab.items():
        tokens[index] = token
        if token == tokenizer.unk_token:
            types[index] = gguf.TokenType.UNKNOWN
        elif token in byte_tokens:
            types[index] = gguf.TokenType.BYTE
        elif token in added:
            kinds = gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL
            types[index] = kinds[added[token]]
        else:
            types[index] = gguf.TokenType.NORMAL

    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
    writer.add_token_types(types)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    templates = tokenizer.chat_template
    if isinstance(templates, dict):  # several, by name
        named = [{"name": name, "template": text} for name, text in templates.items()]
        writer.add_chat_template(named)
    elif templates:
        writer.add_chat_template(templates)
