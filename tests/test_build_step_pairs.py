"""utils/build_step_pairs.py: its files, its refusals, a search of its own, and a training."""

import json
from itertools import islice
from pathlib import Path

import pytest

from common.files import read_records, read_rows, write_records
from reasoning.grading import grade_steps
from reasoning.problems import problems
from reasoning.records import Problem, ScoredPair
from search.tree_search import UNKNOWN, Rollout, Tree, TreeNode
from tests.helpers import scripts
from tests.helpers.mains import call_main
from utils import build_step_pairs

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "utils/build_step_pairs.py"
PROBLEMS = list(islice(problems("train"), 12))
SMALL = ("--rollouts_per_state", 4, "--budget", 16, "--max_new_tokens", 90)


def made_tree(problem: Problem, outcomes: tuple[str, str] = ("right", "wrong")) -> Tree:
    """Three rollouts follow the reference; three others begin with each of two wrong steps."""
    tree = Tree(problem.prompt, "per_step", "budget")
    solutions = [(tuple(problem.steps), outcomes[0])]
    solutions += [((f"Step 1: 1 + {k} = {k}", f"Answer: {k}"), outcomes[1]) for k in (3, 4)]
    rollouts = [Rollout(steps, outcome, 20) for steps, outcome in solutions for _ in range(3)]
    tree.nodes[()] = TreeNode((), rollouts)
    return tree


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Call the script's main in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        main = build_step_pairs.main
        return call_main(main, *arguments, monkeypatch=monkeypatch, capsys=capsys)

    return run


def test_the_pairs_of_made_trees_and_the_table(call):
    write_records("trees.jsonl.gz", [made_tree(problem).to_row() for problem in PROBLEMS[:3]])
    given = ("--from_trees", "trees.jsonl.gz")
    code, printed, error = call(*given, "--output", "out/pairs.jsonl.gz", "--limit", 2)
    assert code == 0, error
    pairs = list(read_records("out/pairs.jsonl.gz", ScoredPair))
    right = [problem.steps[:1] for problem in PROBLEMS[:2] for _ in range(2)]
    assert [pair.chosen for pair in pairs] == right
    assert [pair.rejected for pair in pairs] == [["Step 1: 1 + 3 = 3"], ["Step 1: 1 + 4 = 4"]] * 2
    assert all((p.prefix, p.chosen_scores, p.rejected_scores) == ([], [1], [0]) for p in pairs)
    single = sum(len(problem.steps) - 1 for problem in PROBLEMS[:2]) + 4
    table = {tuple(line.rsplit(maxsplit=1)) for line in printed.splitlines() if "  " in line}
    assert {
        ("trees", "2"),
        ("states", str(2 + single)),
        ("  with pairs", "2"),
        ("  one next step only", str(single)),
        ("pairs", "4"),
        ("pairs a state", "2.00"),
        ("mean gap", "1.000"),
    } == table
    assert "wrote 4 pairs to out/pairs.jsonl.gz" in printed and "--pack siblings" in printed
    assert sorted(path.name for path in Path("out").iterdir()) == ["pairs.jsonl.gz"]

    code, _, error = call(*given, "--output", "out/pairs.jsonl.gz")
    assert code == 2 and "--overwrite" in error
    code, _, error = call(*given, "--output", "out/pairs.jsonl.gz", "--overwrite", "--kind", "rest",
                          "--per_state", 1)  # fmt: skip
    assert code == 0, error
    (first, *_), length = read_records("out/pairs.jsonl.gz", ScoredPair), len(PROBLEMS[0].steps)
    assert first.chosen == PROBLEMS[0].steps and first.chosen_scores == [1] * length
    assert first.rejected == ["Step 1: 1 + 3 = 3", "Answer: 3"]
    assert first.rejected_scores == [0, 0]


