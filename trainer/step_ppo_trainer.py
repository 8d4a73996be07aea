"""Step PPO: proximal policy optimization with a reward for every step, from any StepJudge. The equations are in trainer/losses.py.

    config = StepPPOConfig("saved_model/mine", total_episodes=1280)
    StepPPOTrainer(policy, config, tokenizer, judge, train_dataset=[{"prompt": ..., "prefix": [...]}]).train()

An episode is one step: its state is a question and the beginning of a solution, its actions are the tokens of the next step. The
reward of a token is -kl_coef (log pi - log pi_ref), of the last one also the judge's score of the step, and nothing is bootstrapped
past it. States are the beginnings of the data set (`rows`) or the policy's own (`fresh`): it writes a whole solution, and every
step of that is an episode whose state is what stands before it. The sampled ids are kept, and never tokenized again.
"""

import contextlib
import copy
import itertools
import json
import math
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerState

from reasoning.records import Problem, RecordError, StepValue, write_text
from reasoning.steps import STEP_NUMBER, ends_solution
from reward_model.base import PromptTooLong, StepJudge
from search.policy import Policy, State
from trainer.losses import approximate_kl, gae, ppo_policy_loss, ppo_value_loss, whiten

logger = get_logger(__name__)

# what the last step of a row may be, so that it scores 0 and no step follows it; `unanswered`: the text ends, and it is no answer,
# which a judge that reads steps cannot see
FLAWS = ("empty", "too_long", "repeated", "unanswered")


# A row is a searched step (`prompt`, `prefix`, `step`, `score`), of which the beginning is kept, or a problem, whose solution
# has not begun:
@dataclass(frozen=True)
class Beginning:
    prompt: str
    prefix: list[str] = field(default_factory=list)

    @classmethod
    def from_row(cls, row: Any) -> "Beginning":
        """Raises RecordError if the row is neither."""
        if isinstance(row, dict) and "step" in row:
            value = StepValue.from_row(row)
            return cls(value.prompt, value.prefix)
        return cls(Problem.from_row(row).prompt)


