"""common/cli.py: the arguments of a script, from flags and a YAML file, and its --help."""

from dataclasses import dataclass, field

import pytest

from common.cli import parse_args


@dataclass
class Arguments:
    name: str = field(metadata={"help": "a required argument"})
    count: int = field(default=3, metadata={"help": "a number"})
    strategy: str = field(
        default="majority_vote",
        metadata={"help": "a name", "choices": ["greedy", "majority_vote", "weighted_vote"]},
    )
    limit: int | None = field(default=None, metadata={"help": "all if not given"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output"})
    shuffle: bool = field(default=True, metadata={"help": "shuffle the rows"})


@dataclass
class Inherited:
    learning_rate: float = field(default=0.1, metadata={"help": "of a library"})
    seed: int = field(default=0, metadata={"help": "of a library"})


Inherited.__module__ = "transformers.training_args"


@dataclass
class Trained(Inherited):
    learning_rate: float = field(default=0.2, metadata={"help": "of this project"})


HELP = """\
usage: train.py dpo --name ... [--config FILE.yaml] [arguments]

A test.

options:
  -h, --help            show this help message and exit
  --name NAME           a required argument
  --count COUNT         a number (default: 3)
  --strategy STRATEGY   a name (one of greedy, majority_vote, weighted_vote;
                        default: majority_vote)
  --limit LIMIT         all if not given
  --overwrite [true|false]
                        replace the output (default: False)
  --shuffle [true|false]
                        shuffle the rows (default: True)
  --no_shuffle          the same as --shuffle false
  --learning_rate LEARNING_RATE
                        of this project (default: 0.2)

arguments of TRL and transformers:
  --seed SEED           of a library (default: 0)

Flags override the arguments in a --config file.
"""


def parse(*args: str):
    (parsed,) = parse_args(Arguments, description="A test.", args=list(args))
    return parsed


def test_help_is_short_and_shows_the_arguments_of_this_project_first(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        parse_args(Arguments, Trained, description="A test.", args=["--help"], command="dpo")
    assert stopped.value.code == 0 and capsys.readouterr().out == HELP


def test_a_file_gives_arguments_and_flags_override_it(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("name: from file\ncount: 5\noverwrite: true\nlimit:\n")
    expected = Arguments("from file", 5, overwrite=True)
    assert parse("--config", str(path)) == parse(f"--config={path}") == expected
    assert parse("--count", "7", "--config", str(path)).count == 7
    path.write_text("count: 5\n")
    assert parse("--config", str(path), "--name", "flag") == Arguments("flag", 5)


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        ("count: 5", [], "the following arguments are required: --name"),
        ("name: a\ncount: many", [], "argument --count: invalid int value: 'many'"),
        ("name: a\ncounts: 5", [], "unknown key 'counts'"),
        ("name: a\ncount: [1, 2]", [], "key 'count' takes one value, got a list"),
        ("name: a\nstrategy: beam", [], "argument --strategy: invalid choice: 'beam'"),
        ("name: a", ["--counts", "5"], "unknown argument --counts 5"),
        ("just words", [], "must hold `key: value` lines"),
        ("a: b: c", [], "is not YAML"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, content, args, message):
    (tmp_path / "my.yaml").write_text(content)
    with pytest.raises(SystemExit) as stopped:
        parse("--config", str(tmp_path / "my.yaml"), *args)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_a_missing_file_is_one_line(capsys):
    for args, message in (
        (["--config"], "expected a YAML file"),
        (["--config", "no"], "not found"),
    ):
        with pytest.raises(SystemExit):
            parse("--name", "a", *args)
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
