"""The benchmarks: what they compare, on their smallest settings, and the variants' processes."""

import json
import os
from itertools import islice

import pytest

from benchmarks.peers import WAYS, GeneratePolicy
from benchmarks.real import write_right_rollouts
from benchmarks.turns import Variant
from common.errors import UserError
from common.files import ROOT, read_records, write_records
from lm.policy import Policy
from reasoning.problems import problems
from reasoning.records import Problem
from search.tree_search import Rollout, Tree, TreeNode
from tests.helpers.variants import echo

MINI = str(ROOT / "models/policy-mini")


@pytest.mark.process
def test_a_variant_has_its_own_process_and_variables(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    with (
        Variant(echo, 2, variables={"GOMP_SPINCOUNT": "9"}) as double,
        Variant(echo, 3, variables={"GOMP_SPINCOUNT": None}) as triple,
    ):
        assert double.round(4) == {"times": 8, "spins": "9"}
        assert triple.round(4) == {"times": 12, "spins": None}
        assert os.environ["GOMP_SPINCOUNT"] == "5"
        assert double.round(5)["times"] == 10 and len(double.figures) == 2
        assert 0 < double.peak_memory() < 10
        with pytest.raises(UserError, match="no such thing"):
            double.round("mistake")
        with pytest.raises(UserError, match="exit code 7"):
            triple.round("end")


def test_right_samples_are_whole_solutions(tmp_path):
    """Also those of rollouts that began after some steps, each once, at most as many as pairs."""
    first, second, answer = "Step 1: 1 + 1 = 2", "Step 2: 2 + 1 = 3", "Answer: 3"
    nodes = [
        TreeNode((), [Rollout((first, "Answer: 2"), "wrong", 9)]),
        TreeNode((first,), [Rollout((second, answer), "right", 9)] * 2),
        TreeNode((first, second), [Rollout((answer,), "right", 9)]),
    ]
    tree = Tree("1 + 1 + 1", "per_step", "budget", {node.steps: node for node in nodes})
    write_records(tmp_path / "train.jsonl", [Problem("1 + 1 + 1", "3")])
    write_records(tmp_path / "round_1/trees.jsonl.gz", [tree.to_row()])
    write_records(tmp_path / "round_1/pairs.jsonl", [{}, {}])
    write_right_rollouts(tmp_path)
    (row,) = read_records(tmp_path / "round_1/right.jsonl", Problem)
    assert row.steps == [first, second, answer]


@pytest.mark.parametrize("way", WAYS)
def test_generate_stops_where_our_policy_does(way):
    """The probabilities are the same, so the frequencies of first steps are close; each step is one
    line, and each state can be continued."""
    policy, peer = Policy.load(MINI), GeneratePolicy.load(MINI)
    peer.way = way
    states = [policy.start(problem.prompt) for problem in islice(problems("validation"), 3)]
    groups = peer.next_steps(states, 4, seed=1)
    assert [len(group) for group in groups] == [4, 4, 4]
    for state, group in zip(states, groups, strict=True):
        for child in group:
            assert len(child.steps) == 1 and child.ids[: len(state.ids)] == state.ids
            assert child.status == "open" and child.sampled == len(child.ids) - len(state.ids)
            assert policy.start(child.prompt, child.steps).ids == child.ids
    ends = {child.status for group in peer.rollouts(states, 4, seed=1) for child in group}
    assert ends == {"finished"}


def test_a_prefix_read_once_is_read_right():
    """Padded, repeated and continued prefixes give the greedy texts of our decoder."""
    policy, peer = Policy.load(MINI), GeneratePolicy.load(MINI)
    chosen = list(islice(problems("validation"), 6))
    states = [policy.start(p.prompt, p.steps[: k % 3]) for k, p in enumerate(chosen)]
    greedy = [state for (state,) in policy.rollouts(states, temperature=0)]
    almost_zero = peer.rollouts(states, 2, temperature=1e-6)
    assert [{state.ids for state in group} for group in almost_zero] == [
        {state.ids} for state in greedy
    ]


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("name", ["rollouts", "search"])
def test_a_benchmark_writes_what_it_prints(name, run_script, tmp_path):
    small = {
        "rollouts": ["--limit", 1, "--states", 2, "--steps", 2, "--counts", 2],
        "search": ["--limit", 2, "--n", 2, "--beams", 2],
    }
    done = run_script(
        f"benchmarks/{name}.py", *small[name], "--rounds", 1, "--output_dir", tmp_path / "out"
    )
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "out").glob("*.json")
    metrics = json.loads(path.read_text())["metrics"]
    assert all(metric["value"] >= 0 for metric in metrics.values())
    if name == "rollouts":
        assert "ours over generate, prefix once/steps/2" in metrics
        assert "llama.cpp, Q8_0/samples/2/tokens_a_second" in metrics
    else:
        assert {cell.split("/")[0] for cell in metrics} == {
            *("ours", "batched", "generate", "one at a time")
        }
        assert metrics["batched/accuracy"] == metrics["ours/accuracy"]
        assert "are those of ours in every round" in done.stdout


@pytest.mark.process
def test_judge_backends_keeps_other_files_and_refuses_what_is_not_its_own(run_script, tmp_path):
    judge = ROOT / "models/judge-mini/judge-mini.Q8_0.gguf"
    small = ["--files", judge, "--engines", "seed", "gguf", "llamacpp", "--rounds", 1]
    output = tmp_path / "out/judge_backends.json"
    output.parent.mkdir()
    output.write_text("[1]")
    command = ["benchmarks/judge_backends.py", *small, "--output_dir", output.parent]
    refused = run_script(*command)
    assert refused.returncode == 2 and "is no result of this script" in refused.stderr
    other = {"value": 1.0, "ci95": None, "n": 1}
    output.write_text(json.dumps({"metrics": {"other/gguf/memory_gb": other}, "config": {}}))
    done = run_script(*command)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(output.read_text())["metrics"]
    assert metrics["other/gguf/memory_gb"] == other
    name = "judge-mini.Q8_0"
    assert metrics[f"{name}/seed/times_seed"]["value"] == 1
    assert metrics[f"{name}/llamacpp/max_difference"]["value"] < 0.05
    assert metrics[f"{name}/gguf/max_difference"] == {"value": 0.0, "ci95": None, "n": 60}
    before = output.read_bytes()
    again = run_script(*command)
    assert again.returncode == 2 and "--overwrite replaces them" in again.stderr
    assert output.read_bytes() == before


def test_a_made_file_leaves_a_real_model_of_that_name_alone(monkeypatch, tmp_path):
    """A folder of models may hold the real TinyLlama under the name of the one that is made."""
    from benchmarks import judge_backends

    own = tmp_path / judge_backends.NAME / "model.safetensors"
    own.parent.mkdir()
    own.write_text("weights")

    def make_file(folder, layers, quantization):
        (folder / judge_backends.NAME).mkdir()
        made = folder / f"{judge_backends.NAME}.{quantization}.gguf"
        made.write_text("made")
        return made, {}

    monkeypatch.setattr(judge_backends, "make_file", make_file)
    path = judge_backends.made_file(tmp_path, "Q4_0")
    assert path.read_text() == "made" and own.read_text() == "weights"
    assert {item.name for item in tmp_path.iterdir()} == {path.name, judge_backends.NAME}
