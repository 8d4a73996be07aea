"""Training, every kind of it: python train.py [COMMAND] ...

python train.py                      stepwise DPO of models/policy-mini on data/rewarded.jsonl
python train.py dpo --help           all of its arguments
python train.py sft --help           the same for supervised training on solutions
python train.py prm --help           the same for a process reward model
python train.py ppo --help           the same for step PPO
python train.py reward --help        the same for a reward model of whole responses
"""

import os
import sys

from reasoning.records import RecordError, ScoredPair
from utils.cli import UserError, at_root, check_input, check_model, parse_args, refuse_held_out, run
from utils.training import DataArgs, Training, read_dataset

HELP = """usage: python train.py [COMMAND] [ARGUMENTS]

commands:
  dpo    stepwise DPO on pairs whose steps a judge has scored (the default)
  sft    supervised training on step-by-step solutions, the loss on their steps alone
  prm    a process reward model: what every step of a solution is worth, 0 to 1
  ppo    step PPO: the policy writes steps, a judge's score of each is its reward
  reward a response reward model: which of several answers is the better one

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

prm takes the same:
  --dataset_name FILE_OR_NAME    values or labels of steps                     [data/mcts_steps.jsonl]
  --model_name_or_path MODEL     its backbone: a causal LM, or a PRM that goes on
  --output_dir FOLDER            where the PRM goes                            [saved_model/prm]
  --hard_labels THRESHOLD        1 from this label on, 0 below it; labels stay soft without

ppo has arguments of its own:
  --dataset_name FILE_OR_NAME    beginnings of solutions: values of steps, or problems    [data/mcts_steps.jsonl]
  --states rows|fresh|both       go on from those beginnings, from the policy's own, or from both
  --judge NAME                   who rewards the steps: prm, gguf, hf ...         [prm: models/prm-mini]
  --output_dir FOLDER            where the tuned policy goes                   [saved_model/step_ppo]
  --total_episodes, --learning_rate, --kl_coef, --cliprange, --num_ppo_epochs, --num_mini_batches

reward takes the same as prm, but for:
  --dataset_name FILE_OR_NAME    ranked answers (CSV; its rows of the split train), or pairs: prompt, chosen, rejected
                                                                               [data/answers.csv]
  --model_name_or_path MODEL     its backbone: a causal LM, an encoder, or a reward model that goes on    [models/prm-mini]
  --output_dir FOLDER            where the reward model goes                   [saved_model/response_reward_model]
  --rank_margin, --center_rewards_coefficient    of the loss (trainer/reward_trainer.py)
  --shuffle_ranks true           the control, which has to learn nothing
"""

DEFAULT_MODEL, PRM_MINI = at_root("models/policy-mini"), at_root("models/prm-mini")
PAIRS, STEP_VALUES, ANSWERS = (
    at_root(f"data/{name}") for name in ("rewarded.jsonl", "mcts_steps.jsonl", "answers.csv")
)
MADE_BY = {
    PAIRS: "python reward_model/evaluate_steps.py",
    STEP_VALUES: "python utils/build_mcts_dataset.py",
    ANSWERS: "python utils/build_ranked_responses.py --rank_by exact",
}
# the closing table of a training and its progress bar: name in the log -> in words
SHOWN_DPO = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "pairs told apart",
    "logps/chosen_vs_ref": "log-prob of chosen against reference",
    "logps/rejected_vs_ref": "log-prob of rejected against reference",
}
SHOWN_SFT = {"loss": "loss", "mean_token_accuracy": "tokens told right"}
SHOWN_PRM = {
    "loss": "loss",
    "accuracy": "steps on the right side of .5",
    "values/good": "mean value of steps labelled .5 and more",
    "values/bad": "mean value of the others",
}
SHOWN_REWARD = {
    "loss": "loss",
    "accuracy": "pairs told apart",
    "margin": "reward of the better minus the worse",
    "mean_reward": "mean reward",
}
SHOWN_PPO = {
    "objective/scores": "judge's score of a step",
    "objective/kl": "KL to the reference, nats a step",
    "objective/entropy": "entropy, nats a token",
    "policy/clipfrac_avg": "share of clipped tokens",
    "val/explained": "returns explained by the value function",
    "steps/scored_0": "steps that score 0 by rule",
    "steps/tokens": "tokens a step",
}
SCORES = "The model gives every step a value, 0 to 1: `--judge prm --judge_path FOLDER` in the scripts that judge."


