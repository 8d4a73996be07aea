"""Tables of ranked responses: tables of spreadsheets are read, mistakes have file and line."""

import dataclasses
import gzip

import pytest

from common.errors import RecordError
from reasoning.datasets.ranking import (
    COLUMNS,
    RankedResponse,
    check_groups,
    groups,
    read_answers,
    write_answers,
)

ROWS = [
    RankedResponse(
        "Why?",
        "Step 1: 2 + 3 = 5\nAnswer: 5",
        1,
        "Ann",
        "right",
        "policy-mini",
        0.7,
        0.9,
        3,
        "train",
        "short, clear",
    ),
    RankedResponse("Why?", '<script>alert("x")</script> & <b>bold</b>', 2, "Ann"),
    RankedResponse(
        "Why?",
        "a lone \r and 'quotes', \"more\"; tabs\t, =1+1 and 日本語 🐱\n",
        2,
        "Ann",
        seed=2**62 + 1,
    ),
    RankedResponse("Why?", "  spaces around  "),
]


def test_what_is_written_reads_back(tmp_path):
    write_answers(tmp_path / "answers.csv", ROWS)
    assert read_answers(tmp_path / "answers.csv") == ROWS
    data = (tmp_path / "answers.csv").read_bytes()
    assert data.startswith(",".join(COLUMNS).encode() + b"\n") and b"\r\n" not in data
    write_answers(tmp_path / "again.csv.gz", read_answers(tmp_path / "answers.csv"))
    assert gzip.decompress((tmp_path / "again.csv.gz").read_bytes()) == data
    assert read_answers(tmp_path / "again.csv.gz") == ROWS


