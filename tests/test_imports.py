"""Who may import whom (docs/DESIGN.md): one house, every arrow in one direction."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("reasoning", "reward_model", "search", "trainer", "utils", "evaluation")
# Files in a room that are scripts: run by their path, imported by nobody but other scripts and tests.
SCRIPTS = {
    path
    for path in [
        *ROOT.glob("*.py"),
        *(file for room in ROOMS for file in (ROOT / room).glob("*.py")),
    ]
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
}
FILES = sorted(
    [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).glob("*.py"))]
)

ALLOWED = {  # library room -> what of the house it may import, by prefix
    "reasoning": ["reasoning"],
    "reward_model": ["reward_model", "reasoning"],
    "search": ["search", "reward_model.base", "reasoning"],
    "trainer": ["trainer", "reward_model.base", "reasoning"],
}
EXTRA = {  # a trainer and the encoder of the model it trains; the policy on a server and what asks it
    "remote.py": ["reward_model.openai_client"],
    "prm_trainer.py": ["reward_model.process_reward_model", "reward_model.branches"],
    "reward_trainer.py": ["reward_model.response_reward_model"],
    "step_ppo_trainer.py": ["search.policy"],
    "step_ppo_episodes.py": ["search.policy"],
}
STANDARD_LIBRARY_AND = {"reasoning": {"math_verify", "datasets"}}
ONLY_IN = {  # package -> the files that may import it, besides
    "ctransformers": lambda path: path.name == "tinyllama_reward_model.py",
    "matplotlib": lambda path: path == ROOT / "evaluation/plots.py",
    "trl": lambda path: path.parent.name == "trainer" or path.name == "cli.py" or path in SCRIPTS,
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    names = imports(path)
    for package, may in ONLY_IN.items():
        if package in {name.split(".")[0] for name in names}:
            assert may(path), f"{package} may not be imported here"
    if path in SCRIPTS:
        return
    room = path.parent.name
    house = {name for name in names if name.split(".")[0] in ROOMS and name not in ROOMS}
    scripts = {".".join(script.relative_to(ROOT).with_suffix("").parts) for script in SCRIPTS}
    assert not {name for name in house if name in scripts}, "a library room imports a script"
    if room in ALLOWED:
        allowed = ALLOWED[room] + EXTRA.get(path.name, [])
        strangers = {
            name
            for name in house
            if not any(name == a or name.startswith(a + ".") for a in allowed)
        }
        assert not strangers, f"{room} may not import {strangers}"
    if room == "search":
        assert not any(name.startswith("reasoning.grading") for name in house), (
            "search would know the answers"
        )
    if room in STANDARD_LIBRARY_AND:
        import sys

        outside = {name.split(".")[0] for name in names} - set(ROOMS)
        assert outside <= sys.stdlib_module_names | STANDARD_LIBRARY_AND[room]
