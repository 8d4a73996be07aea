"""A script: two updates of step PPO on a toy problem, in one process or in several.

python tests/helpers/train_step_ppo.py MODEL OUTPUT BATCH_SIZE ACCUMULATION
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.judges import FixedJudge
from trainer.ppo.config import StepPPOConfig
from trainer.ppo.trainer import StepPPOTrainer

# AdamW would make full-length steps of rounding errors
torch.optim.AdamW = lambda groups, **_: torch.optim.SGD(groups)
model, output, batch_size, accumulation = sys.argv[1:]
args = StepPPOConfig(
    output,
    states="both",
    total_episodes=16,
    per_device_train_batch_size=int(batch_size),
    gradient_accumulation_steps=int(accumulation),
    num_mini_batches=2,
    learning_rate=1e-2,
    max_grad_norm=0.5,
    target_kl=None,
    max_new_tokens=8,
    max_solution_steps=2,
    eval_strategy="no",
    use_cpu=True,
    disable_tqdm=True,
)
trainer = StepPPOTrainer(
    AutoModelForCausalLM.from_pretrained(model),
    args,
    AutoTokenizer.from_pretrained(model),
    FixedJudge(lambda prompt, step, earlier: float(step == "Answer: 1")),
    [{"prompt": f"Pick one, number {k}.", "prefix": []} for k in range(6)],
)
trainer.train()
if trainer.is_world_process_zero():
    weights = {name: p.detach().clone() for name, p in trainer.module.named_parameters()}
    save_file(weights, f"{output}.safetensors")
