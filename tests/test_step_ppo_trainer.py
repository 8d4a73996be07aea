"""Step PPO: episodes, which steps score 0, the objective, learning, settings, resuming."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import ModelError, RecordError
from common.files import ROOT
from lm.policy import Policy, State
from tests.helpers.judges import FixedJudge
from tests.helpers.training import taught
from trainer.ppo.config import StepPPOConfig
from trainer.ppo.episodes import EpisodeStart, Trajectory, judge_trajectories, roll_out
from trainer.ppo.trainer import StepPPOTrainer, action_logps

PROMPTS = [f"Pick one, number {k}." for k in range(16)]
ROWS = [{"prompt": prompt, "prefix": []} for prompt in PROMPTS]
ARMS = ("Answer: 1", "Answer: 2")
LORA = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.5,
    "target_modules": "all-linear",
    "task_type": "CAUSAL_LM",
}


def prefers(arm: str) -> FixedJudge:
    return FixedJudge(lambda prompt, step, earlier: float(step == arm))


@pytest.fixture(scope="module")
def two_arms(tiny_model_dir, tmp_path_factory) -> str:
    """A model that gives one of two answers, each about half of the time."""
    solutions = [(prompt, [arm]) for prompt in PROMPTS for arm in ARMS]
    return taught(tiny_model_dir, tmp_path_factory.mktemp("arms") / "model", solutions)


@pytest.fixture
def make(two_arms, tmp_path):
    """make(judge, rows=..., model=..., **config) -> a trainer of 16 prefixes an update."""

    def make(judge=None, rows=ROWS, *, model=two_arms, peft=False, **config):
        AcceleratorState._reset_state(reset_partial_state=True)
        given = {
            "evaluate": config.pop("evaluate", None),
            "eval_dataset": config.pop("eval_dataset", None),
        }
        settings = {
            "states": "rows",
            "per_device_train_batch_size": 16,
            "num_mini_batches": 1,
            "total_episodes": 16,
        }
        settings |= {
            "learning_rate": 3e-3,
            "max_new_tokens": 8,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        args = StepPPOConfig(
            **{"output_dir": str(tmp_path / "out"), "eval_strategy": "no", **settings, **config}
        )
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(model)
        lora = LoraConfig(**LORA) if peft else None
        return StepPPOTrainer(
            policy, args, tokenizer, judge or prefers(ARMS[0]), rows, peft_config=lora, **given
        )

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)


def weights(trainer, part="policy") -> dict:
    return {
        name: p.detach().clone()
        for name, p in trainer.module.named_parameters()
        if name.startswith(part)
    }


def distance(before: dict, after: dict) -> float:
    return max((before[name] - after[name]).abs().max().item() for name in before)


def chance(trainer, arm=ARMS[0]) -> float:
    """How likely the policy gives this answer, mean over the prompts."""
    logps = Policy(trainer.model, trainer.tokenizer).step_logps(
        [(prompt, [], [arm]) for prompt in PROMPTS]
    )
    return sum(math.exp(step.logp) for (step,) in logps) / len(logps)


# --- episodes


def test_a_row_is_a_searched_step_or_a_problem():
    step = {"prompt": "p", "prefix": ["a"], "step": "b", "score": 0.5}
    assert EpisodeStart.from_row(step) == EpisodeStart("p", ["a"])
    assert EpisodeStart.from_row({"prompt": "p", "answer": "3", "steps": ["a"]}) == EpisodeStart(
        "p", []
    )
    for row in ({"prompt": "p"}, {"prompt": "p", "step": "a"}, ["p"]):
        with pytest.raises(RecordError):
            EpisodeStart.from_row(row)


PREFIX = State("p", (1, 2, 3), (2, 3), ("Step 1: 2 + 2 = 4",))


@pytest.mark.parametrize(
    ("steps", "status", "flaw"),
    [
        (["Step 2: 4 + 1 = 5"], "open", ""),
        (["Answer: 4"], "finished", ""),
        ([], "finished", "empty"),  # EOS at once
        ([], "cut", "empty"),  # nothing but blanks
        (["Step 2: 4 + 1 = 5"], "cut", "too_long"),
        (["Step 1: 2 + 2 = 4"], "open", "repeated"),
        (["Step 2: 2 + 2 = 4"], "open", "repeated"),  # to count on does not make it new
        (["Step 2: 4 + 1 = 5"], "finished", "unanswered"),
    ],
)
def test_what_scores_0(steps, status, flaw):
    row, asked = Trajectory(PREFIX, True), []
    ends = (2, 3, 5)[: 2 + len(steps)]
    child = State("p", (1, 2, 3, 4, 5), ends, (*PREFIX.steps, *steps), status)
    continues = row.add(child, max_steps=9)
    assert row.flaw == flaw and row.ends == [2] and continues == (status == "open" and not flaw)
    judge_trajectories(
        FixedJudge(lambda prompt, step, earlier: asked.append((step, earlier)) or 0.75), [row]
    )
    assert row.scores == [0.0 if flaw else 0.75]
    # a step that scores 0 anyway is not paid for
    assert asked == ([] if flaw else [(steps[0], PREFIX.steps)])


def test_a_rollout_ends_after_max_steps():
    def child(k: int) -> State:
        return State(
            "p",
            tuple(range(k + 1)),
            tuple(range(1, k + 2)),
            tuple(f"Step {n + 1}: {n}" for n in range(k)),
        )

    row = Trajectory(child(0), True)
    assert [row.add(child(k), max_steps=3) for k in (1, 2, 3)] == [
        True,
        True,
        False,
    ] and row.ends == [1, 2, 3]
    # a prefix of the data set: one step
    assert not Trajectory(child(0), False).add(child(1), max_steps=3)


def test_a_judge_that_cannot_read_leaves_out():
    row = Trajectory(PREFIX, False)
    row.add(State("p", (1, 2, 3, 4), (2, 3, 4), (*PREFIX.steps, "Answer: 4"), "finished"), 9)
    judge_trajectories(FixedJudge(lambda *_: None), [row])
    assert row.scores is None


def test_samples_depend_on_seed_prefix_and_duplicate_alone(tiny_model_dir):
    policy = Policy.load(tiny_model_dir)

    def written(prompts, duplicates, seed=3):
        rows = [
            Trajectory(policy.start(prompt), True, duplicate)
            for prompt, duplicate in zip(prompts, duplicates, strict=True)
        ]
        roll_out(policy, rows, 1.0, 6, 3, seed)
        return [row.state.ids for row in rows]

    three = written(["a", "b", "a"], [0, 0, 1])
    assert (
        len(set(three)) == 3
        and written(["a"], [1]) == three[2:]
        and written(["a"], [0], seed=4) != three[:1]
    )


# --- the objective


def by_hand(trainer, row: Trajectory, model, temperature: float) -> list[float]:
    """log pi of a row's actions in float64, one after the other, each from its own text."""
    ids = list(row.state.ids)
    found = []
    for place in range(row.first, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:place]])).logits[0, -1] / temperature
        found.append(logits.log_softmax(-1)[ids[place]].item())
    return found


