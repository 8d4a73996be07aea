"""The scores of a judge from a plain forward pass of transformers."""

from typing import Any

import torch

from reward_model.templates import PLAIN, JudgeTemplate
from reward_model.tinyllama_reward_model import NO, YES


def step_scores(
    model: Any, tokenizer: Any, prompt: str, steps: list[str], template: JudgeTemplate = PLAIN
) -> list[float]:
    """P(yes) / (P(yes) + P(no)) after every step; every text is read as a whole."""
    vocabulary, scores = tokenizer.get_vocab(), []
    yes, no = (
        [vocabulary[p] for word in words for p in (word, "▁" + word) if p in vocabulary]
        for words in (YES, NO)
    )
    for k in range(1, len(steps) + 1):
        lines = "".join(step + "\n" for step in steps[:k])
        text = template.before.format(prompt=prompt) + lines + template.question
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        probability = logits.double().softmax(-1)
        p_yes, p_no = (probability[ids].sum().item() for ids in (yes, no))
        scores.append(p_yes / (p_yes + p_no))
    return scores
