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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import TrainerState
from trl import get_peft_config

from common.errors import ModelError, PromptTooLong
from common.files import write_text
from lm.loading import load_model, merge_adapter
from lm.policy import Policy, State
from reward_model.protocols import StepJudge
from reward_model.registry import check_judge, judge_name, open_judge
from trainer.losses import approximate_kl, gae, ppo_policy_loss, ppo_value_loss, whiten
from trainer.ppo.config import PPOArgs, StepPPOConfig
from trainer.ppo.episodes import FLAWS, EpisodeStart, Trajectory, judge_rows, number_twins, roll_out
from trainer.session import Recipe, Training

logger = get_logger(__name__)


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
        return [
            *(self.backbone.parameters() if self.backbone is not None else ()),
            *self.head.parameters(),
        ]

    def forward(
        self, ids: Tensor, begins: Tensor, count: int, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of the actions, entropies, values of the states before them, (B, T) each. ids (B, L), right-padded: causal
        attention never sees the padding; begins (B,): where the actions of a row begin; count: T."""
        shared = self.backbone is None
        logps, entropy, hidden = action_logps(
            self.policy, ids, begins, count, temperature, hidden=shared
        )
        if not shared:
            hidden = self.backbone(input_ids=ids, use_cache=False).last_hidden_state
        before = _places(ids, begins, count) - 1
        hidden = hidden.gather(1, before[..., None].expand(-1, -1, hidden.size(-1)))  # (B, T, H)
        return logps, entropy, self.head(hidden.to(self.head.weight.dtype))[..., 0].float()


def _places(ids: Tensor, begins: Tensor, count: int) -> Tensor:
    """Where in ids (B, L) the actions stand, (B, T); beyond the end of a row, the last place."""
    return (begins[:, None] + torch.arange(count, device=ids.device)).clamp(max=ids.size(1) - 1)


def action_logps(
    model, ids: Tensor, begins: Tensor, count: int, temperature: float, hidden: bool = False
):
    """(log-probs of the actions, entropies, both (B, T) in nats; the last hidden states (B, L, H) if asked for, else None)."""
    first = int(begins.min()) - 1  # no logits are needed before
    outputs = model(
        input_ids=ids,
        use_cache=False,
        logits_to_keep=ids.size(1) - first,
        output_hidden_states=hidden,
    )
    places = _places(ids, begins, count)
    logits = outputs.logits.gather(
        1, (places - 1 - first)[..., None].expand(-1, -1, outputs.logits.size(-1))
    ).float()
    logps = (logits / temperature).log_softmax(-1)  # (B, T, V)
    entropy = -(logps.detach().exp() * logps.detach()).sum(-1)
    chosen = logps.gather(-1, ids.gather(1, places)[..., None])[..., 0]
    return chosen, entropy, outputs.hidden_states[-1] if hidden else None


@dataclass
class Batch:
    """The rows of an update as tensors, (N, T) each, on the CPU; `tokens` says which are there, `last` which end a step."""

    rows: list[Trajectory]
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
        peft_config=None,
        evaluate: Callable[[Policy], dict[str, float]] | None = None,
    ):
        self.args, self.tokenizer, self.judge, self.evaluate = (
            args,
            processing_class,
            judge,
            evaluate,
        )
        trackers = {}
        if args.report_to != "none":
            # as transformers' trainers
            folder = os.environ.get("TENSORBOARD_LOGGING_DIR", args.output_dir)
            trackers = {"log_with": args.report_to, "project_dir": folder}
        self.accelerator = Accelerator(
            cpu=args.use_cpu, mixed_precision="bf16" if args.bf16 else "no", **trackers
        )
        processes = self.accelerator.num_processes
        of_device = (
            args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * args.num_mini_batches
        )
        self.rows_per_update = of_device * processes
        self.updates = math.ceil(args.total_episodes / self.rows_per_update)

        self.reference = None  # an adapter's is the policy without it
        value_backbone = None  # an adapter's value function shares the policy's weights
        if peft_config is None:
            self.reference = (
                copy.deepcopy(policy).requires_grad_(False).eval().to(self.accelerator.device)
            )
            value_backbone = copy.deepcopy(policy.base_model)
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
        groups = [
            {"params": params, "lr": rate}
            for params, rate in zip(self.parameters, self.rates, strict=True)
        ]
        # a large epsilon, as PPO is usually run: gradients of nothing but rounding errors make no steps of full length
        optimizer = torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0)
        self.prepared, self.optimizer = self.accelerator.prepare(self.module, optimizer)

        starter = Policy(policy, processing_class)
        self.prompts, self.beginnings = self._read(train_dataset, starter, "train")
        if not (self.prompts if args.states == "fresh" else self.beginnings):
            raise ValueError("no beginning is left to go on from")
        self.kept_out = None if eval_dataset is None else self._read(eval_dataset, starter, "eval")
        self.state = TrainerState(max_steps=self.updates)
        self.balance = (
            f"rewarded by {judge}; {self.updates} updates of {self.rows_per_update} prefixes"
        )

    def _read(
        self, dataset: Iterable[dict], policy: Policy, name: str
    ) -> tuple[list[State], list[State]]:
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
            logger.warning(
                f"{name}: {too_long} of {len(rows)} beginnings fill the policy's context and are left out"
            )
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
            self.accelerator.init_trackers(
                args.run_name or Path(args.output_dir).name, _flat(args.to_dict())
            )
        hidden = args.disable_tqdm or not self.accelerator.is_main_process
        with tqdm(
            total=self.updates, initial=self.state.global_step, unit="update", disable=hidden
        ) as bar:
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
                bar.set_postfix(
                    score=f"{logs['objective/scores']:.3f}", kl=f"{logs['objective/kl']:.3f}"
                )
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
        return {
            **logs,
            "lr": self.rates[0] * shrink,
            "episode": (update + 1) * self.rows_per_update,
        }

    def _draw(self, states: Sequence[State], start: int, count: int, name: str) -> list[State]:
        """The states from `start` on in an endless row of shuffled passes over all of them."""
        drawn, place = [], start
        while len(drawn) < count:
            turn, first = divmod(place, len(states))
            order = random.Random(f"{self.args.seed} {name} {turn}").sample(
                range(len(states)), len(states)
            )
            drawn += [states[k] for k in order[first : first + count - len(drawn)]]
            place = start + len(drawn)
        return drawn

    def _new_rows(self, update: int) -> list[Trajectory]:
        """The beginnings of an update, the same in every process."""
        of_fresh = {"rows": 0, "fresh": 1, "both": 0.5}[self.args.states]
        fresh = round(of_fresh * self.rows_per_update)
        begun = self.rows_per_update - fresh
        rows = [
            Trajectory(state, True)
            for state in self._draw(self.prompts, update * fresh, fresh, "fresh")
        ]
        rows += [
            Trajectory(state, False)
            for state in self._draw(self.beginnings, update * begun, begun, "rows")
        ]
        return number_twins(rows)

    def _experience(self) -> tuple[Batch, dict[str, float]]:
        args, update = self.args, self.state.global_step
        rows = self._play(self._new_rows(update), args.seed * 1_000_003 + update + 1)
        self._remember(rows)
        rows = self._gather(rows)
        scores = [score for row in rows for score in row.scores or []]
        # until it has learned something, a value is the mean score: a score all have teaches nothing
        if update == 0 and scores:
            mean = sum(scores) / len(scores)
            with torch.no_grad():
                self.module.head.bias += mean
            for row in rows:
                row.values += mean
        batch = self._batch(rows)
        return batch, _measure(batch)

    def _play(self, rows: list[Trajectory], seed: int) -> list[Trajectory]:
        """This process's share of the rows, written and judged."""
        args, accelerator = self.args, self.accelerator
        ours = rows[accelerator.process_index :: accelerator.num_processes]
        # a new one: what an engine keeps is of older weights
        policy = Policy(self.model, self.tokenizer)
        roll_out(policy, ours, args.temperature, args.max_new_tokens, args.max_solution_steps, seed)
        judge_rows(self.judge, ours)
        return ours

    @torch.no_grad()
    def _remember(self, rows: list[Trajectory]) -> None:
        """Log-probs under policy and reference, entropies and values of this process's rows, before anything is learned."""
        for start in range(0, len(rows), self.args.per_device_train_batch_size):
            part = rows[start : start + self.args.per_device_train_batch_size]
            inputs = self._inputs(part)
            found = [*self.prepared(*inputs), self._reference_logps(*inputs)]
            for b, row in enumerate(part):
                count = row.ends[-1]
                row.logps, row.entropy, row.values, row.ref_logps = (
                    values[b, :count].cpu().clone() for values in found
                )

    def _reference_logps(self, *inputs) -> Tensor:
        without = (
            self.model.disable_adapter() if self.reference is None else contextlib.nullcontext()
        )
        with without, self.accelerator.autocast():
            return action_logps(self.reference or self.model, *inputs)[0]

    def _inputs(self, rows: Sequence[Trajectory]) -> tuple[Tensor, Tensor, int, float]:
        ids = nn.utils.rnn.pad_sequence(
            [torch.tensor(row.state.ids) for row in rows], batch_first=True
        )
        begins = torch.tensor([row.begin for row in rows])
        device = self.accelerator.device
        return (
            ids.to(device),
            begins.to(device),
            max(row.ends[-1] for row in rows),
            self.args.temperature,
        )

    def _gather(self, rows: list[Trajectory]) -> list[Trajectory]:
        """The rows of all processes, in the order in which they were dealt out."""
        if self.accelerator.num_processes == 1:
            return rows
        processes = self.accelerator.num_processes
        everyone = gather_object(rows)  # process by process
        shares = [everyone[len(rows) * k : len(rows) * (k + 1)] for k in range(processes)]
        return [row for one_each in zip(*shares, strict=True) for row in one_each]

    def _batch(self, rows: list[Trajectory]) -> Batch:
        args, longest = self.args, max(row.ends[-1] for row in rows)

        def padded(tensors: Iterable[Tensor]) -> Tensor:
            return torch.stack(
                [nn.functional.pad(tensor, (0, longest - len(tensor))) for tensor in tensors]
            )

        logps, ref_logps, values = (
            padded(getattr(row, name) for row in rows) for name in ("logps", "ref_logps", "values")
        )
        rewards = -args.kl_coef * (logps - ref_logps)
        last = torch.zeros_like(logps, dtype=torch.bool)
        for b, row in enumerate(rows):
            ends = torch.tensor(row.ends) - 1
            last[b, ends] = True
            rewards[b, ends] += torch.tensor(row.scores or [0.0] * len(row.ends))
        tokens = (
            torch.arange(longest)
            < torch.tensor([row.ends[-1] if row.scores is not None else 0 for row in rows])[:, None]
        )
        advantages, returns = gae(rewards, values, last, args.gamma, args.lam)
        if args.whiten_advantages and tokens.any():
            advantages = whiten(advantages, tokens)
        return Batch(rows, logps, values, advantages, returns, tokens, last)

    def _learn(self, batch: Batch, update: int) -> dict[str, float]:
        """All minibatches of an update; the rest is skipped when the policy is target_kl away from the one that sampled."""
        args, accelerator = self.args, self.accelerator
        sums, done, stopped = torch.zeros(5), 0, False
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + update)
        orders = [
            torch.randperm(len(batch.rows), generator=generator) for _ in range(args.num_ppo_epochs)
        ]
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
        return policy + self.value_weight * value, torch.stack(
            [policy, value, *others]
        ).detach().float().cpu()

    # --- what is watched

    def _evaluate(self) -> None:
        """Scores of what the policy writes after kept-out beginnings, the same ones every time, and what `evaluate` finds."""
        if self.args.eval_strategy == "no":
            return
        logs = {}
        if self.kept_out is not None:
            fresh, begun = self.kept_out
            rows = (
                [Trajectory(state, True) for state in fresh] if self.args.states != "rows" else []
            )
            rows += (
                [Trajectory(state, False) for state in begun] if self.args.states != "fresh" else []
            )
            rows = random.Random(f"{self.args.seed} eval").sample(
                rows, min(len(rows), self.rows_per_update)
            )
            rows = self._play(number_twins(rows), self.args.seed * 1_000_003)
            steps = Counter(tokens=0, number=0, scores=0.0)
            for row in rows:
                if row.scores is not None:
                    steps.update(tokens=row.ends[-1], number=len(row.ends), scores=sum(row.scores))
            sums = torch.tensor(
                [[steps["tokens"], steps["number"], steps["scores"]]], dtype=torch.float64
            )
            tokens, number, scores = (
                self.accelerator.gather(sums.to(self.accelerator.device)).sum(0).tolist()
            )
            if number:
                logs |= {
                    "eval_objective/scores": scores / number,
                    "eval_steps/tokens": tokens / number,
                }
        if self.evaluate is not None and self.accelerator.is_main_process:
            logs |= {
                f"eval_{name}": value
                for name, value in self.evaluate(Policy(self.model, self.tokenizer)).items()
            }
        self.accelerator.wait_for_everyone()
        self._log(logs)

    def _log(self, logs: dict[str, float]) -> None:
        if logs:
            self.state.log_history.append({**logs, "step": self.state.global_step})
            if self.args.report_to != "none":
                self.accelerator.log(logs, step=self.state.global_step)

    def _is_due(self, strategy: str, steps: float) -> bool:
        every = max(1, math.ceil(steps * self.updates) if steps < 1 else int(steps))
        return strategy != "no" and (
            self.state.global_step % every == 0 or self.state.global_step == self.updates
        )

    # --- checkpoints

    def _save(self) -> None:
        """What is trained, the optimizer's state and the log; the file that makes a checkpoint whole comes last. There is no random
        state: all that is random comes from the seed and the number of the update."""
        if self.accelerator.is_main_process:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: w.detach().contiguous() for name, w in self._trained().items()},
                folder / "trained.safetensors",
            )
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
            state = {"global_step": self.state.global_step, "log_history": self.state.log_history}
            write_text(folder / "trainer_state.json", [json.dumps(state, indent=1)])
            older = [
                path
                for path in folder.parent.glob("checkpoint-*")
                if path.name[11:].isdigit() and path != folder
            ]
            older.sort(key=lambda path: int(path.name[11:]))
            for path in (
                older[: len(older) + 1 - self.args.save_total_limit]
                if self.args.save_total_limit
                else []
            ):
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def _trained(self) -> dict[str, Tensor]:
        """What is trained; of tied weights one."""
        return {
            name: weight for name, weight in self.module.named_parameters() if weight.requires_grad
        }

    @torch.no_grad()
    def _load(self, folder: Path) -> None:
        try:
            kept = json.loads((folder / "trainer_state.json").read_text("utf-8"))
            weights, ours = load_file(folder / "trained.safetensors"), self._trained()
            if {name: w.shape for name, w in weights.items()} != {
                name: w.shape for name, w in ours.items()
            }:
                raise ValueError("it is of another model")
            for name, weight in ours.items():
                weight.copy_(weights[name])
            self.optimizer.load_state_dict(
                torch.load(folder / "optimizer.pt", map_location=self.accelerator.device)
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise ModelError(
                f"{folder}: no checkpoint of this training can be read from it ({error})"
            ) from None
        self.state.global_step, self.state.log_history = kept["global_step"], kept["log_history"]


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
    return StepPPOTrainer(
        args=config, judge=judge, evaluate=evaluate, **training.datasets(), **_start(training)
    )


def _start(training: Training) -> dict[str, Any]:
    """What to start from: a causal LM, an adapter merged into its base; the settings of a new adapter
    with --use_peft. Raises ValueError."""
    model_args = training.model_args
    dtype = training.weights_dtype("a policy of step PPO")
    policy, tokenizer = load_model(training.model, dtype, revision=model_args.model_revision)
    if is_peft_model(policy):
        if model_args.use_peft:
            raise ValueError(
                "it is an adapter, and a new one needs a base that is on disk: leave out --use_peft"
            )
        policy = merge_adapter(policy)
    training.set_attention(policy)
    peft_config = get_peft_config(model_args)
    return {"policy": policy, "processing_class": tokenizer, "peft_config": peft_config}


RECIPE = Recipe(
    command="ppo",
    description="Step PPO: a judge's scores of the policy's steps are its rewards.",
    config=PPOArgs,
    record=EpisodeStart,
    noun="prefixes",
    kinds=("step_values", "problems"),
    data="data/mcts_steps.jsonl",
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