@pytest.mark.parametrize("peft", [False, True])
def test_the_objective_of_three_tokens_from_raw_logits(make, tiny_model_dir, peft):
    """Everything is computed again in float64 and plain Python.

    One trajectory has three tokens, two of them a step; policy, reference and values all differ."""
    options = {
        "temperature": 0.7,
        "kl_coef": 0.3,
        "gamma": 0.9,
        "lam": 0.8,
        "cliprange": 0.01,
        "cliprange_value": 0.02,
    }
    trainer = make(model=tiny_model_dir, peft=peft, seed=1, whiten_advantages=False, **options)
    generator = torch.Generator().manual_seed(1)

    def shake(module, by):
        with torch.no_grad():
            for p in module.parameters():
                if p.requires_grad:
                    p += by * torch.randn(p.shape, generator=generator)

    shake(trainer.module, 0.05)
    start = Policy(trainer.model, trainer.tokenizer).start("2 + 2 = ?")
    # the other is longer, so that there is padding
    row, other = (Trajectory(start, True), Trajectory(start, True))
    for k in (2, 3):
        row.add(State("p", (*start.ids, *(50, 60, 70)[:k]), (), tuple("ab")[: k - 1]), 9)
    other.add(State("p", (*start.ids, 90, 91, 92, 93, 94), (), ("c",)), 9)
    # the other was left out: it has no part in anything
    row.scores, other.scores = ([0.25, 1.0], None)
    trainer._compute_logps([row, other])
    sampler = copy.deepcopy(trainer.module).double()
    shake(trainer.module, 0.1 if peft else 0.02)
    now = copy.deepcopy(trainer.module).double()
    batch = trainer._batch([row, other])
    loss, parts = trainer._loss(batch, torch.tensor([0, 1]))

    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    temperature = options["temperature"]
    with torch.no_grad():
        old, new = (
            by_hand(trainer, row, sampler.policy, temperature),
            by_hand(trainer, row, now.policy, temperature),
        )
        ref = by_hand(trainer, row, reference, temperature)
        ids, begins = torch.tensor([row.state.ids]), torch.tensor([row.first])
        old_values, values = (
            module(ids, begins, 3, 1.0)[2][0].tolist() for module in (sampler, now)
        )
    rewards = [-0.3 * (o - r) for o, r in zip(old, ref, strict=True)]
    rewards[1] += 0.25
    rewards[2] += 1.0
    deltas = [
        rewards[0] + 0.9 * old_values[1] - old_values[0],
        rewards[1] - old_values[1],
        rewards[2] - old_values[2],
    ]
    advantages = [deltas[0] + 0.9 * 0.8 * deltas[1], deltas[1], deltas[2]]
    policy = value = clipped = value_clipped = 0.0
    for t in range(3):
        ratio, target = math.exp(new[t] - old[t]), advantages[t] + old_values[t]
        free, bound = -advantages[t] * ratio, -advantages[t] * min(max(ratio, 0.99), 1.01)
        policy, clipped = policy + max(free, bound), clipped + (bound > free)
        near = old_values[t] + min(max(values[t] - old_values[t], -0.02), 0.02)
        free, bound = (values[t] - target) ** 2, (near - target) ** 2
        value, value_clipped = value + 0.5 * max(free, bound), value_clipped + (bound > free)
    assert loss.item() == pytest.approx(policy + (0.1 if peft else 1.0) * value, abs=1e-4)
    assert parts[:2].tolist() == pytest.approx([policy, value], abs=1e-4) and parts[
        2:4
    ].tolist() == [clipped, value_clipped]
    kl = sum(math.expm1(n - o) - (n - o) for n, o in zip(new, old, strict=True))
    assert parts[4].item() == pytest.approx(kl, abs=1e-4)
    assert abs(policy) > 0.05 and value > 0.05 and clipped and max(map(abs, rewards[:1])) > 1e-3


