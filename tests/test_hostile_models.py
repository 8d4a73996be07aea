"""Models of strangers: their code is never run, and only safetensors are read."""

import ast
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from common.errors import ModelError, UserError
from common.files import ROOT, write_records
from lm.gguf_export import export_gguf
from lm.loading import load_model
from reward_model.process_reward_model import load_prm
from reward_model.response_reward_model import load_reward_model
from tests.helpers.reward_models import make_llama, make_prm
from tests.helpers.training import make_pairs
from trainer.checkpoints import checkpoint_to_resume

MARKER = "the_code_was_run"
CODE = f"open({MARKER!r}, 'w').close()\nraise ImportError('this code was run')\n"
PROMPT = {"prompt": "Mia has 2 apples. She buys 3. How many apples does Mia have now?"}
JUDGE_AT = ["inference.py", "--prompt", "2 + 3?", "--show_scores", "--judge"]
EVALUATE = [
    "reward_model/evaluate_steps.py",
    "--input",
    "pairs.jsonl",
    "--output",
    "out",
    "--judge",
]
TRAIN = {
    "dpo": "pairs.jsonl",
    "sft": "pairs.jsonl",
    "prm": "values.jsonl",
    "ppo": "values.jsonl",
    "reward": "pairs.jsonl",
}
TRAININGS = [
    ["train.py", command, "--dataset_name", data, "--output_dir", "out", "--logs_dir", "logs",
     "--model_name_or_path"]
    for command, data in TRAIN.items()
]  # fmt: skip
# every way to give a model to a script; the model comes last
COMMANDS = [
    *TRAININGS,
    [*TRAININGS[3][:-1], "--judge", "hf", "--judge_path"],
    ["inference.py", "--prompt", "2 + 3?", "--model_name_or_path"],
    [*JUDGE_AT, "hf", "--judge_path"],
    [*JUDGE_AT, "prm", "--judge_path"],
    [*JUDGE_AT, "response", "--judge_path"],
    ["inference.py", "--prompt", "2 + 3?", "--search", "best_of_n", "--scorer"],
    [*EVALUATE, "hf", "--judge_path"],
    [*EVALUATE, "prm", "--judge_path"],
    [*EVALUATE, "response", "--judge_path"],
    ["reward_model/score_responses.py", "score", "--input", "answers.csv", "--output", "out.csv",
     "--scorer"],
    ["utils/build_synthetic_dataset.py", "--limit", "1", "--output", "out", "--model_name_or_path"],
    ["utils/build_mcts_dataset.py", "--limit", "1", "--output", "out", "--model_name_or_path"],
    ["utils/build_step_pairs.py", "--limit", "1", "--output", "out", "--model_name_or_path"],
    ["utils/build_ranked_responses.py", "--limit", "1", "--output", "out.csv",
     "--model_name_or_path"],
    ["utils/add_surprisal_layers.py", "--output", "out", "--model_name_or_path"],
    ["utils/export_gguf.py", "--output", "out.gguf", "--model_name_or_path"],
    ["evaluation/eval_reward_scores.py", "--limit", "1", "--output_dir", "out", "--base_model"],
    ["evaluation/eval_reward_scores.py", "--limit", "1", "--output_dir", "out", "--tuned_model"],
    ["evaluation/eval_judge.py", "--limit", "1", "--output_dir", "out", "--model_name_or_path"],
    ["evaluation/eval_search.py", "--limit", "1", "--choose_limit", "1", "--output_dir", "out",
     "--model_name_or_path"],
    ["evaluation/eval_response_reward.py", "--limit", "1", "--output_dir", "out", "--scorer"],
    ["benchmarks/rollouts.py", "--limit", "1", "--model_name_or_path"],
    ["benchmarks/search.py", "--limit", "1", "--model_name_or_path"],
]  # fmt: skip


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def without_architecture(folder: Path) -> None:
    """transformers has no class for it: only its own code can load it."""
    names = {"AutoConfig": "EvilConfig", "AutoTokenizer": ["EvilTokenizer", "EvilTokenizer"]}
    heads = ("CausalLM", "SequenceClassification", "TokenClassification")
    names |= {f"AutoModelFor{head}": "EvilModel" for head in heads}
    code = {
        key: f"evil.{name}" if isinstance(name, str) else [f"evil.{part}" for part in name]
        for key, name in names.items()
    }
    (folder / "evil.py").write_text(CODE)
    change(folder / "config.json", model_type="evil", auto_map=code)
    tokenizer = {"tokenizer_class": "EvilTokenizer", "auto_map": code}
    change(folder / "tokenizer_config.json", **tokenizer)