def start(
    command: str,
    config_class: type,
    kinds: list[str],
    record: type,
    noun: str,
    argv: list[str],
    output_dir: str,
    description: str,
    data: str = PAIRS,
    model: str = DEFAULT_MODEL,
    read=read_dataset,
) -> Training:
    """The training that the arguments ask for, on records of one class, made of these kinds of the loaders. Defaults are those of
    this repository and this machine. read: how rows are read, where it is not by the loaders."""
    import warnings

    warnings.filterwarnings(
        "ignore", category=FutureWarning
    )  # the libraries' notes to each other, before they are told off
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from trl import ModelConfig

    from search.policy import pick_device

    device, bf16 = pick_device()
    defaults = {
        "dataset_name": data,
        "model_name_or_path": model,
        "output_dir": at_root(output_dir),
    }
    defaults |= {"use_cpu": device == "cpu", "bf16": bf16}
    args, config, model_args = parse_args(
        *(DataArgs, config_class, ModelConfig),
        description=description,
        args=argv,
        defaults=defaults,
    )
    rows = read(args, kinds, record, MADE_BY.get(args.dataset_name))
    return Training(command, args, config, model_args, rows, noun, model)


def peft_and_quantization(model_args) -> dict:
    from trl import get_peft_config, get_quantization_config

    return {
        "peft_config": get_peft_config(model_args),
        "quantization_config": get_quantization_config(model_args),
    }


def dtype_of(model_args, what: str):
    """The torch.dtype of the weights that training begins with. Raises ValueError where they are to be quantized."""
    import torch

    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError(
            f"{what} is not trained on quantized weights: leave out --load_in_4bit and --load_in_8bit"
        )
    return getattr(torch, "float32" if model_args.dtype in (None, "auto") else model_args.dtype)


def train_dpo(argv: list[str]) -> None:
    """Stepwise DPO, or any other loss of StepwiseDPOTrainer: scored pairs -> tuned policy."""
    from trainer.stepwise_dpo_trainer import StepwiseDPOConfig

    output_dir, description = "saved_model/stepwise_dpo_tinyllama", "Stepwise DPO on scored pairs."
    training = start(
        "dpo", StepwiseDPOConfig, ["pairs"], ScoredPair, "pairs", argv, output_dir, description
    )
    from trainer.stepwise_dpo_trainer import StepwiseDPOTrainer

    config = training.config
    with_peft = peft_and_quantization(training.model_args)
    trainer = training.build(
        lambda **given: StepwiseDPOTrainer(**with_peft | given), needs_reference=True
    )
    loss = " + ".join(config.loss_type) + (
        f", credit {config.credit}" if config.has_step_loss else ""
    )
    what = f"stepwise DPO ({loss}), steps scored by a judge, on"
    in_bar = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    training.run(trainer, what, "trl, dpo, stepwise-dpo, reasoning", SHOWN_DPO, in_bar)


def train_sft(argv: list[str]) -> None:
    """Supervised training: problems with solutions, or the chosen side of pairs -> a policy that writes such steps."""
    from trainer.sft_trainer import Solution, StepSFTConfig, StepSFTTrainer

    description = "Supervised training on step-by-step solutions."
    training = start(
        "sft",
        StepSFTConfig,
        ["problems", "pairs"],
        Solution,
        "solutions",
        argv,
        "saved_model/sft",
        description,
    )
    trainer = training.build(
        lambda **given: StepSFTTrainer(**peft_and_quantization(training.model_args) | given)
    )
    in_bar = {"loss": "loss", "mean_token_accuracy": "tokens right"}
    training.run(trainer, "supervised training (SFT) on", "trl, sft, reasoning", SHOWN_SFT, in_bar)