def test_nothing_is_written_if_something_cannot_be(tmp_path):
    write_answers(tmp_path / "answers.csv", ROWS)
    before = (tmp_path / "answers.csv").read_bytes()
    with pytest.raises(UnicodeEncodeError):
        write_answers(tmp_path / "answers.csv", [*ROWS, RankedResponse("p", "half a pair: \ud83d")])
    assert (tmp_path / "answers.csv").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_published_three_columns(tmp_path):
    (tmp_path / "answers.csv").write_text(
        'prompt,answer,rank\n"Tell, please",one,2\n"Tell, please","two ""2""\nlines",1\n'
    )
    rows = read_answers(tmp_path / "answers.csv")
    assert rows == [
        RankedResponse("Tell, please", "one", 2),
        RankedResponse("Tell, please", 'two "2"\nlines', 1),
    ]
    check_groups(rows, "answers.csv")
    assert groups(rows) == {("Tell, please", ""): rows}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_as_spreadsheets_write_it(tmp_path, delimiter, quote):
    """A byte-order mark, Windows line ends, 1.0 for 1, a decimal comma, empty rows, another order
    of columns."""
    table = [
        ["Rank", "answer", "prompt", "temperature"],
        ["1.0", "yes", "p", '"0,7"'],
        ["", "no", "p", ""],
        [""] * 4,
    ]
    lines = [
        delimiter.join(cell if cell.startswith('"') else f"{quote}{cell}{quote}" for cell in row)
        for row in table
    ]
    (tmp_path / "answers.csv").write_bytes("\r\n".join([*lines, "", ""]).encode("utf-8-sig"))
    assert read_answers(tmp_path / "answers.csv") == [
        RankedResponse("p", "yes", 1, temperature=0.7),
        RankedResponse("p", "no"),
    ]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("", "answers.csv:1: expected a header"),
        ("question,answer,rank\np,a,1\n", "answers.csv:1: expected a header"),
        ("prompt,answer,rank\n", "answers.csv: no rows"),
        ("prompt,answer,rank,rank\np,a,1,1\n", "answers.csv:1: two columns are called 'rank'"),
        ("prompt,answer,rank,score\np,a,1,.5\n", "answers.csv:1: unknown column 'score'"),
        ("prompt,answer,rank\np,a,1\np,b\n", "answers.csv:3: 2 cells, the header has 3"),
        ('prompt,answer,rank\np,"a\nb",1\np,"c\nd\n', "answers.csv:4: not CSV"),
        ('prompt,answer,rank\np,"a"b,1\n', "answers.csv:2: not CSV"),
        (
            'prompt,answer,rank\np,"a\nb",1\np," \n",2\n',
            "answers.csv:4: column 'answer': expected a text, got an empty one",
        ),
        ("prompt,answer,rank\n ,a,1\n", "answers.csv:2: column 'prompt'"),
        (
            "prompt,answer,rank\np,a,first\n",
            "answers.csv:2: column 'rank': expected a whole number from 1 on or an empty cell",
        ),
        ("prompt,answer,rank\np,a,0\n", "column 'rank'"),
        ("prompt,answer,rank\np,a,-1\n", "column 'rank'"),
        ("prompt,answer,rank\np,a,1.5\n", "column 'rank'"),
        ("prompt,answer,rank\np,a,nan\n", "column 'rank'"),
        ("prompt,answer,rank\np,a,inf\n", "column 'rank'"),
        ("prompt,answer,temperature\np,a,-1\n", "column 'temperature'"),
        ("prompt,answer,top_p\np,a,0\n", "column 'top_p'"),
        ("prompt,answer,seed\np,a,x\n", "column 'seed'"),
    ],
)
def test_mistakes_of_a_row(tmp_path, monkeypatch, table, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answers.csv").write_text(table)
    with pytest.raises(RecordError) as error:
        read_answers("answers.csv")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_another_encoding_is_named(tmp_path):
    (tmp_path / "answers.csv").write_bytes("prompt,answer,rank\np,naïve,1\n".encode("cp1252"))
    with pytest.raises(RecordError, match="not UTF-8"):
        read_answers(tmp_path / "answers.csv")


def ranked(*ranks, prompt="p", ranker="Ann"):
    return [RankedResponse(prompt, f"answer {k}", rank, ranker) for k, rank in enumerate(ranks)]


@pytest.mark.parametrize(
    "ranks",
    [
        (1, 2),
        (2, 1, 3),
        (1, 1),
        (1, 2, 2, 4),
        (4, 2, 2, 1),
        (1, 2, 2, 3),
        (1, 1, 2, 2),
        (1, 1, 3, 3),
    ],
)
def test_ranks_that_are_sound(ranks):
    check_groups(ranked(*ranks), "answers.csv")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (ranked(1, 3, 4), "ranks 1,3,4 by Ann leave one out"),
        (ranked(2, 2, 3), "ranks 2,2,3 by Ann leave one out"),
        (ranked(4, 2, 2, 2), "ranks 2,2,2,4 by Ann"),
        # after a tie neither way of counting
        (ranked(1, 1, 3, 4, 4, 5), "ranks 1,1,3,4,4,5 by Ann"),
        (ranked(1, 2, None), "some of its answers have no rank by Ann"),
        (ranked(1), "has one answer"),
        (ranked(None, ranker=""), "has one answer"),
        (ranked(1, 2) + ranked(1, ranker="Bob"), "one of its answers is ranked by Bob"),
        (ranked(1, 2) + ranked(1, 2)[:1], "the same answer twice by Ann: 'answer 0'"),
        (
            [
                dataclasses.replace(row, split=split)
                for row, split in zip(ranked(1, 2), ("train", "test"), strict=True)
            ],
            "two splits",
        ),
    ],
)
def test_mistakes_of_a_group(rows, message):
    with pytest.raises(RecordError) as error:
        check_groups(ranked(1, 2, prompt="another") + rows, "answers.csv")
    assert str(error.value).startswith("answers.csv: prompt 'p': ") and message in str(error.value)


def test_two_rankers_and_unranked_answers():
    first, second, open_ = (
        ranked(1, 2, 3),
        ranked(3, 2, 1, ranker="Bob"),
        ranked(None, None, prompt="q", ranker=""),
    )
    rows = [*first, *second, *open_]
    check_groups(rows, "answers.csv")
    assert groups(rows) == {("p", "Ann"): first, ("p", "Bob"): second}
