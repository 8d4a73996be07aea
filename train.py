"""Training, every kind of it: python train.py [COMMAND] ...

python train.py                      stepwise DPO of models/policy-mini on data/rewarded.jsonl
python train.py dpo --help           all of its arguments
python train.py sft --help           the same for supervised training on solutions
"""

import os
import sys

from reasoning.records import ScoredPair
from utils.cli import UserError, at_root, parse_args, run
from utils.training import DataArgs, Training, read_dataset

HELP = """usage: python train.py [COMMAND] [ARGUMENTS]

commands:
  dpo    stepwise DPO on pairs whose steps a judge has scored (the default)
  sft    supervised training on step-by-step solutions, the loss on their steps alone

main arguments of dpo (all of them: python train.py dpo --help):
  --dataset_name FILE_OR_NAME    scored pairs: a JSONL file or a hub name      [data/rewarded.jsonl]
  --model_name_or_path MODEL     the policy to start from, and the reference   [models/policy-mini]
                                 (an adapter goes on with --use_peft, else it is merged into its base)
  --output_dir FOLDER            where the tuned model goes                    [saved_model/stepwise_dpo_tinyllama]
  --config FILE.yaml             arguments from a file; flags beat it
  --loss_type LOSS [LOSS ...]    stepwise, mixed with sigmoid or sft; or TRL's own
  --credit, --step_agg, --margin_gamma, --anchor_lambda, --beta    the stepwise loss (trainer/losses.py)
  --learning_rate, --num_train_epochs, --per_device_train_batch_size, --seed
  --use_peft                     train a LoRA adapter only
  --overwrite                    replace a finished model
  --resume_from_checkpoint true  go on from the last checkpoint

sft takes the same, without the losses:
  --dataset_name FILE_OR_NAME    problems with `steps`, or pairs (their `chosen`)    [data/rewarded.jsonl]
  --output_dir FOLDER            where the tuned model goes                    [saved_model/sft]
"""

DEFAULT_MODEL, DEFAULT_DATA = at_root("models/policy-mini"), at_root("data/rewarded.jsonl")
MAKES_DEFAULT_DATA = "python reward_model/evaluate_steps.py"
# the closing table of a training and its progress bar: name in the log -> in words
SHOWN_DPO = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "pairs told apart",
    "logps/chosen_vs_ref": "log-prob of chosen against reference",
    "logps/rejected_vs_ref": "log-prob of rejected against reference",
}
SHOWN_SFT = {"loss": "loss", "mean_token_accuracy": "tokens told right"}


def start(
    command: str, config_class: type, kinds: list[str], record: type, noun: str, argv: list[str], output_dir: str, description: str
) -> Training:
    """The training that the arguments ask for, on records of one class, made of these kinds of the loaders. Defaults are those of
    this repository and this machine."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)  # the libraries' notes to each other, before they are told off
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from trl import ModelConfig

    from search.policy import pick_device

    device, bf16 = pick_device()
    defaults = {"model_name_or_path": DEFAULT_MODEL, "output_dir": at_root(output_dir), "use_cpu": device == "cpu", "bf16": bf16}
    args, config, model_args = parse_args(
        *(DataArgs, config_class, ModelConfig), description=description, args=argv, defaults=defaults
    )
    rows = read_dataset(args, kinds, record, MAKES_DEFAULT_DATA if args.dataset_name == DEFAULT_DATA else None)
    return Training(command, args, config, model_args, rows, noun, DEFAULT_MODEL)


def peft_and_quantization(model_args) -> dict:
    from trl import get_peft_config, get_quantization_config

    return {"peft_config": get_peft_config(model_args), "quantization_config": get_quantization_config(model_args)}


def train_dpo(argv: list[str]) -> None:
    """Stepwise DPO, or any other loss of StepwiseDPOTrainer: scored pairs -> tuned policy."""
    from trainer.stepwise_dpo_trainer import StepwiseDPOConfig

    output_dir, description = "saved_model/stepwise_dpo_tinyllama", "Stepwise DPO on scored pairs."
    training = start("dpo", StepwiseDPOConfig, ["pairs"], ScoredPair, "pairs", argv, output_dir, description)
    from trainer.stepwise_dpo_trainer import StepwiseDPOTrainer

    config = training.config
    with_peft = peft_and_quantization(training.model_args)
    trainer = training.build(lambda **given: StepwiseDPOTrainer(**with_peft | given), needs_reference=True)
    loss = " + ".join(config.loss_type) + (f", credit {config.credit}" if config.has_step_loss else "")
    what = f"stepwise DPO ({loss}), steps scored by a judge, on"
    in_bar = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    training.run(trainer, what, "trl, dpo, stepwise-dpo, reasoning", SHOWN_DPO, in_bar)


def train_sft(argv: list[str]) -> None:
    """Supervised training: problems with solutions, or the chosen side of pairs -> a policy that writes such steps."""
    from trainer.sft_trainer import Solution, StepSFTConfig, StepSFTTrainer

    description = "Supervised training on step-by-step solutions."
    training = start("sft", StepSFTConfig, ["problems", "pairs"], Solution, "solutions", argv, "saved_model/sft", description)
    trainer = training.build(lambda **given: StepSFTTrainer(**peft_and_quantization(training.model_args) | given))
    in_bar = {"loss": "loss", "mean_token_accuracy": "tokens right"}
    training.run(trainer, "supervised training (SFT) on", "trl, sft, reasoning", SHOWN_SFT, in_bar)


COMMANDS = {"dpo": train_dpo, "sft": train_sft}


def main() -> None:
    argv = sys.argv[1:]
    if argv[:1] in (["-h"], ["--help"]):
        print(HELP, end="")
        return
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "dpo"
    if command not in COMMANDS:
        raise UserError(f"unknown command {command}: expected one of {', '.join(COMMANDS)} (see --help)")
    COMMANDS[command](argv)


if __name__ == "__main__":
    run(main)