def train_prm(argv: list[str]) -> None:
    """A process reward model: values or labels of steps -> a model that values every step of a solution."""
    from trainer.prm_trainer import LabelledSteps, PRMConfig, PRMTrainer

    description, kinds = (
        "A process reward model (PRM) on step values.",
        ["step_values", "step_labels"],
    )
    training = start(
        "prm",
        PRMConfig,
        kinds,
        LabelledSteps,
        "rows",
        argv,
        "saved_model/prm",
        description,
        STEP_VALUES,
    )
    from trl import get_peft_config

    adapter = {"peft_config": get_peft_config(training.model_args)}
    trainer = training.build(lambda **given: PRMTrainer(**adapter | given), load=load_for_prm)
    what = "training as a process reward model (PRM) on"
    in_bar = {"loss": "loss", "values/good": "good steps", "values/bad": "bad steps"}
    tags = "prm, process-reward-model, reasoning"
    training.run(
        trainer,
        what,
        tags,
        SHOWN_PRM,
        in_bar,
        use=f"{trainer.balance}. {SCORES}",
        note=trainer.balance,
    )


def load_for_prm(name: str, model_args) -> dict:
    """What a PRM's training starts from: a PRM that goes on, or a causal LM made into one. An adapter is merged into its base; with
    --use_peft that of a PRM goes on. Raises ValueError."""
    from transformers import PreTrainedConfig

    from reward_model.process_reward_model import from_causal_lm, load_prm
    from search.policy import load_model

    dtype = dtype_of(model_args, "a PRM")
    config, _ = PreTrainedConfig.get_config_dict(name, revision=model_args.model_revision)
    is_prm = "step_token" in config
    if is_prm:
        model, form = load_prm(name, dtype, trainable=True)
        tokenizer = form.tokenizer
    else:
        model, tokenizer = load_model(name, dtype, revision=model_args.model_revision)
    goes_on = {}
    if hasattr(model, "merge_and_unload"):
        if model_args.use_peft and not is_prm:
            raise ValueError(
                "it is an adapter, and a PRM's adapter needs a base that lies on disk: leave out --use_peft"
            )
        if model_args.use_peft:
            goes_on = {"peft_config": None}
        else:
            model = model.merge_and_unload().requires_grad_(True)  # PEFT had frozen the base
    if not is_prm:
        model = from_causal_lm(model, tokenizer)
    if model_args.attn_implementation:
        model.set_attn_implementation(model_args.attn_implementation)
    return {"model": model, "processing_class": tokenizer, **goes_on}


def train_ppo(argv: list[str]) -> None:
    """Step PPO: beginnings of solutions, a judge -> a policy whose next steps score higher."""
    from dataclasses import dataclass, field, fields

    from trainer.step_ppo_config import StepPPOConfig
    from trainer.step_ppo_episodes import Beginning
    from trainer.step_ppo_trainer import StepPPOTrainer
    from utils.judges import JudgeArgs, check_judge, judge_name, open_judge

    @dataclass
    class PPOConfig(JudgeArgs, StepPPOConfig):
        judge: str = field(
            default="prm", metadata={of.name: of for of in fields(JudgeArgs)}["judge"].metadata
        )
        seed: int = field(
            default=0, metadata={of.name: of for of in fields(StepPPOConfig)}["seed"].metadata
        )
        value_model: str | None = field(
            default=None,
            metadata={
                "help": "a model whose backbone the value function begins with, of the policy's tokens; default: the policy's"
            },
        )
        eval_problems: str = field(
            default=at_root("data/problems_hard_validation.jsonl"),
            metadata={
                "help": "problems whose greedy answers are checked now and then: they are watched, not learned from"
            },
        )
        eval_limit: int = field(
            default=200, metadata={"help": "the first so many of them; 0: none"}
        )

        def __post_init__(self):
            super().__post_init__()
            if self.eval_limit < 0:
                raise ValueError(f"eval_limit: expected 0 or more, got {self.eval_limit}")
            if "response" in (self.judge, self.shuffled_judge) and self.states != "fresh":
                raise ValueError("judge: response scores whole answers: give --states fresh")

    description, kinds = (
        "Step PPO: a judge's scores of the policy's steps are its rewards.",
        ["step_values", "problems"],
    )
    training = start(
        *(
            "ppo",
            PPOConfig,
            kinds,
            Beginning,
            "beginnings",
            argv,
            "saved_model/step_ppo",
            description,
        ),
        data=STEP_VALUES,
    )
    config = training.config
    check_judge(config)
    if config.value_model is not None:
        check_model(config.value_model)
    evaluate = (
        accuracy_on(config.eval_problems, config.eval_limit)
        if config.eval_strategy == "steps"
        else None
    )
    with open_judge(config) as judge:
        trainer = training.build(
            lambda **given: StepPPOTrainer(judge=judge, evaluate=evaluate, **given),
            load=lambda name, model_args: load_for_ppo(name, model_args, config.value_model),
        )
        what = f"step PPO (states {config.states}), rewarded by {judge_name(config)}, from"
        note = f"rewarded by {judge}; {trainer.updates} updates of {trainer.rows_per_update} beginnings"
        training.run(trainer, what, "ppo, step-ppo, reasoning", SHOWN_PPO, {}, note=note)


