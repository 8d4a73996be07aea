"""Miniature PRMs and reward models with random weights, each a plain model directory."""

from pathlib import Path

# arguments of the config of a tiny model with LLaMA's argument names
TINY_SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
}  # fmt: skip


def make_llama(
    model_dir: str, folder: Path, question: str = "Right?", context: int | None = None
) -> str:
    """A reward model with a random head on the backbone of a causal LM."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from reward_model.response_reward_model import from_causal_lm

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = from_causal_lm(
        AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), tokenizer, question
    )
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.config.max_position_embeddings = context or model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_distilbert(folder: Path, head: bool = True) -> str:
    """DistilBERT with a vocabulary of characters and 64 positions.

    Without a head it is a model for masked words, the form in which DistilBERT is published."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        DistilBertConfig,
        DistilBertForMaskedLM,
        DistilBertForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.:=+-*/,?!"
    vocabulary = {
        token: k
        for k, token in enumerate([*special, *letters, *(f"##{letter}" for letter in letters)])
    }
    raw = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = ("pad", "unk", "cls", "sep", "mask")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        model_max_length=64,
        **{f"{name}_token": token for name, token in zip(names, special, strict=True)},
    )
    config = DistilBertConfig(
        vocab_size=len(vocabulary), dim=32, hidden_dim=64, n_layers=2, n_heads=2,
        max_position_embeddings=64, num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model_class = DistilBertForSequenceClassification if head else DistilBertForMaskedLM
    model_class(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_prm(model_dir: str | Path, folder: Path) -> str:
    """A PRM with a random head on the backbone of a causal LM."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from reward_model.process_reward_model import from_causal_lm

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prm = from_causal_lm(model, tokenizer)
    torch.manual_seed(1)
    head = prm.get_submodule("score" if hasattr(prm, "score") else "classifier")
    torch.nn.init.normal_(head.weight, std=0.3)
    prm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