def test_steps_of_a_rollout_are_episodes_of_their_own(make):
    """A step in a rollout gets the same numbers as the step alone: values end with their step."""
    trainer = make()
    start = Policy(trainer.model, trainer.tokenizer).start("q")
    whole = Trajectory(start, True)
    texts, ids = ("a", "b", "c"), (300, 301, 13, 302, 303, 304, 13, 305, 13)
    for k, end in enumerate((3, 7, 9)):
        whole.add(State("q", (*start.ids, *ids[:end]), (), texts[: k + 1]), 9)
    whole.scores = [1.0, 0.0, 0.5]
    alone, first = [], 0
    for k, end in enumerate(whole.ends):
        row = Trajectory(State("q", (*start.ids, *ids[:first]), (), texts[:k]), False)
        row.add(State("q", (*start.ids, *ids[:end]), (), texts[: k + 1]), 9)
        row.scores, first = [whole.scores[k]], end
        alone.append(row)
    with torch.no_grad():
        trainer.module.head.weight += 0.1
    trainer._compute_logps([whole, *alone])
    together, apart = trainer._batch([whole]), trainer._batch(alone)
    assert together.tokens.sum() == apart.tokens.sum() == 9
    trainer.args.whiten_advantages = False
    together, apart = trainer._batch([whole]), trainer._batch(alone)
    for name in ("logps", "values", "advantages", "returns"):
        torch.testing.assert_close(
            getattr(together, name)[0], getattr(apart, name)[apart.tokens], rtol=0, atol=1e-5
        )