def test_siblings_of_a_state_in_two_trees_stay_together(call):
    other = made_tree(PROBLEMS[0])
    other.nodes[()].rollouts[-3:] = [Rollout(("Step 1: 9", "Answer: 9"), "wrong", 20)] * 3
    trees = [made_tree(PROBLEMS[0]), made_tree(PROBLEMS[1]), other]
    write_records("trees.jsonl", [tree.to_row() for tree in trees])
    assert call("--from_trees", "trees.jsonl", "--output", "pairs.jsonl")[0] == 0
    pairs = list(read_records("pairs.jsonl", ScoredPair))
    prompts = [PROBLEMS[0].prompt] * 3 + [PROBLEMS[1].prompt] * 2
    assert [pair.prompt for pair in pairs] == prompts
    assert [pair.rejected[0][-1] for pair in pairs[:3]] == ["3", "4", "9"]  # none of them twice


def test_the_exact_judge_orders_trees_without_outcomes(call):
    """The values of these trees are unknown; the checker knows which step is right."""
    trees = [made_tree(problem, (UNKNOWN, UNKNOWN)).to_row() for problem in PROBLEMS]
    write_records("trees.jsonl", trees)
    given = ("--from_trees", "trees.jsonl", "--output", "pairs.jsonl")
    code, _, error = call(*given)
    assert code == 2 and "trees.jsonl" in error and "searched without answers" in error
    assert not Path("pairs.jsonl").exists()
    for kind in build_step_pairs.KINDS:
        more = ("--pair_by", "judge", "--judge", "exact", "--kind", kind, "--overwrite")
        code, _, error = call(*given, *more)
        assert code == 0, error
        by_prompt = {problem.prompt: problem for problem in PROBLEMS}
        pairs = list(read_records("pairs.jsonl", ScoredPair))
        assert len(pairs) == 2 * len(PROBLEMS)
        for pair in pairs:
            assert pair.chosen_scores == grade_steps(pair.chosen, by_prompt[pair.prompt])
            assert pair.rejected_scores == grade_steps(pair.rejected, by_prompt[pair.prompt])
            assert min(pair.chosen_scores) > max(pair.rejected_scores)