def with_pickled_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.fixture(scope="module")
def world(tiny_model_dir, tmp_path_factory) -> Path:
    """A folder with data, and each kind of model as its own code and as pickled weights."""
    folder = tmp_path_factory.mktemp("hostile")
    write_records(folder / "pairs.jsonl", make_pairs(30))
    values = [
        {"prompt": row["prompt"], "prefix": row["prefix"], "step": row["chosen"][0], "score": 0.5}
        for row in make_pairs(30)
    ]
    write_records(folder / "values.jsonl", values)
    (folder / "answers.csv").write_text("prompt,answer\nWhat?,a\nWhat?,b\n")
    makers = {"prm": make_prm, "response": make_llama}
    for name in ("lm", *makers):
        if name in makers:
            makers[name](tiny_model_dir, folder / name)
        else:
            shutil.copytree(tiny_model_dir, folder / name)
        for kind, spoil in (("code", without_architecture), ("bin", with_pickled_weights)):
            spoil(Path(shutil.copytree(folder / name, folder / f"{name}-{kind}")))
    return folder


def kind_of(command: list[str]) -> str:
    """The kind of model that a command takes."""
    if "prm" in command[2:]:
        return "prm"
    return "response" if "response" in command or command[-1] == "--scorer" else "lm"


def assert_refused(done, folder: Path) -> None:
    assert not (folder / MARKER).exists(), "code of the model was run"
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    errors = [line for line in done.stderr.splitlines() if ": error: " in line]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr[-2000:]
    # eval_search.py keeps what it has measured, here nothing
    written = [path for path in folder.glob("out*/*") if path.name != "search.jsonl"]
    assert not written and not any(path.is_file() for path in folder.glob("out*"))


def name_of(command: list[str]) -> str:
    return "-".join(part.strip("-") for part in [*command[:2], *command[-3:]])


LOADERS = {
    "lm": [lambda path: load_model(path, "float32"), lambda path: export_gguf(path, "out.gguf")],
    "prm": [lambda path: load_prm(path, "float32")],
    "response": [lambda path: load_reward_model(path, "float32")],
}


@pytest.mark.parametrize("kind", LOADERS)
def test_every_loader_refuses_code_and_pickles(world, tmp_path, monkeypatch, kind):
    """A "y" waits on the standard input, with which transformers would run the code."""
    monkeypatch.chdir(tmp_path)
    for load in LOADERS[kind]:
        for spoiled, message in (("code", "contains custom code"), ("bin", "no others are read")):
            monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
            with pytest.raises(UserError, match=message) as error:
                load(str(world / f"{kind}-{spoiled}"))
            assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_code_of_a_model_that_transformers_knows_is_not_run(world, tmp_path, monkeypatch):
    """Neither is that of its own way to generate."""
    folder = Path(shutil.copytree(world / "lm", tmp_path / "model"))
    (folder / "evil.py").write_text(CODE)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(CODE)
    code = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    change(folder / "config.json", auto_map=code)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.A", "evil.B"]})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    model, _ = load_model(str(folder), torch.float32)
    model.generate(torch.tensor([[1]]), max_new_tokens=1)
    assert type(model).__name__ == "LlamaForCausalLM" and not Path(MARKER).exists()


