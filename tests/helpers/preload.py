"""Imports of the libraries that take seconds, and of nothing of this project (see scripts.py)."""

import accelerate  # noqa: F401
import datasets  # noqa: F401
import matplotlib
import peft  # noqa: F401
import scipy.stats  # noqa: F401
import torch  # noqa: F401
from rich.table import Table  # noqa: F401
from transformers import (  # noqa: F401
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    Qwen2Model,
    Trainer,
)
from trl import DPOTrainer, ModelConfig, RewardTrainer, SFTTrainer, TrlParser  # noqa: F401

matplotlib.use("Agg")
import matplotlib.pyplot
