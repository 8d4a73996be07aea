"""Write a LLaMA model as a GGUF file, which llama.cpp and the GGUF judge read."""

import json
import math
from pathlib import Path

from common.errors import UserError, first_line
from common.files import replacing
from lm.loading import base_of, load_model, merge_adapter

# -> gguf's file types
QUANTIZATIONS = {
    "F32": "ALL_F32",
    "F16": "MOSTLY_F16",
    "Q8_0": "MOSTLY_Q8_0",
    "Q4_0": "MOSTLY_Q4_0",
}


def export_gguf(model_dir: str | Path, output: str | Path, quantization: str = "Q8_0") -> None:
    """Write `model_dir` to the GGUF file `output`, whole or not at all.

    Matrices get the quantization ("F32", "F16", "Q8_0" or "Q4_0"), or F16 where a row is no multiple of 32 numbers; norms stay F32,
    which llama.cpp asks for. One matrix at a time is converted and written: the memory needed is the model's, as it is stored.
    Raises UserError or RecordError if the model is no LLaMA or its tokenizer is not SentencePiece-style."""
    import gguf
    import numpy as np
    from tqdm import tqdm

    model, tokenizer = _load(str(model_dir))
    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_name(Path(model_dir).resolve().name)
    writer.add_file_type(gguf.LlamaFileType[QUANTIZATIONS[quantization]])
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

    # tied embeddings: llama.cpp wants both
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    kinds = {}
    for name, weight in weights.items():
        kind = "F32" if weight.ndim == 1 else quantization
        if kind.startswith("Q") and weight.shape[-1] % 32:
            kind = "F16"
        kinds[name] = kind = gguf.GGMLQuantizationType[kind]
        size = math.prod(gguf.quants.quant_shape_to_byte_shape(tuple(weight.shape), kind))
        writer.add_tensor_info(
            names.get_name(name, (".weight",)), weight.shape, np.float32, size, raw_dtype=kind
        )

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
            writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(array), kinds[name]))
        writer.close()


def _load(model_dir: str):
    """(model, tokenizer), checked to be a LLaMA that the GGUF keys can describe; an adapter is merged, in float32."""
    from transformers import AutoConfig

    try:
        base, is_adapter = base_of(model_dir)
        config = AutoConfig.from_pretrained(base)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{model_dir} cannot be loaded: {first_line(error)}") from None
    if config.model_type != "llama":
        raise UserError(
            f"{model_dir} is a '{config.model_type}' model, expected the LLaMA architecture"
        )
    unsupported = {
        "scaled rotary positions": config.rope_parameters.get("rope_type", "default") != "default",
        "biases": config.attention_bias or config.mlp_bias,
        f"activation '{config.hidden_act}'": config.hidden_act != "silu",
        "heads of a size that is not hidden / heads": config.head_dim
        != config.hidden_size // config.num_attention_heads,
    }
    for what, present in unsupported.items():
        if present:
            raise UserError(f"{model_dir} has {what}, which this export does not write")
    model, tokenizer = load_model(model_dir, "float32" if is_adapter else "auto")
    return merge_adapter(model), tokenizer


def _permute(weight, heads: int):
    """Q and K rows in the order of llama.cpp's rotary embedding: pairs of neighbours instead of two halves.  (heads * d, in)"""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _add_vocabulary(writer, model_dir: str | Path, tokenizer, size: int) -> None:
    """Tokens, scores and types. llama.cpp joins the two neighbours whose joined text scores highest, so a token's score is minus
    the rank of the first merge that makes it. Rows of the embedding without a token become unused `[PAD<id>]`."""
    from gguf import TokenType

    spec = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {}}
    vocab = tokenizer.get_vocab()
    byte_tokens = {f"<0x{byte:02X}>" for byte in range(256)}
    begins = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[
        :1
    ]
    if not (
        spec["model"].get("byte_fallback")
        and byte_tokens <= vocab.keys()
        and begins
        and begins[0].startswith("▁")
    ):
        raise UserError(
            f"{model_dir} has a tokenizer that is not SentencePiece-style: expected BPE with byte fallback, 256 byte tokens and a "
            "space put in front"
        )
    if max(vocab.values()) >= size:
        raise UserError(
            f"{model_dir} has {max(vocab.values()) + 1} tokens, but embeddings for {size}"
        )

    ranks: dict[str, int] = {}
    for merge in spec["model"]["merges"]:
        ranks.setdefault("".join(merge), len(ranks))
    added = {token["content"]: token["special"] for token in spec["added_tokens"]}
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    for token, index in vocab.items():
        tokens[index] = token
        if token == tokenizer.unk_token:
            types[index] = TokenType.UNKNOWN
        elif token in byte_tokens:
            types[index] = TokenType.BYTE
        elif token in added:
            types[index] = TokenType.CONTROL if added[token] else TokenType.USER_DEFINED
        else:
            types[index] = TokenType.NORMAL

    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(ranks.get(token, len(ranks))) for token in tokens])
    writer.add_token_types(types)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