def test_an_adapter_brings_no_code_and_no_pickles(world, tmp_path, monkeypatch):
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(world / "lm", trust_remote_code=False)
    folder = tmp_path / "adapter"
    get_peft_model(base, lora).save_pretrained(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    for name, message in (
        (world / "lm-code", "contains custom code"),
        (world / "lm-bin", "no others are read"),
        (folder, "is an adapter too"),
    ):
        change(folder / "adapter_config.json", base_model_name_or_path=str(name))
        with pytest.raises(ModelError, match=message):
            load_model(str(folder), "float32")
    for kind, load in (("CAUSAL_LM", load_model), ("SEQ_CLS", load_reward_model)):
        config = {"base_model_name_or_path": str(world / "lm"), "task_type": kind}
        change(folder / "adapter_config.json", **config)
        if kind == "CAUSAL_LM":
            load(str(folder), "float32")
            weights = folder / "adapter_model.safetensors"
            torch.save(load_file(weights), folder / "adapter_model.bin")
            weights.unlink()
        with pytest.raises(ModelError, match="safetensors is missing"):
            load(str(folder), "float32")
    assert not Path(MARKER).exists()


def test_safetensors_come_before_pickles(world, tmp_path):
    folder = Path(shutil.copytree(world / "lm", tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    torch.save(zeros, folder / "pytorch_model.bin")
    model, _ = load_model(str(folder), torch.float32)
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/x.safetensors", "pytorch_model.bin", 7])
def test_shards_are_safetensors_of_the_same_folder(world, tmp_path, shard):
    """An index may name any file; transformers would read it, a pickle too."""
    folder = Path(shutil.copytree(world / "lm", tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    save_file(weights, tmp_path / "x.safetensors", {"format": "pt"})
    torch.save(weights, folder / "pytorch_model.bin")
    index = folder / "model.safetensors.index.json"
    content = {"metadata": {}, "weight_map": dict.fromkeys(weights, "part.safetensors")}
    index.write_text(json.dumps(content))
    assert load_model(str(folder), "float32")
    content["weight_map"][min(weights)] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="expected safetensors in its own folder"):
        load_model(str(folder), "float32")


def test_the_config_names_no_pickle(world, tmp_path):
    folder = Path(shutil.copytree(world / "lm", tmp_path / "model"))
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    change(folder / "config.json", transformers_weights="adapter_model.bin")
    with pytest.raises(ModelError, match="expected safetensors in its own folder"):
        load_model(str(folder), "float32")
    weights.rename(folder / "mine.safetensors")
    change(folder / "config.json", transformers_weights="mine.safetensors")
    assert load_model(str(folder), "float32")


def test_every_call_says_that_no_code_may_run():
    """Where a call says nothing, transformers asks on the terminal."""
    safe = {"PeftModel", "GenerationConfig"}  # they have no such argument and run no code
    silent, calls = [], 0
    for path in ROOT.glob("**/*.py"):
        where = path.relative_to(ROOT)
        if where.parts[0] in ("tests", ".venv"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = getattr(node.func.value, "id", "")
            if node.func.attr in ("from_pretrained", "from_config") and owner not in safe:
                calls += 1
                if not any(keyword.arg == "trust_remote_code" for keyword in node.keywords):
                    silent.append(f"{where}:{node.lineno}")
    assert calls > 3 and not silent


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("spoiled", ["code", "bin"])
@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_every_script_refuses_code_and_pickles(world, run_script, tmp_path, command, spoiled):
    """A "y" waits on the standard input, with which transformers would run the code."""
    for name in ("pairs.jsonl", "values.jsonl", "answers.csv"):
        shutil.copy(world / name, tmp_path)
    model = world / f"{kind_of(command)}-{spoiled}"
    done = run_script(*command, model, cwd=tmp_path, input="y\n" * 9)
    assert_refused(done, tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "adapter_model.bin", "ref/x.bin", ""])
def test_a_checkpoint_of_pickles_is_refused(tmp_path, file):
    checkpoint = tmp_path / "checkpoint-1"
    (checkpoint / "ref").mkdir(parents=True)
    for name in ("trainer_state.json", "training_args.bin", file or "optimizer.pt"):
        (checkpoint / name).write_text("{}")
    if file:
        (checkpoint / "model.safetensors").touch()
    with pytest.raises(UserError, match="no other weights are read"):
        checkpoint_to_resume(tmp_path / "out", {}, False, str(checkpoint))
    if file:
        (checkpoint / file).unlink()
    (checkpoint / "model.safetensors").touch()
    assert checkpoint_to_resume(tmp_path / "out", {}, False, str(checkpoint)) == checkpoint
