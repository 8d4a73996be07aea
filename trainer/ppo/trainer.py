"""Step PPO: proximal policy optimization with a judge's score as the reward of every step.

    config = StepPPOConfig("saved_model/mine", total_episodes=1280)
    rows = [{"prompt": ..., "prefix": [...]}]  # EpisodeStart, as dicts
    StepPPOTrainer(model, config, tokenizer, judge, train_dataset=rows).train()

An episode is one step: its state is a prompt with a prefix, its actions are the tokens of the next
step. The reward of a token is -kl_coef (log pi - log pi_ref); the last token also gets the judge's
score of the step, and nothing is bootstrapped past it. The prefixes come from the data set (`rows`)
or from the policy (`fresh`): it writes a whole solution, and every step of it is an episode.
Sampled ids are kept and never tokenized again. The equations are in trainer/losses.py.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from peft import get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerState

from common.cli import warn
from common.errors import ModelError, PromptTooLong
from common.files import write_text
from common.progress import progress_bar
from lm.loading import load_model
from lm.policy import Policy, State
from reasoning.samples import Sample, samples_file, show_samples
from reward_model.protocols import StepJudge
from reward_model.registry import check_judge, judge_name, open_judge, warn_of_foreign_text
from trainer.losses import approximate_kl, gae, ppo_policy_loss, ppo_value_loss, whiten
from trainer.ppo.config import PPOArgs, StepPPOConfig
from trainer.ppo.episodes import (
    FLAWS,
    EpisodeStart,
    Trajectory,
    judge_trajectories,
    number_duplicates,
    roll_out,
)
from trainer.session import Recipe, Training

# a flaw of trainer/ppo/episodes.py -> its verdict in reasoning/samples.py
VERDICTS = {"empty": "empty", "too_long": "cut", "repeated": "repeated", "unanswered": "no answer"}

logger = get_logger(__name__)


class PolicyAndValue(nn.Module):
    """A causal language model, and a value function: a linear head, first zero, on hidden states.

    The hidden states are those of `backbone`, or the policy's own without one."""

    def __init__(self, policy: Any, backbone: Any = None):
        super().__init__()
        self.policy, self.backbone = policy, backbone
        config = (backbone or policy).config.get_text_config()
        self.head = nn.Linear(config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def value_parameters(self) -> list[nn.Parameter]:
        """The weights that only the value function has."""
        backbone = [] if self.backbone is None else self.backbone.parameters()
        return [*backbone, *self.head.parameters()]

    def forward(
        self, ids: Tensor, firsts: Tensor, length: int, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of the actions, entropies, and values of the states before them, (B, T) each.

        ids (B, L), right-padded: causal attention never reaches the padding; firsts (B,): the place
        of the first action token; length: T."""
        shared = self.backbone is None
        logps, entropy, hidden = action_logps(
            self.policy, ids, firsts, length, temperature, hidden=shared
        )
        if not shared:
            hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        before = _places(ids, firsts, length) - 1
        hidden = hidden.gather(1, before[..., None].expand(-1, -1, hidden.size(-1)))  # (B, T, H)
        return logps, entropy, self.head(hidden.to(self.head.weight.dtype))[..., 0].float()


def _places(ids: Tensor, firsts: Tensor, length: int) -> Tensor:
    """(B, T): the places of the actions in ids (B, L); the last place after the end of a row."""
    return (firsts[:, None] + torch.arange(length, device=ids.device)).clamp(max=ids.size(1) - 1)


def action_logps(
    model: Any, ids: Tensor, firsts: Tensor, length: int, temperature: float, hidden: bool = False
) -> tuple[Tensor, Tensor, Any]:
    """Log-probs of the actions and entropies, (B, T) each, in nats, and hidden states (B, L, H).

    The hidden states are those of the last layer if `hidden`, else None."""
    skipped = int(firsts.min()) - 1  # no logits are needed before
    outputs = model(
        input_ids=ids,
        use_cache=False,
        logits_to_keep=ids.size(1) - skipped,
        output_hidden_states=hidden,
    )
    places = _places(ids, firsts, length)
    index = (places - 1 - skipped)[..., None].expand(-1, -1, outputs.logits.size(-1))
    logits = outputs.logits.gather(1, index).float()
    logps = (logits / temperature).log_softmax(-1)  # (B, T, V)
    entropy = -(logps.detach().exp() * logps.detach()).sum(-1)
    chosen = logps.gather(-1, ids.gather(1, places)[..., None])[..., 0]
    return chosen, entropy, outputs.hidden_states[-1] if hidden else None


@dataclass
class Batch:
    """The N trajectories of an update, and tensors (N, T) on the CPU.

    tokens is False for padding and for trajectories without scores; last is True at the last token
    of each step."""

    trajectories: list[Trajectory]
    logps: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    tokens: Tensor
    last: Tensor


class StepPPOTrainer:
    """Trains a policy on the scores that a judge gives to its steps.

    model: a causal LM; with peft_config an adapter on it is trained, and the value function is a
    head on the same weights; else the value function starts as a copy of the policy's backbone. The
    reference is the policy at the start. train_dataset: rows of EpisodeStart; eval_dataset:
    kept-out rows, whose new steps are scored now and then; evaluate(policy) -> numbers, logged at
    the same times. The models stay in evaluation mode: there is no dropout. Raises ValueError if no
    prefix is left.

    `state.log_history` has one row an update:

    - objective/scores: the judge's, mean of all steps
    - objective/kl: nats a step from the reference; objective/entropy: nats a token
    - policy/clipfrac_avg, val/clipfrac_avg: shares of clipped tokens and values
    - policy/approxkl_avg: nats a token from the policy that sampled
    - val/explained: the share of the variance of the returns that the values explain
    - loss, loss/policy_avg, loss/value_avg
    - steps/number; steps/tokens: mean length; steps/left_out: steps that the judge could not read
    - steps/scored_0: the share of steps with one of FLAWS, and each flaw by its name
    - updates/skipped: the share of minibatches skipped because of target_kl; lr; episode

    Keys with `eval_` are of the kept-out rows and of `evaluate`."""

    def __init__(
        self,
        model: Any,
        args: StepPPOConfig,
        processing_class: Any,
        judge: StepJudge,
        train_dataset: Iterable[dict],
        eval_dataset: Iterable[dict] | None = None,
        peft_config: Any = None,
        evaluate: Callable[[Policy], dict[str, float]] | None = None,
    ):
        self.args, self.tokenizer = args, processing_class
        self.judge, self.evaluate = judge, evaluate
        trackers = {}
        if args.report_to != "none":
            folder = os.environ.get("TENSORBOARD_LOGGING_DIR", args.output_dir)
            trackers = {"log_with": args.report_to, "project_dir": folder}
        self.accelerator = Accelerator(
            cpu=args.use_cpu, mixed_precision="bf16" if args.bf16 else "no", **trackers
        )
        per_device = args.per_device_train_batch_size * args.gradient_accumulation_steps
        per_device *= args.num_mini_batches
        self.trajectories_per_update = per_device * self.accelerator.num_processes
        self.updates = math.ceil(args.total_episodes / self.trajectories_per_update)

        torch.manual_seed(args.seed)  # for the weights of a new adapter
        self.reference = None  # with an adapter: the policy without it
        value_backbone = None  # with an adapter: the policy's own
        if peft_config is None:
            self.reference = copy.deepcopy(model).requires_grad_(False).eval()
            self.reference.to(self.accelerator.device)
            value_backbone = copy.deepcopy(model.base_model)
        else:
            peft_config = copy.deepcopy(peft_config)
            peft_config.lora_dropout = 0.0  # dropout would be noise in the probability ratios
            model = get_peft_model(model, peft_config)
        self.model = model
        self.module = PolicyAndValue(model, value_backbone).eval()
        own = {id(parameter) for parameter in self.module.value_parameters()}
        self.parameters = [
            [p for p in self.module.parameters() if p.requires_grad and id(p) not in own],
            [p for p in self.module.value_parameters() if p.requires_grad],
        ]
        self.rates = [args.learning_rate, args.value_learning_rate]
        self.value_weight = args.vf_coef if value_backbone is None else 1.0
        groups = [
            {"params": params, "lr": rate}
            for params, rate in zip(self.parameters, self.rates, strict=True)
        ]
        # PPO's usual large epsilon: a gradient of rounding errors does not become a full-length
        # step
        optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0)
        self.prepared, self.optimizer = self.accelerator.prepare(self.module, optimizer)

        starter = Policy(model, processing_class)
        self.prompts, self.prefixes = self._read(train_dataset, starter, "train")
        if not (self.prompts if args.states == "fresh" else self.prefixes):
            raise ValueError("no prefix is left to start from")
        self.kept_out = None if eval_dataset is None else self._read(eval_dataset, starter, "eval")
        self.state = TrainerState(max_steps=self.updates)
        count = self.trajectories_per_update
        self.balance = f"rewarded by {judge}; {self.updates} updates of {count} prefixes"

    def _read(
        self, dataset: Iterable[dict], policy: Policy, name: str
    ) -> tuple[list[State], list[State]]:
        """(prompts, prefixes), each once, without those that fill the policy's context."""
        rows = {(row["prompt"], *row["prefix"]) for row in dataset}
        prompts, prefixes, too_long = [], [], 0
        for prompt, *prefix in sorted({(prompt,) for prompt, *_ in rows} | rows):
            try:
                state = policy.start(prompt, prefix)
            except PromptTooLong:
                too_long += 1
                continue
            if state.status == "open":
                prompts += [state] * (not prefix)
                prefixes += [state] * ((prompt, *prefix) in rows)
        if too_long:
            logger.warning(
                f"{name}: {too_long} of {len(rows)} prefixes fill the policy's context and are "
                "left out"
            )
        return prompts, prefixes

    # --- the interface that trainer/session.py uses, besides `state`, `model` and `balance` ---

    @property
    def processing_class(self) -> Any:
        """The tokenizer, under the name that TRL's trainers give it."""
        return self.tokenizer

    def is_world_process_zero(self) -> bool:
        return self.accelerator.is_main_process

    def save_model(self, folder: str) -> None:
        if self.accelerator.is_main_process:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        self.accelerator.wait_for_everyone()

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Train from the start, or resume: both give the same weights, bit by bit.

        resume_from_checkpoint: the folder of a checkpoint of the same training. Raises
        ModelError."""
        args = self.args
        if resume_from_checkpoint is not None:
            self._load(Path(resume_from_checkpoint))
        if args.report_to != "none":
            run_name = args.run_name or Path(args.output_dir).name
            self.accelerator.init_trackers(run_name, _flat(args.to_dict()))
        hidden = args.disable_tqdm or not self.accelerator.is_main_process
        done = self.state.global_step
        options = {"desc": "training", "initial": done, "unit": "update", "disable": hidden}
        with progress_bar(total=self.updates, **options) as bar:
            if done == 0:
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
                bar.set_postfix(
                    score=f"{logs['objective/scores']:.3f}", kl=f"{logs['objective/kl']:.3f}"
                )
        if args.report_to != "none":
            self.accelerator.end_training()

    # --- one update ---

    def update(self) -> dict[str, float]:
        """Sample, judge, learn. All randomness comes from the seed and the number of the update."""
        batch, logs = self._experience()
        update, progress = self.state.global_step, self.state.global_step / self.updates
        shrink = 1 - progress if self.args.lr_scheduler_type == "linear" else 1.0
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * shrink
        logs |= self._learn(batch, update)
        episode = (update + 1) * self.trajectories_per_update
        return {**logs, "lr": self.rates[0] * shrink, "episode": episode}

    def _draw(self, states: Sequence[State], start: int, count: int, name: str) -> list[State]:
        """`count` states, from `start` on, of an endless sequence of shuffled passes."""
        drawn: list[State] = []
        while len(drawn) < count:
            turn, first = divmod(start + len(drawn), len(states))
            rng = random.Random(f"{self.args.seed} {name} {turn}")
            order = rng.sample(range(len(states)), len(states))
            drawn += [states[k] for k in order[first : first + count - len(drawn)]]
        return drawn

    def _start_trajectories(self, update: int) -> list[Trajectory]:
        """The trajectories of an update without their steps, the same in every process."""
        share = {"rows": 0, "fresh": 1, "both": 0.5}[self.args.states]
        fresh = round(share * self.trajectories_per_update)
        rows = self.trajectories_per_update - fresh
        prompts = self._draw(self.prompts, update * fresh, fresh, "fresh")
        prefixes = self._draw(self.prefixes, update * rows, rows, "rows")
        return _trajectories(prompts, prefixes)

    def _experience(self) -> tuple[Batch, dict[str, float]]:
        """Sample and judge the trajectories of this update: (batch, metrics), of all processes."""
        update, seed = self.state.global_step, self.args.seed * 1_000_003
        trajectories = self._sample(self._start_trajectories(update), seed + update + 1)
        self._compute_logps(trajectories)
        trajectories = self._gather(trajectories)
        scores = [score for each in trajectories for score in each.scores or []]
        # values start as the mean score, so that equal scores give no advantage
        if update == 0 and scores:
            mean = sum(scores) / len(scores)
            with torch.no_grad():
                self.module.head.bias += mean
            for trajectory in trajectories:
                trajectory.values += mean
        if update == 0 and self.accelerator.is_main_process:
            self._warn_of_flaws(trajectories)
        batch = self._batch(trajectories)
        return batch, _metrics(batch)

    def _warn_of_flaws(self, trajectories: list[Trajectory]) -> None:
        """Show three trajectories if all of them end in a step that scores 0 by rule."""
        if all(each.flaw for each in trajectories):
            warn("all trajectories of the first update end in a step that scores 0 by rule")
            samples = [
                Sample(each.state.prompt, list(each.state.steps), VERDICTS[each.flaw])
                for each in trajectories
            ]
            show_samples(samples, samples_file(Path(self.args.output_dir) / "first_update", True))

    def _sample(self, trajectories: list[Trajectory], seed: int) -> list[Trajectory]:
        """Sample and judge this process's share of the trajectories."""
        args, accelerator = self.args, self.accelerator
        ours = trajectories[accelerator.process_index :: accelerator.num_processes]
        # a new Policy, because its caches are of older weights
        policy = Policy(self.model, self.tokenizer)
        roll_out(policy, ours, args.temperature, args.max_new_tokens, args.max_solution_steps, seed)
        judge_trajectories(self.judge, ours)
        return ours

    @torch.no_grad()
    def _compute_logps(self, trajectories: list[Trajectory]) -> None:
        """Set log-probs, entropies and values of this process's trajectories."""
        size = self.args.per_device_train_batch_size
        for start in range(0, len(trajectories), size):
            part = trajectories[start : start + size]
            inputs = self._inputs(part)
            tensors = [*self.prepared(*inputs), self._reference_logps(*inputs)]
            for b, each in enumerate(part):
                count = each.ends[-1]
                each.logps, each.entropy, each.values, each.ref_logps = (
                    tensor[b, :count].cpu().clone() for tensor in tensors
                )

    def _reference_logps(self, *inputs: Any) -> Tensor:
        if self.reference is not None:
            model, adapter_off = self.reference, contextlib.nullcontext()
        else:
            model, adapter_off = self.model, self.model.disable_adapter()
        with adapter_off, self.accelerator.autocast():
            return action_logps(model, *inputs)[0]

    def _inputs(self, trajectories: Sequence[Trajectory]) -> tuple[Tensor, Tensor, int, float]:
        """The arguments of PolicyAndValue.forward."""
        device = self.accelerator.device
        rows = [torch.tensor(each.state.ids) for each in trajectories]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        firsts = torch.tensor([each.first for each in trajectories]).to(device)
        return ids, firsts, max(each.ends[-1] for each in trajectories), self.args.temperature

    def _gather(self, trajectories: list[Trajectory]) -> list[Trajectory]:
        """The trajectories of all processes, in the order in which `_sample` distributed them."""
        processes, count = self.accelerator.num_processes, len(trajectories)
        if processes == 1:
            return trajectories
        gathered = gather_object(trajectories)  # process by process
        shares = [gathered[count * k : count * (k + 1)] for k in range(processes)]
        return [each for one_each in zip(*shares, strict=True) for each in one_each]

    def _batch(self, trajectories: list[Trajectory]) -> Batch:
        args, longest = self.args, max(each.ends[-1] for each in trajectories)

        def padded(tensors: Iterable[Tensor]) -> Tensor:
            return torch.stack([nn.functional.pad(t, (0, longest - len(t))) for t in tensors])

        logps, ref_logps, values = (
            padded(getattr(each, name) for each in trajectories)
            for name in ("logps", "ref_logps", "values")
        )
        rewards = -args.kl_coef * (logps - ref_logps)
        last = torch.zeros_like(logps, dtype=torch.bool)
        for b, each in enumerate(trajectories):
            ends = torch.tensor(each.ends) - 1
            last[b, ends] = True
            rewards[b, ends] += torch.tensor(each.scores or [0.0] * len(each.ends))
        lengths = [0 if each.scores is None else each.ends[-1] for each in trajectories]
        tokens = torch.arange(longest) < torch.tensor(lengths)[:, None]
        advantages, returns = gae(rewards, values, last, args.gamma, args.lam)
        if args.whiten_advantages and tokens.any():
            advantages = whiten(advantages, tokens)
        return Batch(trajectories, logps, values, advantages, returns, tokens, last)

    def _learn(self, batch: Batch, update: int) -> dict[str, float]:
        """Learn from all minibatches; skip the rest once the policy has moved by target_kl."""
        args, accelerator = self.args, self.accelerator
        sums, done, stopped = torch.zeros(5), 0, False
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + update)
        count = len(batch.trajectories)
        orders = [torch.randperm(count, generator=generator) for _ in range(args.num_ppo_epochs)]
        for mini in itertools.chain(*(order.chunk(args.num_mini_batches) for order in orders)):
            ours = mini[accelerator.process_index :: accelerator.num_processes]
            tokens = batch.tokens[mini].sum().clamp(min=1).item()
            micros = ours.split(args.per_device_train_batch_size)
            mini_sums = torch.zeros(5)
            for k, micro in enumerate(micros):
                is_last = k == len(micros) - 1
                with contextlib.nullcontext() if is_last else accelerator.no_sync(self.prepared):
                    loss, parts = self._loss(batch, micro)
                    # a mean over all tokens of the minibatch; processes average their gradients
                    accelerator.backward(loss * accelerator.num_processes / tokens)
                mini_sums += parts
            gathered = accelerator.gather(mini_sums[None].to(accelerator.device))
            means = gathered.sum(0).cpu() / tokens
            stopped = args.target_kl is not None and means[4].item() > args.target_kl
            if not stopped:
                for params in self.parameters:
                    if args.max_grad_norm:
                        accelerator.clip_grad_norm_(params, args.max_grad_norm)
                self.optimizer.step()
                done += 1
            self.optimizer.zero_grad()
            sums += means
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
        """Sums over the tokens of some trajectories: the loss, and a tensor of its parts.

        The parts are policy loss, value loss, clipped tokens, clipped values and KL."""
        args, device = self.args, self.accelerator.device
        inputs = self._inputs([batch.trajectories[k] for k in micro.tolist()])
        logps, _, values = self.prepared(*inputs)
        old_logps, old_values, advantages, returns, tokens = (
            tensor[micro, : inputs[2]].to(device)
            for tensor in (batch.logps, batch.values, batch.advantages, batch.returns, batch.tokens)
        )
        policy, clipped = ppo_policy_loss(logps, old_logps, advantages, args.cliprange)
        value, value_clipped = ppo_value_loss(values, old_values, returns, args.cliprange_value)
        parts = [policy, value, clipped, value_clipped, approximate_kl(logps, old_logps)]
        sums = [(part * tokens).sum() for part in parts]
        loss = sums[0] + self.value_weight * sums[1]
        return loss, torch.stack(sums).detach().float().cpu()

    # --- evaluation ---

    def _evaluate(self) -> None:
        """Log the scores of steps after kept-out prefixes, each time the same, and `evaluate`."""
        if self.args.eval_strategy == "no":
            return
        logs: dict[str, float] = {}
        if self.kept_out is not None:
            prompts, prefixes = self.kept_out
            states = self.args.states
            trajectories = _trajectories(
                prompts if states != "rows" else [], prefixes if states != "fresh" else []
            )
            rng = random.Random(f"{self.args.seed} eval")
            count = min(len(trajectories), self.trajectories_per_update)
            chosen = number_duplicates(rng.sample(trajectories, count))
            judged = [
                each
                for each in self._sample(chosen, self.args.seed * 1_000_003)
                if each.scores is not None
            ]
            ours = [
                sum(each.ends[-1] for each in judged),
                sum(len(each.ends) for each in judged),
                sum(sum(each.scores or []) for each in judged),
            ]
            sums = torch.tensor([ours], dtype=torch.float64).to(self.accelerator.device)
            tokens, number, scores = self.accelerator.gather(sums).sum(0).tolist()
            if number:
                logs["eval_objective/scores"] = scores / number
                logs["eval_steps/tokens"] = tokens / number
        if self.evaluate is not None and self.accelerator.is_main_process:
            found = self.evaluate(Policy(self.model, self.tokenizer))
            logs |= {f"eval_{name}": value for name, value in found.items()}
        self.accelerator.wait_for_everyone()
        self._log(logs)

    def _log(self, logs: dict[str, float]) -> None:
        if logs:
            self.state.log_history.append({**logs, "step": self.state.global_step})
            if self.args.report_to != "none":
                self.accelerator.log(logs, step=self.state.global_step)

    def _is_due(self, strategy: str, steps: float) -> bool:
        """Whether to evaluate or save after this update; always after the last one."""
        every = max(1, math.ceil(steps * self.updates) if steps < 1 else int(steps))
        done = self.state.global_step
        return strategy != "no" and (done % every == 0 or done == self.updates)

    # --- checkpoints ---

    def _save(self) -> None:
        """Write the trained weights, the optimizer's state and the log; the state file comes last.

        A checkpoint with a state file is complete. It has no random state, because all randomness
        comes from the seed and the number of the update."""
        if self.accelerator.is_main_process:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            trained = {name: w.detach().contiguous() for name, w in self._trained().items()}
            save_file(trained, folder / "trained.safetensors")
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            state = {"global_step": self.state.global_step, "log_history": self.state.log_history}
            write_text(folder / "trainer_state.json", [json.dumps(state, indent=1)])
            found = [p for p in folder.parent.glob("checkpoint-*") if p.name[11:].isdigit()]
            found.sort(key=lambda path: (path != folder, -int(path.name[11:])))  # this one first
            for path in found[self.args.save_total_limit or len(found) :]:
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def _trained(self) -> dict[str, Tensor]:
        """The trained weights by name; tied weights once."""
        named = self.module.named_parameters()
        return {name: weight for name, weight in named if weight.requires_grad}

    @torch.no_grad()
    def _load(self, folder: Path) -> None:
        try:
            state = json.loads((folder / "trainer_state.json").read_text("utf-8"))
            weights, ours = load_file(folder / "trained.safetensors"), self._trained()
            if {k: w.shape for k, w in weights.items()} != {k: w.shape for k, w in ours.items()}:
                raise ValueError("it is of another model")
            for name, weight in ours.items():
                weight.copy_(weights[name])
            path, device = folder / "optimizer.pt", self.accelerator.device
            state_dict = torch.load(path, map_location=device, weights_only=True)
            self.optimizer.load_state_dict(state_dict)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise ModelError(
                f"{folder}: no checkpoint of this training can be read from it ({error})"
            ) from None
        self.state.global_step, self.state.log_history = state["global_step"], state["log_history"]


def _trajectories(prompts: Iterable[State], prefixes: Iterable[State]) -> list[Trajectory]:
    """Whole solutions of the prompts, then one step after each prefix."""
    rollouts = [Trajectory(state, is_rollout=True) for state in prompts]
    steps = [Trajectory(state, is_rollout=False) for state in prefixes]
    return number_duplicates([*rollouts, *steps])


def _metrics(batch: Batch) -> dict[str, float]:
    """The metrics of the trajectories of an update."""
    judged = [each for each in batch.trajectories if each.scores is not None]
    number = sum(len(each.ends) for each in judged)
    all_steps = sum(len(each.ends) for each in batch.trajectories)
    steps = max(1, number)
    tokens = max(1, sum(each.ends[-1] for each in judged))
    flaws = Counter(each.flaw for each in judged)
    returns, values = batch.returns[batch.tokens], batch.values[batch.tokens]
    variance = returns.var(correction=0).item() if len(returns) else 0.0
    unexplained = (returns - values).var(correction=0).item() if len(returns) else 0.0
    kl = sum((each.logps - each.ref_logps).sum().item() for each in judged)
    return {
        "objective/scores": sum(sum(each.scores or []) for each in judged) / steps,
        "objective/kl": kl / steps,
        "objective/entropy": sum(each.entropy.sum().item() for each in judged) / tokens,
        "val/explained": 1 - unexplained / variance if variance > 1e-12 else 0.0,
        "steps/number": number,
        "steps/tokens": tokens / steps,
        "steps/scored_0": sum(flaws[flaw] for flaw in FLAWS) / steps,
        **{f"steps/{flaw}": flaws[flaw] / steps for flaw in FLAWS},
        "steps/left_out": all_steps - number,
    }


def _flat(settings: dict) -> dict:
    """Settings for a tracker, which takes only numbers and texts."""
    return {
        name: value if isinstance(value, int | float | str | bool) else str(value)
        for name, value in settings.items()
    }


# --- python train.py ppo ---


def _make_trainer(training: Training) -> StepPPOTrainer:
    config = training.config
    check_judge(config)
    evaluate = None
    if config.eval_strategy == "steps" and config.eval_limit and training.accuracy:
        evaluate = training.accuracy(config.eval_problems, config.eval_limit)
    judge = training.stack.enter_context(open_judge(config))
    warn_of_foreign_text(judge, [(row.prompt, row.prefix) for row in training.rows])
    dtype = training.weights_dtype("a policy of step PPO")
    loaded = load_model(training.model, dtype, revision=training.model_args.model_revision)
    # an adapter cannot be trained further: without it, the model is not the reference
    start = training.start_model(*loaded, convert=lambda model, tokenizer: model)
    options: dict[str, Any] = {"judge": judge, "evaluate": evaluate, **training.datasets()}
    return StepPPOTrainer(args=config, **options, **start)


RECIPE = Recipe(
    command="ppo",
    description="Step PPO: a judge's scores of the policy's steps are its rewards.",
    config=PPOArgs,
    record=EpisodeStart,
    noun="prefixes",
    kinds=("step_values", "problems"),
    data="data/mcts_steps.jsonl.gz",
    made_by="python utils/build_mcts_dataset.py",
    output_dir="saved_model/step_ppo",
    make_trainer=_make_trainer,
    title=lambda config: (
        f"step PPO (states {config.states}), rewarded by {judge_name(config)}, from"
    ),
    tags="ppo, step-ppo, reasoning",
    columns={
        "objective/scores": "judge's score of a step",
        "objective/kl": "KL to the reference, nats a step",
        "objective/entropy": "entropy, nats a token",
        "policy/clipfrac_avg": "share of clipped tokens",
        "val/explained": "share of returns' variance explained",
        "steps/scored_0": "steps that score 0 by rule",
        "steps/tokens": "tokens a step",
    },
)