def accuracy_on(path: str, limit: int):
    """policy -> the share of the first `limit` problems whose greedy answer is right. None if limit is 0."""
    from itertools import islice

    from reasoning.grading import is_correct
    from reasoning.records import Problem, read_records

    if limit == 0:
        return None
    check_input(path)
    tasks = list(islice(read_records(path, Problem), limit))

    def evaluate(policy) -> dict[str, float]:
        answers = policy.generate([task.prompt for task in tasks])
        right = [
            is_correct(answer.steps, task) for (answer,), task in zip(answers, tasks, strict=True)
        ]
        return {"exact_accuracy": sum(right) / len(right)}

    return evaluate


def load_for_ppo(name: str, model_args, value_model: str | None) -> dict:
    """What step PPO starts from: a causal LM, an adapter merged into its base; an adapter's settings with --use_peft; the backbone
    of --value_model. Raises ValueError."""
    from transformers import AutoModel, AutoTokenizer
    from trl import get_peft_config

    from search.policy import base_of, load_model

    dtype = dtype_of(model_args, "a policy of step PPO")
    policy, tokenizer = load_model(name, dtype, revision=model_args.model_revision)
    if hasattr(policy, "merge_and_unload"):
        if model_args.use_peft:
            raise ValueError(
                "it is an adapter, and a new one needs a base that lies on disk: leave out --use_peft"
            )
        policy = policy.merge_and_unload().requires_grad_(True)  # PEFT had frozen the base
    given = {
        "policy": policy,
        "processing_class": tokenizer,
        "peft_config": get_peft_config(model_args),
    }
    if value_model is not None:
        if base_of(value_model)[1]:
            raise ValueError(f"--value_model {value_model} is an adapter: expected a whole model")
        vocabulary = AutoTokenizer.from_pretrained(value_model).get_vocab()
        strange = next(
            (
                token
                for token, index in tokenizer.get_vocab().items()
                if vocabulary.get(token) != index
            ),
            None,
        )
        if strange is not None:
            raise ValueError(
                f"--value_model {value_model} has another tokenizer than the policy ({strange!r} for one)"
            )
        given["value_backbone"], loading = AutoModel.from_pretrained(
            value_model, dtype=dtype, output_loading_info=True
        )
        if loading["missing_keys"]:  # transformers would fill them with random numbers
            raise ValueError(
                f"--value_model {value_model}: weights are missing, {min(loading['missing_keys'])} for one"
            )
    if model_args.attn_implementation:
        for model in (policy, given.get("value_backbone")):
            if model is not None:
                model.set_attn_implementation(model_args.attn_implementation)
    return given


def train_reward(argv: list[str]) -> None:
    """A response reward model: ranked answers -> a model that gives every answer one number."""
    from trainer.reward_trainer import RankedGroup, ResponseRewardConfig, ResponseRewardTrainer

    training = start(
        *(
            "reward",
            ResponseRewardConfig,
            ["pairs"],
            RankedGroup,
            "groups",
            argv,
            "saved_model/response_reward_model",
        ),
        "A response reward model on ranked answers.",
        **{"data": ANSWERS, "model": PRM_MINI, "read": read_ranked},
    )
    from trl import get_peft_config

    question = training.config.question
    trainer = training.build(
        lambda **given: ResponseRewardTrainer(
            **{"peft_config": get_peft_config(training.model_args)} | given
        ),
        load=lambda name, model_args: load_for_reward(name, model_args, question),
    )
    use = (
        "It scores whole responses: `python reward_model/score_responses.py score --scorer FOLDER`."
    )
    what, tags = "training as a response reward model on", "trl, reward-model, reasoning"
    in_bar = {"loss": "loss", "accuracy": "told apart"}
    training.run(
        trainer,
        what,
        tags,
        SHOWN_REWARD,
        in_bar,
        use=f"{trainer.balance}. {use}",
        note=trainer.balance,
    )