# --- learning


@pytest.mark.process
def test_two_arms_are_learned_within_30_updates(make):
    trainer = make(prefers(ARMS[0]), total_episodes=30 * 16)
    assert 0.25 < chance(trainer) < 0.75
    before, values = weights(trainer), weights(trainer, "backbone")
    trainer.train()
    log = trainer.state.log_history
    assert (
        len(log) == 30
        and sum(row["objective/scores"] for row in log[-5:]) / 5 > 0.9
        and chance(trainer) > 0.9
    )
    assert all((before[name] != after).any() for name, after in weights(trainer).items())
    assert all(
        (values[name] != after).any()
        for name, after in weights(trainer, "backbone").items()
        if "embed" not in name
    )
    assert log[-1]["objective/kl"] > 0.1 and log[-1]["val/explained"] > -1


@pytest.mark.process
def test_an_adapter_learns_and_the_base_stays(make, two_arms):
    trainer = make(prefers(ARMS[1]), peft=True, total_episodes=15 * 16, learning_rate=1e-2)
    before = weights(trainer)
    assert distance(before, weights(make(peft=True))) == 0  # its first weights come from the seed
    trainer.train()
    after = weights(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if "lora" in name} and chance(trainer, ARMS[1]) > 0.85
    base = AutoModelForCausalLM.from_pretrained(two_arms)
    ids, begins = torch.tensor([[1, 5, 9, 30, 40]]), torch.tensor([2])
    with torch.no_grad():
        reference = trainer._reference_logps(ids, begins, 3, 1.0)
        torch.testing.assert_close(reference, action_logps(base, ids, begins, 3, 1.0)[0])
        assert not torch.allclose(reference, trainer.module(ids, begins, 3, 1.0)[0])
    assert trainer.model.peft_config["default"].lora_dropout == 0


@pytest.mark.parametrize("score", [1.0, 0.3])
def test_a_reward_that_all_have_teaches_nothing(make, monkeypatch, score):
    """With the settings under which the arms are learned.

    The values start as the mean score, so that no advantage is left. From a value of 0, the last
    token of a step would have a larger one than the first, and whitening would make a signal of
    that."""

    def all_alike(judge, rows):  # flawed steps as well
        for row in rows:
            row.scores = [score] * len(row.ends)

    monkeypatch.setattr("trainer.ppo.trainer.judge_trajectories", all_alike)
    trainer = make(total_episodes=10 * 16)
    before = chance(trainer)
    trainer.train()
    log = trainer.state.log_history
    assert (
        abs(chance(trainer) - before) < 1e-4 and max(abs(row["objective/kl"]) for row in log) < 1e-4
    )
    assert all(row["objective/scores"] == pytest.approx(score) for row in log)


# --- settings


def test_states(make, tiny_model_dir):
    rows = [
        *({"prompt": "p", "prefix": prefix} for prefix in ([], ["a"], ["a"])),
        {"prompt": "q", "prefix": ["a", "b"]},
        {"prompt": "r" * 600, "prefix": []},
        {"prompt": "q", "prefix": ["Answer: 2"]},
    ]
    prompts = {("p", ()), ("q", ())}
    prefixes = {("p", ()), ("p", ("a",)), ("q", ("a", "b"))}
    sizes = {"per_device_train_batch_size": 8, "total_episodes": 8}
    for states, rollouts in (("rows", 0), ("fresh", 8), ("both", 4)):
        trainer = make(rows=rows, model=tiny_model_dir, states=states, **sizes)
        drawn = trainer._start_trajectories(0)
        assert [row.is_rollout for row in drawn] == [True] * rollouts + [False] * (8 - rollouts)
        starts = [(row.state.prompt, row.state.steps) for row in drawn]
        assert set(starts[:rollouts]) <= prompts
        assert set(starts[rollouts:]) == (prefixes if rollouts < 8 else set())
        # the same prefix again gives another sample
        assert len({(row.state.ids, row.duplicate) for row in drawn}) == 8
        assert trainer.update()["steps/number"] >= 8
    with pytest.raises(ValueError, match="no prefix is left"):
        make(rows=rows[4:5], model=tiny_model_dir)


