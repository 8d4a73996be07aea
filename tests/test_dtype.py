"""The dtype of models that sample and score: bf16 for large ones where the CPU has it."""

import itertools

import pytest
import torch

from common.cli import DTYPE_VARIABLE, DtypeArgs, parse_args
from common.errors import UserError
from common.files import ROOT
from lm import loading
from lm.policy import Policy
from lm.registry import PolicyArgs, policy_identity
from reasoning.problems import problems
from reward_model.judges.hf import HFJudge
from reward_model.process_reward_model import ProcessRewardModel
from reward_model.registry import JudgeArgs, judge_identity
from reward_model.response_reward_model import ResponseRewardModel

MINI = str(ROOT / "models/policy-mini")
PRM = str(ROOT / "models/prm-mini")


@pytest.fixture(autouse=True)
def no_flag(monkeypatch):
    monkeypatch.setenv(DTYPE_VARIABLE, "auto")  # what a test sets is removed again


def has_instructions(monkeypatch, *names: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16"])
def test_large_models_are_in_bf16_where_the_cpu_has_it(
    tiny_model_dir, tiny_gguf, monkeypatch, instructions
):
    has_instructions(monkeypatch, instructions)
    assert Policy.load(tiny_model_dir).model.dtype == torch.float32  # small
    monkeypatch.setattr(loading, "LARGE", 1)
    policy = Policy.load(tiny_model_dir)
    assert {weight.dtype for weight in policy.model.parameters()} == {torch.bfloat16}
    assert policy.generate(["2 + 3 = ?"], max_new_tokens=4)[0][0].tokens
    assert HFJudge(tiny_model_dir, template="plain").model.dtype == torch.bfloat16
    assert HFJudge(tiny_gguf, template="plain").model.dtype == torch.bfloat16
    has_instructions(monkeypatch, "avx2")
    assert Policy.load(tiny_model_dir).model.dtype == torch.float32


def test_one_flag_decides(tiny_model_dir, monkeypatch):
    has_instructions(monkeypatch, "avx512_bf16")
    monkeypatch.setattr(loading, "LARGE", 1)
    for flag, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        parse_args(DtypeArgs, description="", args=["--dtype", flag])
        assert Policy.load(tiny_model_dir).model.dtype == dtype
    has_instructions(monkeypatch)
    assert Policy.load(tiny_model_dir).model.dtype == torch.bfloat16
    with pytest.raises(SystemExit):
        parse_args(DtypeArgs, description="", args=["--dtype", "int8"])
    monkeypatch.setenv(DTYPE_VARIABLE, "int8")
    with pytest.raises(UserError, match="SCORING_DTYPE: expected one of auto, float32"):
        Policy.load(tiny_model_dir)


def test_a_job_is_another_one_in_bf16(monkeypatch):
    judge = JudgeArgs(judge="prm", judge_path=PRM)
    has_instructions(monkeypatch)
    plain = policy_identity(PolicyArgs(MINI)), judge_identity(judge)
    assert not any("dtype" in job for job in plain)
    has_instructions(monkeypatch, "amx_bf16")
    for job in (policy_identity(PolicyArgs(MINI)), judge_identity(judge)):
        assert "bfloat16" in job["dtype"] and job not in plain
    monkeypatch.setenv(DTYPE_VARIABLE, "float32")
    assert (policy_identity(PolicyArgs(MINI)), judge_identity(judge)) == plain


@pytest.mark.process
def test_bf16_writes_and_scores_as_float32(monkeypatch):
    """Nearly all greedy tokens are the same. Rotary positions are not rounded: a PRM that was cast
    with its buffers would be wrong far from the start."""
    chosen = list(itertools.islice(problems("validation"), 8))
    solutions = [(problem.prompt, problem.steps) for problem in chosen]
    rows = [(prompt, [], steps) for prompt, steps in solutions]
    found = []
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setenv(DTYPE_VARIABLE, dtype)
        policy = Policy.load(MINI)
        assert str(policy.model.dtype) == f"torch.{dtype}"
        greedy = policy.generate([problem.prompt for problem in chosen])
        with ProcessRewardModel(PRM) as prm:
            assert {weight.dtype for weight in prm.model.parameters()} == {policy.model.dtype}
            assert {buffer.dtype for buffer in prm.model.buffers()} == {torch.float32}
            scores = [score for steps in prm.score_steps(solutions) for score in steps]
        rewards = ResponseRewardModel(str(ROOT / "models/reward-mini")).score(
            [(prompt, "\n".join(steps)) for prompt, steps in solutions]
        )
        logps = [step.logp for steps in policy.step_logps(rows) for step in steps]
        found.append((greedy, *map(torch.tensor, (scores, rewards, logps))))
    (greedy, *numbers), (greedy_bf16, *numbers_bf16) = found
    assert sum(a == b for a, b in zip(greedy, greedy_bf16, strict=True)) >= 7
    for a, b, close in zip(numbers, numbers_bf16, (0.05, 0.2, 0.2), strict=True):
        assert 0 < (a - b).abs().max() < close