def read_ranked(args: DataArgs, kinds: list[str], record: type, made_by: str | None) -> list:
    """The groups of a table of ranked answers, but for its test rows; or preference pairs of texts, as groups of two. Raises
    RecordError or UserError, also for a held-out problem."""
    from reasoning.ranking import check_groups, groups, read_answers
    from reasoning.rows import load_rows

    name, records = args.dataset_name, []
    if made_by:
        check_input(name, made_by)
    if name.endswith(".csv"):
        check_input(name)
        rows = read_answers(name)
        check_groups(rows, name)
        kept = [row for row in rows if row.split in ("", "train")]
        if len(kept) < len(rows):
            print(f"{len(rows) - len(kept)} rows of {name} left out: not of the split train")
        for (prompt, _), ranked in groups(kept).items():
            records.append(
                record(prompt, [row.answer for row in ranked], [row.rank for row in ranked])
            )
        if not records:
            raise UserError(
                f"{name}: none of its {len(rows)} rows is ranked and of the split train"
            )
    else:
        for where, row in load_rows(name, args.dataset_config, args.dataset_train_split):
            try:
                records.append(record.from_row(row))
            except RecordError as error:
                raise RecordError(f"{where}: {error}") from None
    refuse_held_out(name, records)
    return records


def load_for_reward(name: str, model_args, question: str) -> dict:
    """What a response reward model's training starts from: a reward model that goes on, an encoder, or a causal LM made into one.
    An adapter is merged into its base; with --use_peft that of a reward model goes on. Raises ValueError or JudgeError."""
    from transformers import PreTrainedConfig

    from reward_model.response_reward_model import (
        from_causal_lm,
        is_reward_adapter,
        load_reward_model,
    )
    from search.policy import base_of, load_model

    dtype = dtype_of(model_args, "a reward model")
    revision = model_args.model_revision
    base, is_adapter = base_of(name, revision)
    kinds = PreTrainedConfig.get_config_dict(base)[0].get("architectures") or [""]
    makes_text = kinds[0].endswith(("ForCausalLM", "LMHeadModel")) and not (
        is_adapter and is_reward_adapter(name)
    )
    if makes_text:
        model, tokenizer = load_model(name, dtype, revision=revision)
    else:
        model, tokenizer = load_reward_model(
            name, dtype, new_head=True, trainable=model_args.use_peft, revision=revision
        )
    goes_on = {}
    if hasattr(model, "merge_and_unload"):
        if model_args.use_peft and makes_text:
            raise ValueError(
                "it is an adapter, and a reward model's adapter needs a base that lies on disk: leave out --use_peft"
            )
        if model_args.use_peft:
            goes_on = {"peft_config": None}
        else:
            model = model.merge_and_unload().requires_grad_(True)  # PEFT had frozen the base
    if makes_text:
        model = from_causal_lm(model, tokenizer, question)
    if model_args.attn_implementation:
        model.set_attn_implementation(model_args.attn_implementation)
    return {"model": model, "processing_class": tokenizer, **goes_on}


COMMANDS = {
    "dpo": train_dpo,
    "sft": train_sft,
    "prm": train_prm,
    "ppo": train_ppo,
    "reward": train_reward,
}


def main() -> None:
    argv = sys.argv[1:]
    if argv[:1] in (["-h"], ["--help"]):
        print(HELP, end="")
        return
    command = argv.pop(0) if argv and not argv[0].startswith("-") else "dpo"
    if command not in COMMANDS:
        raise UserError(
            f"unknown command {command}: expected one of {', '.join(COMMANDS)} (see --help)"
        )
    COMMANDS[command](argv)


if __name__ == "__main__":
    run(main)