TREE = json.dumps(made_tree(PROBLEMS[0]).to_row())
HELD_OUT = json.loads((ROOT / "data/problems_hard.jsonl").read_text().splitlines()[7])
POLICY = ("--model_name_or_path", ROOT / "models/policy-mini")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--from_trees", "nowhere.jsonl"], "nowhere.jsonl not found: run"),
        (["--from_trees", "empty.jsonl"], "no rows"),
        (["--from_trees", "pairs.jsonl"], "pairs.jsonl:1: no search tree"),
        (["--from_trees", "torn.jsonl"], "torn.jsonl:2: not JSON"),
        (["--from_trees", "held_out.jsonl"], "held-out"),
        ([*POLICY, "--input", "held_out_problems.jsonl"], "held-out"),
        ([*POLICY, "--input", "nowhere.jsonl"], "nowhere.jsonl not found"),
        ([*POLICY, "--from_trees", "trees.jsonl"], "--from_trees: not with"),
        ([*POLICY, "--trees", "o.jsonl"], "are the same file"),
        ([*POLICY, "--trees", "trees.jsonl"], "--overwrite"),
        ([*POLICY, "--budget", 15], "--budget: 15 rollouts are not enough"),
        ([*POLICY, "--pair_by", "judge", "--search", "omegaprm"], "omegaprm needs answers"),
        (["--model_name_or_path", "."], "is no model directory"),
        (["--input", "problems.jsonl"], "--input: needs --model_name_or_path"),
        (["--trees", "more.jsonl"], "--trees: needs --model_name_or_path"),
        (["--temperature", 0.5], "--temperature: needs --model_name_or_path"),
        (["--policy_base_url", "http://x"], "--policy_base_url: needs --model_name_or_path"),
        (["--kind", "tree"], "--kind"),
        (["--min_gap", 0], "--min_gap: expected above 0 to 1"),
        (["--min_gap", 1.5], "--min_gap: expected above 0 to 1"),
        (["--min_rollouts", 0], "--min_rollouts: expected 1 or more"),
        (["--per_state", 0], "--per_state: expected 1 or more"),
        (["--limit", 0], "--limit: expected 1 or more"),
        (["--judge", "prm"], "with --pair_by judge only"),
        (["--pair_by", "judge", "--min_rollouts", 3], "--min_rollouts: a judge's score"),
        (["--pair_by", "judge", "--judge_path", "none.gguf"], "none.gguf not found"),
        (["--from_trees", "trees.jsonl", "--output", "trees.jsonl"], "would replace trees.jsonl"),
        (["--from_trees", "trees.jsonl", "--min_rollouts", 4], "no pairs (see above)"),
        (["--from_trees", "always.jsonl"], "no pairs (see above)"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(call, args, message):
    files = {
        "trees.jsonl": TREE,
        "empty.jsonl": "",
        "torn.jsonl": f"{TREE}\n{{",
        "pairs.jsonl": "[1]",
    }
    files["held_out.jsonl"] = json.dumps(
        Tree(HELD_OUT["prompt"], "per_step", "always right").to_row()
    )
    files["held_out_problems.jsonl"] = json.dumps(HELD_OUT)
    files["always.jsonl"] = json.dumps(made_tree(PROBLEMS[0], ("right", "right")).to_row())
    for name, text in files.items():
        Path(name).write_text(text + "\n" * bool(text))
    output = [] if "--output" in args else ["--output", "o.jsonl"]
    code, printed, error = call(*args, *output)
    stage = ("pairing: ", "\n")  # it ended, and the error comes after it
    lines = [line for line in error.splitlines(keepends=True) if not line.startswith(stage)]
    assert code == 2 and message in lines[-1] and len(lines) == 1, error
    assert {path.name: path.read_text() for path in Path().iterdir()} == {
        name: text + "\n" * bool(text) for name, text in files.items()
    }
    if "no pairs" in message:
        why = "no worse sibling" if "always.jsonl" in args else "too few rollouts"
        assert f"  {why}  " in printed


@pytest.mark.process
@pytest.mark.parametrize("kind", build_step_pairs.KINDS)
def test_train_py_trains_on_the_pairs_as_they_are(run_script, tiny_model_dir, tmp_path, kind):
    write_records(tmp_path / "trees.jsonl", [made_tree(p).to_row() for p in PROBLEMS])
    given = ("--from_trees", "trees.jsonl", "--output", "pairs.jsonl", "--kind", kind)
    done = run_script(SCRIPT, *given)
    assert done.returncode == 0, done.stderr
    more = ("--model_name_or_path", tiny_model_dir, "--output_dir", "tuned", "--logs_dir", "logs")
    more += ("--max_steps", 1, "--logging_steps", 1, "--save_strategy", "no")
    done = run_script(
        "train.py", "--dataset_name", "pairs.jsonl", "--pack", "siblings", "--bf16", "false", *more
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tuned/model.safetensors").is_file()


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> tuple[Path, str]:
    """(folder, what was printed): policy-mini's trees and pairs of the train problems."""
    folder = tmp_path_factory.mktemp("searched")
    given = (*POLICY, *SMALL, "--limit", 12, "--output", "pairs.jsonl")
    done = scripts.run_script(SCRIPT, *given, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.process
def test_a_policy_searches_and_its_trees_are_written_too(searched, run_script, tmp_path):
    folder, printed = searched
    assert sorted(path.name for path in folder.iterdir()) == ["pairs.jsonl", "pairs.trees.jsonl.gz"]
    trees, pairs = folder / "pairs.trees.jsonl.gz", list(read_rows(folder / "pairs.jsonl"))
    assert f"wrote {len(pairs)} pairs to pairs.jsonl" in printed and "12 problems: " in printed
    assert "wrote 12 trees to pairs.trees.jsonl.gz" in printed
    prompts = [problem.prompt for problem in PROBLEMS]
    assert [tree.prompt for tree in read_records(trees, Tree)] == prompts

    # the same pairs from the trees; the same trees from the script for step values
    done = run_script(SCRIPT, "--from_trees", trees, "--output", "again.jsonl")
    assert done.returncode == 0 and list(read_rows(tmp_path / "again.jsonl")) == pairs
    more = (*POLICY, *SMALL, "--limit", 12, "--search", "per_step", "--trees", "t.jsonl.gz")
    done = run_script("utils/build_mcts_dataset.py", *more, "--output", "values.jsonl")
    assert done.returncode == 0, done.stderr
    assert list(read_rows(tmp_path / "t.jsonl.gz")) == list(read_rows(trees))


@pytest.mark.process
def test_the_pairs_give_back_the_ids_that_were_sampled(searched, run_script, tmp_path):
    """The trees hold texts; for policy-mini their ids are those of the samples.

    The rollouts are sampled again, with the seed of the search, and compared."""
    from lm.policy import Policy
    from trainer.stepwise_dpo_trainer import encode_pair

    folder, _ = searched
    policy = Policy.load(str(ROOT / "models/policy-mini"))
    trees = {tree.prompt: tree for tree in read_records(folder / "pairs.trees.jsonl.gz", Tree)}
    pairs = [row for _, row in read_rows(folder / "pairs.jsonl")]
    assert pairs
    for row in pairs:
        tree = trees[row["prompt"]]
        ids = {}
        for steps in tree.nodes:  # the same states, seed and numbers of samples
            for whole in policy.rollouts([policy.start(tree.prompt, steps)], 4, 1.0, 90, 0)[0]:
                ids |= {whole.steps[:k]: list(whole.first(k).ids) for k in range(len(whole.steps))}
                ids.setdefault(whole.steps, list(whole.ids))
        encoded = encode_pair(row, policy.tokenizer, None, "keep_start")
        for name in ("chosen", "rejected"):
            state = (*row["prefix"], *row[name])
            assert encoded["prompt_ids"] + encoded[f"{name}_ids"] == ids[state]


@pytest.mark.process
def test_a_judge_needs_no_answers(run_script, tmp_path):
    """The PRM picks among the samples of two prompts that have no answer, then the search goes on
    from where it was."""
    prompts = [{"prompt": problem.prompt} for problem in PROBLEMS[2:5]]
    write_records(tmp_path / "prompts.jsonl", prompts)
    given = (*POLICY, *SMALL, "--input", "prompts.jsonl", "--output", "pairs.jsonl")
    given += ("--pair_by", "judge", "--judge", "prm")
    done = run_script(SCRIPT, *given, "--min_gap", 1)
    assert done.returncode == 2 and "gap too small" in done.stdout
    assert "pairs.trees.jsonl.gz.partial keeps the trees" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "pairs.jsonl").exists()
    done = run_script(SCRIPT, *given)
    assert done.returncode == 0 and "resuming: 3 of 3 problems are done" in done.stdout
    trees = read_records(tmp_path / "pairs.trees.jsonl.gz", Tree)
    assert {rollout.outcome for tree in trees for rollout in tree.rollouts} == {UNKNOWN}
    pairs = list(read_records(tmp_path / "pairs.jsonl", ScoredPair))
    assert pairs and all(p.chosen_scores[0] - p.rejected_scores[0] >= 0.5 for p in pairs)
    for script in ("utils/build_mcts_dataset.py", "utils/show_tree.py"):
        flag = "--from_trees" if "mcts" in script else "--trees"
        more = ("--output", "values.jsonl") if "mcts" in script else ()
        done = run_script(script, flag, "pairs.trees.jsonl.gz", *more)
        assert done.returncode == 2 and "searched without answers" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pairs.jsonl", "pairs.trees.jsonl.gz", "prompts.jsonl"
    ]  # fmt: skip
