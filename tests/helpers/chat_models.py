"""Tiny chat models with random weights."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

HEAD = "<|im_start|>assistant\n"
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}" + HEAD + "{% endif %}"
)
# as Qwen3: it thinks unless that is turned off
THINKING = CHATML.replace(
    HEAD,
    HEAD + "{% if enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}",
)


def chat_model(model_dir: str, folder: Path, template: Any, says: str = "", after: str = "") -> str:
    """Write the tiny model with ChatML's control tokens and a chat template.

    says: a token that is the likeliest one after a text that ends with `after`."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    # as in the tokenizers of such models: tokens that are not special, and found in any text
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in ("<think>", "</think>")])
    tokenizer.chat_template = template
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.resize_token_embeddings(len(tokenizer))
    if says:
        ids = tokenizer(after, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            hidden = model.base_model(ids).last_hidden_state[0, -1]
        index = tokenizer.convert_tokens_to_ids(says)
        model.lm_head.weight.data[index] = 100 * hidden
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