def test_every_prefix_comes_once_in_a_pass(make):
    trainer = make(per_device_train_batch_size=4, num_mini_batches=2, total_episodes=32)
    drawn = [row.state.prompt for update in range(4) for row in trainer._start_trajectories(update)]
    assert sorted(drawn[:16]) == sorted(drawn[16:]) == sorted(PROMPTS) and drawn[:16] != drawn[16:]
    assert drawn[:8] != [
        row.state.prompt
        for row in make(per_device_train_batch_size=8, seed=1)._start_trajectories(0)
    ]


def test_how_many_updates_and_optimizer_steps(make):
    counts = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 3,
        "num_ppo_epochs": 2,
    }
    trainer = make(total_episodes=25, target_kl=None, **counts)
    trainer.train()
    # 36: no fewer than asked
    assert (
        trainer.trajectories_per_update == 12
        and trainer.updates == len(trainer.state.log_history) == 3
    )
    taken = {state["step"].item() for state in trainer.optimizer.state.values()}
    assert taken == {3 * 2 * 3} and trainer.state.log_history[-1]["episode"] == 36


def test_accumulated_batches_are_one_large_one(make):
    split = make(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        num_ppo_epochs=1,
        max_grad_norm=0,
    )
    whole = make(per_device_train_batch_size=16, num_ppo_epochs=1, max_grad_norm=0)
    gradients = []
    for trainer in (split, whole):
        trainer.optimizer.zero_grad = lambda: None  # so that they can be looked at
        trainer.update()
        gradients.append(
            {name: p.grad for name, p in trainer.module.named_parameters() if p.grad is not None}
        )
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=0, atol=1e-5)
    assert max(gradient.abs().max() for gradient in gradients[1].values()) > 1e-3


def moved(trainer) -> tuple[float, float]:
    """How far one update takes the policy's and the value function's own weights."""
    before, own = weights(trainer), weights(trainer, ("backbone", "head.weight"))
    trainer.update()
    return distance(before, weights(trainer)), distance(
        own, weights(trainer, ("backbone", "head.weight"))
    )


@pytest.mark.process
def test_learning_rates(make):
    assert moved(make(learning_rate=0.0, value_learning_rate=1e-3))[0] == 0
    policy, value = moved(make(learning_rate=1e-5, value_learning_rate=1e-3))
    assert 0 < policy < 5e-5 and value > 5e-4
    for schedule, expected in (("linear", [4e-4, 3e-4, 2e-4, 1e-4]), ("constant", [4e-4] * 4)):
        trainer = make(lr_scheduler_type=schedule, learning_rate=4e-4, total_episodes=64)
        trainer.train()
        assert [row["lr"] for row in trainer.state.log_history] == pytest.approx(expected)
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(expected[-1])


def test_max_grad_norm(make):
    """AdamW does not look at the size of a gradient, except where it drowns in its epsilon."""
    assert moved(make(max_grad_norm=1e-10))[0] < 0.05 * moved(make(max_grad_norm=0))[0]


def test_kl_coef_is_taken_off_the_reward(make):
    returns = []
    for kl_coef in (0.0, 0.5):
        trainer = make(kl_coef=kl_coef, lam=1.0)
        with torch.no_grad():
            trainer.model.lm_head.weight *= 1.1
        batch, logs = trainer._experience()
        returns.append(batch.returns[:, 0])
    kl = torch.stack([(row.logps - row.ref_logps).sum() for row in batch.trajectories])
    torch.testing.assert_close(returns[0] - returns[1], 0.5 * kl, rtol=0, atol=1e-5)
    assert kl.abs().max() > 0.01 and logs["objective/kl"] == pytest.approx(
        kl.mean().item(), abs=1e-5
    )