@dataclass
class StepPPOConfig:
    """What a run of step PPO may be told; names as in TRL's last PPOConfig where it has them. Raises ValueError for values that
    make no sense."""

    output_dir: str = field(default="saved_model/step_ppo", metadata={"help": "Where the tuned policy goes."})
    run_name: str | None = field(default=None, metadata={"help": "Folder of its log in --logs_dir (default: output_dir's name)."})
    states: str = field(
        default="both",
        metadata={
            "help": "Where episodes begin: rows: at the beginnings of the data set, one step each; fresh: at every step of "
            "solutions that the policy itself writes to the questions; both: half of each.",
            "choices": ["rows", "fresh", "both"],
        },
    )
    total_episodes: int = field(
        default=2560,
        metadata={
            "help": "Beginnings that the policy goes on from in all, by one step, or from a fresh one to the end. An update takes "
            "per_device_train_batch_size * gradient_accumulation_steps * num_mini_batches of them on every device."
        },
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Rows a device sees at once."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Such batches on every device to an optimizer step."})
    num_mini_batches: int = field(default=4, metadata={"help": "Optimizer steps an update and epoch, each on rows of its own."})
    num_ppo_epochs: int = field(default=2, metadata={"help": "Passes over the rows of an update."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate of the policy, AdamW."})
    value_learning_rate: float = field(
        default=1e-3,
        metadata={"help": "That of the value function's own weights; with --use_peft these are its head."},
    )
    lr_scheduler_type: str = field(
        default="linear", metadata={"help": "linear: down to 0 over all updates; or constant.", "choices": ["linear", "constant"]}
    )
    max_grad_norm: float = field(
        default=1.0, metadata={"help": "Longest gradient, of the policy's and of the value function's own weights each; 0: any."}
    )
    kl_coef: float = field(default=0.05, metadata={"help": "Reward taken off for a nat of log pi - log pi_ref, 0 or more."})
    cliprange: float = field(default=0.2, metadata={"help": "How far from 1 a ratio pi / pi_old is still followed."})
    cliprange_value: float = field(default=0.2, metadata={"help": "How far from the old value a value is followed, in reward."})
    vf_coef: float = field(
        default=0.1,
        metadata={
            "help": "Weight of the value loss where the value function shares the policy's weights, with --use_peft; elsewhere it "
            "has weights and a learning rate of its own, and this does nothing."
        },
    )
    gamma: float = field(default=1.0, metadata={"help": "Discount a token."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalized advantage estimation."})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "Advantages of an update to mean 0, and to deviation 1 if it is more than noise."}
    )
    target_kl: float | None = field(
        default=0.05,
        metadata={"help": "Nats a token from the policy that sampled at which the rest of an update is skipped; empty: never."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Of sampling, and of the log-probs of what was sampled; above 0."})
    max_new_tokens: int = field(default=64, metadata={"help": "Longest step (TRL's response_length); a longer one scores 0."})
    max_solution_steps: int = field(default=16, metadata={"help": "Steps after which a fresh solution is left as it is."})
    bf16: bool = field(default=False, metadata={"help": "bf16 autocast; weights stay as --dtype says."})
    use_cpu: bool = field(default=False, metadata={"help": "Use no GPU."})
    seed: int = field(default=0, metadata={"help": "Of the order of beginnings, of sampling, of minibatches."})
    eval_strategy: str = field(
        default="steps",
        metadata={
            "help": "steps: look at kept-out beginnings and validation problems; no.",
            "choices": ["steps", "no"],
        },
    )
    eval_steps: float = field(default=0.2, metadata={"help": "Look every so many updates, or below 1 every such share of all."})
    save_strategy: str = field(default="steps", metadata={"help": "steps: write checkpoints; no.", "choices": ["steps", "no"]})
    save_steps: float = field(default=0.1, metadata={"help": "A checkpoint every so many updates, or below 1 a share of all."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept; older ones are deleted. Empty: all."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "true: go on from the last checkpoint; or the folder of one."}
    )
    report_to: str = field(default="none", metadata={"help": "A tracker that accelerate knows, as tensorboard or wandb; or none."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    fp16 = False  # not offered; what is said of a training asks

    def __post_init__(self):
        whole = ("total_episodes", "per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches")
        for name in (*whole, "num_ppo_epochs", "max_new_tokens", "max_solution_steps", "save_total_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "value_learning_rate", "max_grad_norm", "kl_coef", "vf_coef"):
            if getattr(self, name) is not None and not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name}: expected a number of 0 or more, got {getattr(self, name)}")
        for name in ("cliprange", "cliprange_value", "target_kl", "temperature", "eval_steps", "save_steps"):
            if getattr(self, name) is not None and not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)}")
        for name, of_field in self.__dataclass_fields__.items():
            choices = of_field.metadata.get("choices")
            if choices and getattr(self, name) is not None and getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)}")

    def to_dict(self) -> dict:
        return asdict(self)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.use_cpu or not torch.cuda.is_available() else "cuda")


# --- episodes --------------------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A beginning and what the policy wrote after it: one episode a step. The actions are `state.ids[begin:]`, T tokens.

    given: steps of the beginning; begin: its tokens. ends[k]: tokens up to the end of the k-th new step, from `begin` on. flaw: one
    of FLAWS, if that is why the last step scores 0. scores: one a new step, None if the judge could not read them. twin: how many
    rows before this one have the same beginning, which keeps their samples apart."""

    state: State
    is_fresh: bool
    twin: int = 0
    ends: list[int] = field(default_factory=list)
    flaw: str = ""
    scores: list[float] | None = None
    logps: Tensor | None = None  # (T,) each, under the policy that sampled, and of its reference and its value function
    ref_logps: Tensor | None = None
    values: Tensor | None = None
    entropy: Tensor | None = None

    def __post_init__(self):
        self.given, self.begin = len(self.state.steps), len(self.state.ids)

    def add(self, child: State, max_steps: int) -> bool:
        """Take the next step; returns whether another one is to follow."""
        before, self.state = self.state, child
        self.ends.append(len(child.ids) - self.begin)
        if len(child.steps) == len(before.steps):
            self.flaw = "empty"
        elif child.status == "cut":
            self.flaw = "too_long"
        elif _without_number(child.steps[-1]) in map(_without_number, before.steps):
            self.flaw = "repeated"
        elif child.status == "finished" and not ends_solution(list(child.steps)):
            self.flaw = "unanswered"
        return self.is_fresh and not self.flaw and child.status == "open" and len(self.ends) < max_steps

    def judged(self) -> tuple[str, tuple[str, ...]]:
        """The solution as the judge is to see it: without a step that scores 0 in any case."""
        return self.state.prompt, self.state.steps[: self.given + len(self.ends) - bool(self.flaw)]


def _without_number(step: str) -> str:
    """`Step 3: 2 + 2 = 4` -> `2 + 2 = 4`: to count on does not make a step new."""
    return STEP_NUMBER.sub("", step, count=1).strip()


def roll_out(policy: Policy, rows: Sequence[Row], temperature: float, max_new_tokens: int, max_steps: int, seed: int) -> None:
    """Let the policy write after every row's beginning: one step, or to the end where the row is fresh. A row's samples come from
    the seed, its beginning and its `twin` alone."""
    going = list(rows)
    while going:
        further = []
        for twin in sorted({row.twin for row in going}):
            group = [row for row in going if row.twin == twin]
            children = policy.next_steps([row.state for row in group], 1, temperature, max_new_tokens, (seed << 20) + twin)
            further += [row for row, (child,) in zip(group, children, strict=True) if row.add(child, max_steps)]
        going = further


def judge_rows(judge: StepJudge, rows: Sequence[Row]) -> None:
    """The judge's scores of the new steps, in one call; a flawed step scores 0."""
    scored = judge.score_steps([row.judged() for row in rows], skip=[row.given for row in rows])
    for row, scores in zip(rows, scored, strict=True):
        row.scores = None if scores is None else [*scores, *[0.0] * bool(row.flaw)]


# --- policy and value function ---------------------------------------------------------------------------------------------------


class PolicyAndValue(nn.Module):
    """A causal language model and what the reward to come is, by a linear head of zeros on the last hidden states: of the policy
    itself, or of a backbone of its own."""

    def __init__(self, policy, backbone=None):
        super().__init__()
        self.policy, self.backbone = policy, backbone
        config = (backbone or policy).config.get_text_config()
        self.head = nn.Linear(config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def value_parameters(self) -> list[nn.Parameter]:
        """The value function's own weights."""
        return [*(self.backbone.parameters() if self.backbone is not None else ()), *self.head.parameters()]

    def forward(self, ids: Tensor, begins: Tensor, count: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of the actions, entropies, values of the states before them, (B, T) each. ids (B, L), right-padded: causal
        attention never sees the padding; begins (B,): where the actions of a row begin; count: T."""
        shared = self.backbone is None
        logps, entropy, hidden = action_logps(self.policy, ids, begins, count, temperature, hidden=shared)
        if not shared:
            hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        before = _places(ids, begins, count) - 1
        hidden = hidden.gather(1, before[..., None].expand(-1, -1, hidden.size(-1)))  # (B, T, H)
        return logps, entropy, self.head(hidden.to(self.head.weight.dtype))[..., 0].float()


def _places(ids: Tensor, begins: Tensor, count: int) -> Tensor:
    """Where in ids (B, L) the actions stand, (B, T); beyond the end of a row, the last place."""
    return (begins[:, None] + torch.arange(count, device=ids.device)).clamp(max=ids.size(1) - 1)


def action_logps(model, ids: Tensor, begins: Tensor, count: int, temperature: float, hidden: bool = False):
    """(log-probs of the actions, entropies, both (B, T) in nats; the last hidden states (B, L, H) if asked for, else None)."""
    first = int(begins.min()) - 1  # no logits are needed before
    outputs = model(input_ids=ids, use_cache=False, logits_to_keep=ids.size(1) - first, output_hidden_states=hidden)
    places = _places(ids, begins, count)
    logits = outputs.logits.gather(1, (places - 1 - first)[..., None].expand(-1, -1, outputs.logits.size(-1))).float()
    logps = (logits / temperature).log_softmax(-1)  # (B, T, V)
    entropy = -(logps.detach().exp() * logps.detach()).sum(-1)
    chosen = logps.gather(-1, ids.gather(1, places)[..., None])[..., 0]
    return chosen, entropy, outputs.hidden_states[-1] if hidden else None


@dataclass
class Batch:
    """The rows of an update as tensors, (N, T) each, on the CPU; `tokens` says which are there, `last` which end a step."""

    rows: list[Row]
    logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    tokens: Tensor
    last: Tensor


class StepPPOTrainer:
    """Tunes a policy by the scores that a judge gives to its steps.

    policy: a causal LM; with peft_config an adapter on it is trained, and the value function is a head on the same weights. Else
    the value function has a backbone of its own: `value_backbone`, or a copy of the policy's. The reference is the policy as it is
    given. train_dataset: rows of Beginning; eval_dataset: such that are kept out, whose steps are scored now and then.
    evaluate(policy) -> numbers: logged beside that. No dropout anywhere: the models stay in evaluation mode.

    `state.log_history` has a row an update: objective/scores (the judge's, mean of all steps), objective/kl (nats a step from the
    reference), objective/entropy (nats a token), policy/clipfrac_avg, policy/approxkl_avg (nats a token from the policy that
    sampled), val/clipfrac_avg, val/explained (share of the returns' variance that the values explain), loss, loss/policy_avg,
    loss/value_avg, steps/number, steps/tokens (mean length), steps/scored_0 (share of steps that FLAWS make 0; each also by its
    name), steps/left_out (too long for the judge), updates/skipped (share of minibatches skipped at target_kl), lr, episode. Rows
    with `eval_` are of kept-out beginnings and of `evaluate`.

    Raises ValueError for models that do not fit each other, or if no beginning is left."""

    def __init__(
        self,
        policy,
        args: StepPPOConfig,
        processing_class,
        judge: StepJudge,
        train_dataset: Iterable[dict],
        eval_dataset: Iterable[dict] | None = None,
        value_backbone=None,
        peft_config=None,
        evaluate: Callable[[Policy], dict[str, float]] | None = None,
    ):
        if peft_config is not None and value_backbone is not None:
            raise ValueError("value_model: the value function of an adapter shares the policy's weights; leave out one of them")
        self.args, self.tokenizer, self.judge, self.evaluate = args, processing_class, judge, evaluate
        trackers = {}
        if args.report_to != "none":
            folder = os.environ.get("TENSORBOARD_LOGGING_DIR", args.output_dir)  # as transformers' trainers
            trackers = {"log_with": args.report_to, "project_dir": folder}
        self.accelerator = Accelerator(cpu=args.use_cpu, mixed_precision="bf16" if args.bf16 else "no", **trackers)
        processes = self.accelerator.num_processes
        of_device = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.num_mini_batches
        self.rows_per_update = of_device * processes
        self.updates = math.ceil(args.total_episodes / self.rows_per_update)

        self.reference = None  # an adapter's is the policy without it
        if peft_config is None:
            self.reference = copy.deepcopy(policy).requires_grad_(False).eval().to(self.accelerator.device)
            value_backbone = copy.deepcopy(policy.base_model) if value_backbone is None else value_backbone
        else:
            from peft import get_peft_model

            peft_config = copy.deepcopy(peft_config)
            peft_config.lora_dropout = 0.0  # noise in the ratios that the objective is made of
            policy = get_peft_model(policy, peft_config)
        torch.manual_seed(args.seed)
        self.model = policy
        self.module = PolicyAndValue(policy, value_backbone).eval()
        own = {id(parameter) for parameter in self.module.value_parameters()}
        self.parameters = [
            [p for p in self.module.parameters() if p.requires_grad and id(p) not in own],
            [p for p in self.module.value_parameters() if p.requires_grad],
        ]
        self.rates = [args.learning_rate, args.value_learning_rate]
        self.value_weight = args.vf_coef if value_backbone is None else 1.0
        groups = [{"params": params, "lr": rate} for params, rate in zip(self.parameters, self.rates, strict=True)]
        # a large epsilon, as PPO is usually run: gradients of nothing but rounding errors make no steps of full length
        optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0)
        self.prepared, self.optimizer = self.accelerator.prepare(self.module, optimizer)

        starter = Policy(policy, processing_class)
        self.prompts, self.beginnings = self._read(train_dataset, starter, "train")
        if not (self.prompts if args.states == "fresh" else self.beginnings):
            raise ValueError("no beginning is left to go on from")
        self.kept_out = None if eval_dataset is None else self._read(eval_dataset, starter, "eval")
        self.state = TrainerState(max_steps=self.updates)

    def _read(self, dataset: Iterable[dict], policy: Policy, name: str) -> tuple[list[State], list[State]]:
        """(the questions, the beginnings of solutions), each once, as far as they leave room in the context."""
        rows = {(row["prompt"], *row["prefix"]) for row in dataset}
        fresh, begun, too_long = [], [], 0
        for prompt, *prefix in sorted({(prompt,) for prompt, *_ in rows} | rows):
            try:
                state = policy.start(prompt, prefix)
            except PromptTooLong:
                too_long += 1
                continue
            if state.status == "open":
                fresh += [state] * (not prefix)
                begun += [state] * ((prompt, *prefix) in rows)
        if too_long:
            logger.warning(f"{name}: {too_long} of {len(rows)} beginnings fill the policy's context and are left out")
        return fresh, begun

    # --- what Training asks of a trainer

    def is_world_process_zero(self) -> bool:
        return self.accelerator.is_main_process

    def save_model(self, folder: str) -> None:
        if self.accelerator.is_main_process:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        self.accelerator.wait_for_everyone()

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """From the beginning, or from a checkpoint of the same run: then it ends with the very same weights."""
        args = self.args
        if resume_from_checkpoint is not None:
            self._load(Path(resume_from_checkpoint))
        if args.report_to != "none":
            self.accelerator.init_trackers(args.run_name or Path(args.output_dir).name, _flat(args.to_dict()))
        hidden = args.disable_tqdm or not self.accelerator.is_main_process
        with tqdm(total=self.updates, initial=self.state.global_step, unit="update", disable=hidden) as bar:
            if self.state.global_step == 0:
                self._evaluate()
            while self.state.global_step < self.updates:
                logs = self.update()
                self.state.global_step += 1
                self._log(logs)
                if self._is_due(args.eval_strategy, args.eval_steps):
                    self._evaluate()
                if self._is_due(args.save_strategy, args.save_steps):
                    self._save()
                bar.update()
                bar.set_postfix(score=f"{logs['objective/scores']:.3f}", kl=f"{logs['objective/kl']:.3f}")
        if args.report_to != "none":
            self.accelerator.end_training()

    # --- one update

    def update(self) -> dict[str, float]:
        """Sample, judge, learn. Everything random comes from the seed and the number of the update."""
        batch, logs = self._experience()
        update, progress = self.state.global_step, self.state.global_step / self.updates
        shrink = 1 - progress if self.args.lr_scheduler_type == "linear" else 1.0
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * shrink
        logs |= self._learn(batch, update)
        return {**logs, "lr": self.rates[0] * shrink, "episode": (update + 1) * self.rows_per_update}

    def _draw(self, states: Sequence[State], start: int, count: int, name: str) -> list[State]:
        """The states from `start` on in an endless row of shuffled passes over all of them."""
        drawn, place = [], start
        while len(drawn) < count:
            turn, first = divmod(place, len(states))
            order = random.Random(f"{self.args.seed} {name} {turn}").sample(range(len(states)), len(states))
            drawn += [states[k] for k in order[first : first + count - len(drawn)]]
            place = start + len(drawn)
        return drawn

    def _new_rows(self, update: int) -> list[Row]:
        """The beginnings of an update, the same in every process."""
        of_fresh = {"rows": 0, "fresh": 1, "both": 0.5}[self.args.states]
        fresh = round(of_fresh * self.rows_per_update)
        begun = self.rows_per_update - fresh
        rows = [Row(state, True) for state in self._draw(self.prompts, update * fresh, fresh, "fresh")]
        rows += [Row(state, False) for state in self._draw(self.beginnings, update * begun, begun, "rows")]
        return _number_twins(rows)

    def _experience(self) -> tuple[Batch, dict[str, float]]:
        args, update = self.args, self.state.global_step
        rows = self._play(self._new_rows(update), args.seed * 1_000_003 + update + 1)
        self._remember(rows)
        rows = self._gather(rows)
        scores = [score for row in rows for score in row.scores or []]
        if update == 0 and scores:  # until it has learned something, a value is the mean score: a score all have teaches nothing
            mean = sum(scores) / len(scores)
            with torch.no_grad():
                self.module.head.bias += mean
            for row in rows:
                row.values += mean
        batch = self._batch(rows)
        return batch, _measure(batch)

    def _play(self, rows: list[Row], seed: int) -> list[Row]:
        """This process's share of the rows, written and judged."""
        args, accelerator = self.args, self.accelerator
        ours = rows[accelerator.process_index :: accelerator.num_processes]
        policy = Policy(self.model, self.tokenizer)  # a new one: what an engine keeps is of older weights
        roll_out(policy, ours, args.temperature, args.max_new_tokens, args.max_solution_steps, seed)
        judge_rows(self.judge, ours)
        return ours

    @torch.no_grad()
    def _remember(self, rows: list[Row]) -> None:
        """Log-probs under policy and reference, entropies and values of this process's rows, before anything is learned."""
        for start in range(0, len(rows), self.args.per_device_train_batch_size):
            part = rows[start : start + self.args.per_device_train_batch_size]
            inputs = self._inputs(part)
            found = [*self.prepared(*inputs), self._reference_logps(*inputs)]
            for b, row in enumerate(part):
                count = row.ends[-1]
                row.logps, row.entropy, row.values, row.ref_logps = (values[b, :count].cpu().clone() for values in found)

    def _reference_logps(self, *inputs) -> Tensor:
        without = self.model.disable_adapter() if self.reference is None else contextlib.nullcontext()
        with without, self.accelerator.autocast():
            return action_logps(self.reference or self.model, *inputs)[0]

    def _inputs(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, int, float]:
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row.state.ids) for row in rows], batch_first=True)
        begins = torch.tensor([row.begin for row in rows])
        device = self.accelerator.device
        return ids.to(device), begins.to(device), max(row.ends[-1] for row in rows), self.args.temperature

    def _gather(self, rows: list[Row]) -> list[Row]:
        """The rows of all processes, in the order in which they were dealt out."""
        if self.accelerator.num_processes == 1:
            return rows
        processes = self.accelerator.num_processes
        everyone = gather_object(rows)  # process by process
        shares = [everyone[len(rows) * k : len(rows) * (k + 1)] for k in range(processes)]
        return [row for one_each in zip(*shares, strict=True) for row in one_each]

    def _batch(self, rows: list[Row]) -> Batch:
        args, longest = self.args, max(row.ends[-1] for row in rows)

        def padded(tensors: Iterable[Tensor]) -> Tensor:
            return torch.stack([nn.functional.pad(tensor, (0, longest - len(tensor))) for tensor in tensors])

        logps, ref_logps, values = (padded(getattr(row, name) for row in rows) for name in ("logps", "ref_logps", "values"))
        rewards = -args.kl_coef * (logps - ref_logps)
        last = torch.zeros_like(logps, dtype=torch.bool)
        for b, row in enumerate(rows):
            ends = torch.tensor(row.ends) - 1
            last[b, ends] = True
            rewards[b, ends] += torch.tensor(row.scores or [0.0] * len(row.ends))
        tokens = torch.arange(longest) < torch.tensor([row.ends[-1] if row.scores is not None else 0 for row in rows])[:, None]
        advantages, returns = gae(rewards, values, last, args.gamma, args.lam)
        if args.whiten_advantages and tokens.any():
            advantages = whiten(advantages, tokens)
        return Batch(rows, logps, values, advantages, returns, tokens, last)

    def _learn(self, batch: Batch, update: int) -> dict[str, float]:
        """All minibatches of an update; the rest is skipped when the policy is target_kl away from the one that sampled."""
        args, accelerator = self.args, self.accelerator
        sums, done, stopped = torch.zeros(5), 0, False
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + update)
        orders = [torch.randperm(len(batch.rows), generator=generator) for _ in range(args.num_ppo_epochs)]
        for mini in itertools.chain(*(order.chunk(args.num_mini_batches) for order in orders)):
            ours = mini[accelerator.process_index :: accelerator.num_processes]
            tokens = batch.tokens[mini].sum().clamp(min=1).item()
            micros = ours.split(args.per_device_train_batch_size)
            of_mini = torch.zeros(5)
            for k, micro in enumerate(micros):
                is_last = k == len(micros) - 1
                with contextlib.nullcontext() if is_last else accelerator.no_sync(self.prepared):
                    loss, parts = self._loss(batch, micro)
                    # a mean over all tokens of the minibatch; processes average their gradients
                    accelerator.backward(loss * accelerator.num_processes / tokens)
                of_mini += parts
            of_mini = accelerator.gather(of_mini[None].to(accelerator.device)).sum(0).cpu() / tokens
            stopped = args.target_kl is not None and of_mini[4].item() > args.target_kl
            if not stopped:
                for params in self.parameters:
                    if args.max_grad_norm:
                        accelerator.clip_grad_norm_(params, args.max_grad_norm)
                self.optimizer.step()
                done += 1
            self.optimizer.zero_grad()
            sums += of_mini
            if stopped:
                break
        policy, value, clipped, value_clipped, kl = (sums / (done + stopped)).tolist()
        return {
            "loss": policy + self.value_weight * value,
            "loss/policy_avg": policy,
            "loss/value_avg": value,
            "policy/clipfrac_avg": clipped,
            "val/clipfrac_avg": value_clipped,
            "policy/approxkl_avg": kl,
            "updates/skipped": 1 - done / (args.num_ppo_epochs * args.num_mini_batches),
        }

    def _loss(self, batch: Batch, micro: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the tokens of some rows: the loss, and (policy loss, value loss, clipped, values clipped, KL)."""
        args, device = self.args, self.accelerator.device
        inputs = self._inputs([batch.rows[k] for k in micro.tolist()])
        logps, _, values = self.prepared(*inputs)
        old_logps, old_values, advantages, returns, tokens = (
            tensor[micro, : inputs[2]].to(device)
            for tensor in (batch.logps, batch.values, batch.advantages, batch.returns, batch.tokens)
        )
        policy, clipped = ppo_policy_loss(logps, old_logps, advantages, args.cliprange)
        value, value_clipped = ppo_value_loss(values, old_values, returns, args.cliprange_value)
        parts = [policy, value, clipped, value_clipped, approximate_kl(logps, old_logps)]
        policy, value, *others = [(part * tokens).sum() for part in parts]
        return policy + self.value_weight * value, torch.stack([policy, value, *others]).detach().float().cpu()

    # --- what is watched

    def _evaluate(self) -> None:
        """Scores of what the policy writes after kept-out beginnings, the same ones every time, and what `evaluate` finds."""
        if self.args.eval_strategy == "no":
            return
        logs = {}
        if self.kept_out is not None:
            fresh, begun = self.kept_out
            rows = [Row(state, True) for state in fresh] if self.args.states != "rows" else []
            rows += [Row(state, False) for state in begun] if self.args.states != "fresh" else []
            rows = random.Random(f"{self.args.seed} eval").sample(rows, min(len(rows), self.rows_per_update))
            rows = self._play(_number_twins(rows), self.args.seed * 1_000_003)
            steps = Counter(tokens=0, number=0, scores=0.0)
            for row in rows:
                if row.scores is not None:
                    steps.update(tokens=row.ends[-1], number=len(row.ends), scores=sum(row.scores))
            sums = torch.tensor([[steps["tokens"], steps["number"], steps["scores"]]], dtype=torch.float64)
            tokens, number, scores = self.accelerator.gather(sums.to(self.accelerator.device)).sum(0).tolist()
            if number:
                logs |= {"eval_objective/scores": scores / number, "eval_steps/tokens": tokens / number}
        if self.evaluate is not None and self.accelerator.is_main_process:
            logs |= {f"eval_{name}": value for name, value in self.evaluate(Policy(self.model, self.tokenizer)).items()}
        self.accelerator.wait_for_everyone()
        self._log(logs)

    def _log(self, logs: dict[str, float]) -> None:
        if logs:
            self.state.log_history.append({**logs, "step": self.state.global_step})
            if self.args.report_to != "none":
                self.accelerator.log(logs, step=self.state.global_step)

    def _is_due(self, strategy: str, steps: float) -> bool:
        every = max(1, math.ceil(steps * self.updates) if steps < 1 else int(steps))
        return strategy != "no" and (self.state.global_step % every == 0 or self.state.global_step == self.updates)

    # --- checkpoints

    def _save(self) -> None:
        """What is trained, the optimizer's state and the log; the file that makes a checkpoint whole comes last. There is no random
        state: all that is random comes from the seed and the number of the update."""
        if self.accelerator.is_main_process:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            save_file({name: w.detach().contiguous() for name, w in self._trained().items()}, folder / "trained.safetensors")
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            state = {"global_step": self.state.global_step, "log_history": self.state.log_history}
            write_text(folder / "trainer_state.json", [json.dumps(state, indent=1)])
            older = [path for path in folder.parent.glob("checkpoint-*") if path.name[11:].isdigit() and path != folder]
            older.sort(key=lambda path: int(path.name[11:]))
            for path in older[: len(older) + 1 - self.args.save_total_limit] if self.args.save_total_limit else []:
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def _trained(self) -> dict[str, Tensor]:
        """What is trained; of tied weights one."""
        return {name: weight for name, weight in self.module.named_parameters() if weight.requires_grad}

    @torch.no_grad()
    def _load(self, folder: Path) -> None:
        try:
            kept = json.loads((folder / "trainer_state.json").read_text("utf-8"))
            weights, ours = load_file(folder / "trained.safetensors"), self._trained()
            if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in ours.items()}:
                raise ValueError("it is of another model")
            for name, weight in ours.items():
                weight.copy_(weights[name])
            self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", map_location=self.accelerator.device))
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise RecordError(f"{folder}: no checkpoint of this training can be read from it ({error})") from None
        self.state.global_step, self.state.log_history = kept["global_step"], kept["log_history"]


def _number_twins(rows: list[Row]) -> list[Row]:
    seen: Counter[tuple[int, ...]] = Counter()
    for row in rows:
        row.twin = seen[row.state.ids]
        seen[row.state.ids] += 1
    return rows


def _measure(batch: Batch) -> dict[str, float]:
    """What the rows of an update were like."""
    rows = [row for row in batch.rows if row.scores is not None]
    steps = max(1, sum(len(row.ends) for row in rows))
    tokens = max(1, sum(row.ends[-1] for row in rows))
    flaws = Counter(row.flaw for row in rows)
    returns, values = batch.returns[batch.tokens], batch.values[batch.tokens]
    spread = returns.var(correction=0).item() if len(returns) else 0.0
    left = (returns - values).var(correction=0).item() if len(returns) else 0.0
    return {
        "objective/scores": sum(sum(row.scores) for row in rows) / steps,
        "objective/kl": sum((row.logps - row.ref_logps).sum().item() for row in rows) / steps,
        "objective/entropy": sum(row.entropy.sum().item() for row in rows) / tokens,
        "val/explained": 1 - left / spread if spread > 1e-12 else 0.0,
        "steps/number": sum(len(row.ends) for row in rows),
        "steps/tokens": tokens / steps,
        "steps/scored_0": sum(flaws[flaw] for flaw in FLAWS) / steps,
        **{f"steps/{flaw}": flaws[flaw] / steps for flaw in FLAWS},
        "steps/left_out": sum(len(row.ends) for row in batch.rows if row.scores is None),
    }


def _flat(settings: dict) -> dict:
    """A tracker takes numbers and texts alone."""
    return {name: value if isinstance(value, int | float | str | bool) else str(value) for name, value in settings.items()}