def test_clipping(make):
    for name, logged in (
        ("cliprange", "policy/clipfrac_avg"),
        ("cliprange_value", "val/clipfrac_avg"),
    ):
        wide, narrow = (
            make(target_kl=None, num_ppo_epochs=4, **{name: value}).update()[logged]
            for value in (1e6, 1e-6)
        )
        assert wide == 0 and narrow > 0.1, name


def test_vf_coef_weighs_where_weights_are_shared(make):
    shared, apart = [], []
    for peft, found in ((True, shared), (False, apart)):
        for vf_coef in (0.0, 1.0):
            trainer = make(peft=peft, vf_coef=vf_coef, num_ppo_epochs=3, target_kl=None)
            trainer.update()
            found.append(weights(trainer, ("policy", "backbone")))
    assert distance(*shared) > 1e-6 and distance(*apart) == 0


def test_gamma_lam_and_whitening(make):
    base, discounted, short = (
        make(whiten_advantages=False, **given) for given in ({}, {"gamma": 0.5}, {"lam": 0.0})
    )
    batches = [trainer._experience()[0] for trainer in (base, discounted, short)]
    row = batches[0].trajectories[0]
    count, score = row.ends[-1], row.scores[0]
    value = batches[0].values[0, 0].item()  # the same everywhere at first
    for batch, decay, step in (
        (batches[0], 0.95, 0.0),
        (batches[1], 0.5 * 0.95, -0.5 * value),
        (batches[2], 0.0, 0.0),
    ):
        expected = [0.0] * count
        for t in reversed(range(count)):
            delta = score - value if t == count - 1 else step
            expected[t] = delta + (decay * expected[t + 1] if t + 1 < count else 0.0)
        assert batch.advantages[0, :count].tolist() == pytest.approx(expected, abs=1e-5)
    batch, _ = make()._experience()
    there = batch.advantages[batch.tokens]
    assert abs(there.mean()) < 1e-5 and there.std(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_target_kl_ends_an_update(make):
    given = {"per_device_train_batch_size": 4, "num_mini_batches": 4, "learning_rate": 1e-2}
    stopped = make(target_kl=1e-4, **given).update()
    assert 0 < stopped["updates/skipped"] < 1 and stopped["policy/approxkl_avg"] > 1e-5
    assert make(target_kl=None, **given).update()["updates/skipped"] == 0


def test_temperature_is_that_of_sampling(make, tiny_model_dir):
    cold, hot = (
        make(model=tiny_model_dir, temperature=t)._experience()[1]["objective/entropy"]
        for t in (0.25, 1.0)
    )
    assert cold < hot / 2


def test_lengths_are_limited(make, tiny_model_dir):
    _, logs = make(model=tiny_model_dir, max_new_tokens=3)._experience()
    assert (
        logs["steps/tokens"] <= 3
        and logs["steps/too_long"] > 0.5
        and logs["steps/scored_0"] >= logs["steps/too_long"]
    )
    batch, _ = make(
        model=tiny_model_dir, states="fresh", max_new_tokens=64, max_solution_steps=2
    )._experience()
    assert max(len(row.ends) for row in batch.trajectories) == 2


def test_what_a_judge_cannot_read_teaches_nothing(make):
    trainer = make(FixedJudge(lambda *_: None))
    before = weights(trainer)
    logs = trainer.update()
    assert (
        logs["steps/left_out"] == 16
        and logs["steps/number"] == 0
        and distance(before, weights(trainer)) == 0
    )


def test_bf16_and_trackers(make, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make(bf16=True, report_to="tensorboard", run_name="run")
    trainer.train()
    assert {p.dtype for p in trainer.module.parameters()} == {torch.float32} and list(
        (tmp_path / "logs").rglob("events.*")
    )
    exact, rounded = (
        make()._experience()[0].trajectories[0].logps,
        trainer._experience()[0].trajectories[0].logps,
    )
    assert len(exact) and not torch.equal(exact, rounded)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"total_episodes": 0}, "total_episodes: expected 1 or more, got 0"),
        ({"num_mini_batches": 0}, "num_mini_batches: expected 1 or more"),
        ({"learning_rate": -1.0}, "learning_rate: expected a number of 0 or more"),
        ({"kl_coef": float("nan")}, "kl_coef: expected a number of 0 or more"),
        ({"temperature": 0.0}, "temperature: expected a number above 0"),
        ({"lam": 1.5}, "lam: expected a number from 0 to 1"),
        ({"states": "all"}, "states: expected one of rows, fresh, both"),
        ({"save_steps": 0}, "save_steps: expected a number above 0"),
    ],
)
def test_settings_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        StepPPOConfig(**given)


# --- watching, resuming, several processes


@pytest.mark.process
def test_evaluation_on_kept_out_prefixes_and_by_a_callback(make):
    asked = []

    def evaluate(policy):
        asked.append(policy.generate([PROMPTS[0]], max_new_tokens=8)[0][0].steps)
        return {"exact_accuracy": 0.5}

    settings = {"eval_strategy": "steps", "eval_steps": 2, "total_episodes": 80}
    trainer = make(
        evaluate=evaluate,
        eval_dataset=[{"prompt": "Pick one, number 99.", "prefix": []}],
        **settings,
    )
    trainer.train()
    seen = [row for row in trainer.state.log_history if "eval_exact_accuracy" in row]
    assert [row["step"] for row in seen] == [0, 2, 4, 5] and len(asked) == 4
    assert all({"eval_objective/scores", "eval_steps/tokens"} <= row.keys() for row in seen)
    trained = [row for row in trainer.state.log_history if "loss" in row]
    quiet = make(total_episodes=80)
    quiet.train()
    assert quiet.state.log_history == trained  # to watch changes nothing


@pytest.mark.process
@pytest.mark.parametrize("peft", [False, True])
def test_resumed_is_uninterrupted_bit_by_bit(make, tmp_path, peft):
    settings = {
        "total_episodes": 64,
        "states": "both",
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
    }
    once = make(output_dir=str(tmp_path / "once"), peft=peft, **settings)
    once.train()
    assert sorted(path.name for path in (tmp_path / "once").iterdir()) == [
        "checkpoint-3",
        "checkpoint-4",
    ]
    checkpoint = tmp_path / "once/checkpoint-3"
    assert (checkpoint / "optimizer.pt").is_file() and json.loads(
        (checkpoint / "trainer_state.json").read_text()
    )["global_step"] == 3
    again = make(output_dir=str(tmp_path / "again"), peft=peft, **settings)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.state.log_history == once.state.log_history and again.state.global_step == 4
    for (name, one), (_, two) in zip(
        once.module.named_parameters(), again.module.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name
    for one, two in zip(once.optimizer.state.values(), again.optimizer.state.values(), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ModelError, match="it is of another model"):
        make(peft=not peft).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.process
def test_as_many_checkpoints_are_kept_as_asked(make, tmp_path):
    settings = {"total_episodes": 96, "save_strategy": "steps", "save_steps": 1}
    make(output_dir=str(tmp_path), save_total_limit=4, **settings).train()  # six updates
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"checkpoint-{k}" for k in (3, 4, 5, 6)]


@pytest.mark.slow
def test_two_processes_train_as_one(two_arms, tmp_path):
    """Trajectories, gradients and checkpoints are those of one process with all rows.

    There are two updates of four optimizer steps."""
    script = str(ROOT / "tests/helpers/train_step_ppo.py")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = {"cwd": tmp_path, "env": {**os.environ, "ACCELERATE_USE_CPU": "1"}, "timeout": 900}
    for name, launcher, sizes in (("one", [], ["4", "1"]), ("two", torchrun, ["1", "2"])):
        command = [sys.executable, *launcher, script, two_arms, str(tmp_path / name), *sizes]
        done = subprocess.run(command, capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    before = load_file(Path(two_arms) / "model.safetensors")
    assert any(not torch.equal(before[name], one[f"policy.{name}"]) for name in before)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)
    histories = [
        json.loads((tmp_path / name / "checkpoint-2/trainer_state.json").read_text())["log_history"]
        for name in ("one", "two")
    ]
    for first, second in zip(*histories, strict=True):
        assert second == pytest.approx(first, abs=1e-4)
