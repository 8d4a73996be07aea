"""The judge on a server: against recorded answers on loopback, and against a real server."""

import gzip
import itertools
import json
import math
import socket
import subprocess
import sys
import time
import traceback

import pytest

from common.errors import JudgeError, ServerError, UserError
from reward_model import evaluate_steps
from reward_model.judges.hf import HFJudge
from reward_model.judges.openai import OpenAIJudge
from reward_model.templates import CHAT, PLAIN
from tests.helpers.mains import call_main
from tests.helpers.scripts import ROOT
from tests.helpers.servers import (
    FAILURES,
    STAND_INS,
    SURE,
    Server,
    chat,
    completion,
    error,
    openai_api,
    transformers_serve,
)
from tests.helpers.solutions import PROMPT, STEPS
from utils import build_synthetic_dataset

FOUR = [(f"Problem {k}", ["Answer: 1"]) for k in range(4)]


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server() as server:
        yield server


def judge(server: Server, **arguments) -> OpenAIJudge:
    return OpenAIJudge(server.url, "some-model", **{"max_retries": 0, "timeout": 10.0, **arguments})


# --- log-probs


def test_probabilities_over_all_spellings(server):
    places = {"Yes": 0.5, " yes": 0.1, "No": 0.15, "NO": 0.05, "Maybe": 0.2}
    server.answer = lambda number, body: chat("Yes", places)
    assert judge(server).score_steps([(PROMPT, STEPS[:1])]) == [[0.75]]
    (request,) = server.requests
    assert request.pop("max_tokens") < 10
    content = f"Problem: {PROMPT}\nSolution:\n{STEPS[0]}\n{CHAT.question}"
    assert request == {
        "path": "/v1/chat/completions",
        "model": "some-model",
        "key": "Bearer none",
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 20,
    }


def test_a_base_model_completes_the_plain_text(server):
    server.answer = lambda number, body: completion(" Yes", {" Yes": 0.6, " No": 0.2})
    assert judge(server, template="plain").score_steps([(PROMPT, STEPS)]) == [[0.75, 0.75, 0.75]]
    before = PLAIN.before.format(prompt=PROMPT)
    lines = ["".join(f"{step}\n" for step in STEPS[: k + 1]) for k in range(3)]
    texts = {f"{before}{text}Right?" for text in lines}
    assert {request["prompt"] for request in server.requests} == texts
    assert {request["path"] for request in server.requests} == {"/v1/completions"}


def test_the_answer_may_begin_with_something_else(server):
    places = {'"': 0.9, "`": 0.1}, {"No": 0.8, "Yes": 0.2}, {'"': 1.0}
    server.answer = lambda number, body: chat('"No"', *places)
    assert judge(server).score_steps([(PROMPT, STEPS[:1])]) == [[0.2]]


def test_skipped_steps_are_not_asked_about_and_shared_prefixes_once(server):
    def answer(number, body):
        no = 0.4 if "48" in body["messages"][0]["content"] else 0.2
        return chat("Yes", {"Yes": 0.6, "No": no})

    server.answer = answer
    other = [*STEPS[:2], "Answer: 47"]
    solutions = [(PROMPT, STEPS), (PROMPT, other), (PROMPT, []), (PROMPT, STEPS)]
    scores = judge(server).score_steps(solutions, skip=[0, 1, 0, 3])
    assert scores == [[0.75, 0.6, 0.6], [0.6, 0.6], [], []]
    assert len(server.requests) == 4


@pytest.mark.parametrize("name", STAND_INS)
def test_servers_that_answer_and_refuse_as_documented(server, name):
    answer, template, score, (first, second) = STAND_INS[name]
    server.answer = lambda number, body: answer(body)
    asked = judge(server, template=template, samples=3)
    assert asked.score_steps(FOUR[:1]) == [[score]]
    assert len(server.requests) == first
    assert asked.score_steps(FOUR[1:2]) == [[score]]  # what was refused is not asked again
    assert len(server.requests) == first + second


def test_what_a_server_refuses_is_said_once(server, capsys):
    server.answer = lambda number, body: openai_api(body, most=5, reasons="logprobs" not in body)
    assert judge(server).score_steps(FOUR) == [[0.8]] * 4
    assert capsys.readouterr().err == f"judge {server.url} gives 5 log-probs a token at most\n"


PLACES = [  # the tokens that are chosen, each with its listed words, and the score
    # the same verdict in many clothes: .9 and .1 at its place, and misleading places around it
    ([{"Yes": 0.9, "No": 0.1}], 0.9),
    ([{" yes": 0.6, "YES": 0.3, " No": 0.05, "no.": 0.05}], 0.9),
    ([{"**": 0.9, "No": 0.0001}, {"Yes": 0.9, "No": 0.1}, {"**": 1.0}], 0.9),
    ([{'"': 0.9, "No": 0.1}, {"Yes": 0.9, "No": 0.1}, {'"': 1.0}], 0.9),
    ([{"\n\n": 0.99, "No": 0.01}, {"Yes": 0.9, "No": 0.1}], 0.9),
    ([{"The": 0.99, "No": 0.01}, {" answer": 1.0}, {" is": 1.0}, {" Yes": 0.9, " No": 0.1}], 0.9),
    ([{"Verdict": 0.9, "Yes": 0.1}, {":": 1.0}, {" No": 0.9, " Yes": 0.1}], 0.1),
    ([{"Step": 1.0}, {" 2": 1.0}, {" is": 1.0}, {" wrong": 0.9, " no": 0.1}, {".": 1.0},
      {" No": 0.8, " Yes": 0.2}], 0.2),
    ([{"<think>": 1.0}, {"No": 0.9, "Yes": 0.1}, {"</think>": 1.0}, {"Yes": 0.9, "No": 0.1}], 0.9),
    ([{"No": 0.9, "Yes": 0.1}, {" error": 0.9, ".": 0.1}, {",": 1.0}, {" so": 1.0},
      {" Yes": 0.7, " No": 0.3}], 0.7),
    ([{"Y": 0.9, "N": 0.1}, {"es": 1.0}], 0.9),  # in two tokens
    ([{"Y": 0.45, "No": 0.05, "The": 0.5}, {"es": 1.0}], 0.9),
    ([{"Yes": 0.2, "No": 0.05, "The": 0.2}], 0.8),  # the place of the verdict, however unlikely
    ([{"Sure": 0.4, "Yes": 0.45, "No": 0.15}], 0.75),  # no verdict, and a likely yes or no
]  # fmt: skip


@pytest.mark.parametrize(("places", "score"), PLACES)
@pytest.mark.parametrize("template", [None, "chatml"])
def test_the_place_of_the_verdict(server, places, score, template):
    text = "".join(next(iter(place)) for place in places)
    form = completion if template else chat
    server.answer = lambda number, body: form(text, *places)
    assert judge(server, template=template).score_steps([(PROMPT, STEPS[:1])]) == [[score]]
    assert len(server.requests) == 1


def test_forms_of_an_answer(server):
    """A content in parts, raw tokens of a vocabulary, and two tokens that read alike."""
    place = {"Yes": 0.9, "No": 0.1}
    parts = chat("", {"Hm": 1.0}, place)
    parts["choices"][0]["message"]["content"] = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "No"}]},
        {"type": "text", "text": "Yes"},
    ]
    raw = chat("It is a Yes", {"It": 1.0}, {"Ġis": 1.0}, {"▁a": 1.0}, {"ĠYes": 0.9, "ĠNo": 0.1})
    twice = chat("Yes", place)
    top = twice["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    top[:] = [top[0] | {"logprob": math.log(0.45)}] * 2 + [top[1]]
    for answer in (parts, raw, twice):
        server.answer = lambda number, body: answer  # noqa: B023
        assert judge(server).score_steps(FOUR[:1]) == [[0.9]]


def test_places_of_the_text_alone_count(server):
    """A server that parses the reasoning away gives the log-probs of all tokens."""
    answer = chat("Yes", {"No": 0.9, "Yes": 0.1}, {"Hm": 1.0}, {"Yes": 0.9, "No": 0.1})
    answer["choices"][0]["message"]["reasoning_content"] = "No Hm"
    server.answer = lambda number, body: answer
    assert judge(server).score_steps([(PROMPT, STEPS[:1])]) == [[0.9]]


def test_logprobs_of_one_token_are_no_distribution(server, capsys):
    """With the chosen word alone every score would be 0 or 1."""
    lists = {"tokens": ["No"], "token_logprobs": [-0.5], "top_logprobs": None}
    for logprobs in (chat("No", {"No": 0.6})["choices"][0]["logprobs"], lists):

        def answer(number, body, logprobs=logprobs):
            reply = chat("Yes" if body.get("seed", 0) else "No")
            if "logprobs" in body:
                reply["choices"][0]["logprobs"] = logprobs
            return reply

        server.answer = answer
        assert judge(server, samples=4).score_steps([(PROMPT, STEPS[:1])]) == [[0.75]]
        said = capsys.readouterr().out
        assert "gives logprobs of the chosen token only" in said and "4 sampled verdicts" in said


def test_a_server_that_stops_giving_logprobs_is_said(server, capsys):
    server.answer = lambda number, body: (
        error(400, "logprobs are disabled") if number and "logprobs" in body else SURE
    )
    assert judge(server, samples=2, in_flight=1).score_steps(FOUR) == [[0.9], [1.0], [1.0], [1.0]]
    assert capsys.readouterr().out.count("gives no logprobs (logprobs are disabled)") == 1


# --- long answers


def long_answers(thoughts: str, verdict: dict[str, float] | str, tokens: int):
    """A server whose model writes `thoughts` of that many tokens before its verdict."""

    def answer(number, body):
        if body["max_tokens"] < tokens:
            reply = chat(thoughts, *([{"Hm": 0.9, "No": 0.1}] if "logprobs" in body else []))
            reply["choices"][0]["finish_reason"] = "length"
            return reply
        if isinstance(verdict, str):
            return chat(f"{thoughts} {verdict}")
        return chat(
            f"{thoughts} Yes", {thoughts: 1.0}, {" Yes": verdict["Yes"], " No": verdict["No"]}
        )

    return answer


def test_an_answer_that_holds_no_verdict_yet_is_asked_for_in_full(server, tmp_path):
    server.answer = long_answers("Let me see. 6 is right.", {"Yes": 0.6, "No": 0.4}, 30)
    for asked in (5, 0):  # once in short, then in full; a new run finds both
        with judge(server, cache=tmp_path / "cache", in_flight=1) as long:
            assert long.score_steps(FOUR) == [[0.6]] * 4
        assert [request["max_tokens"] < 30 for request in server.requests].count(True) == asked // 5
        assert len(server.requests) == asked
        server.requests.clear()


def test_thoughts_that_fill_an_answer_are_no_verdict(server):
    thoughts = "<think>No, wait. Yes? The answer is no. Answer: No"
    server.answer = long_answers(thoughts, "", 10**6)
    with pytest.raises(JudgeError, match=r"answered neither, .*\(2 answers were cut at 2048"):
        judge(server, samples=2).score_steps([(PROMPT, STEPS[:1])])


def test_a_context_without_room_for_a_long_answer(server):
    thoughtful = long_answers("Let me see. 6 is right.", {"Yes": 0.6, "No": 0.4}, 30)
    server.answer = lambda number, body: (
        error(
            422, "`inputs` tokens + `max_new_tokens` must be <= 4096. Given: 4000 `inputs` tokens"
        )
        if body["max_tokens"] > 100
        else thoughtful(number, body)
    )
    assert judge(server).score_steps([(PROMPT, STEPS[:1])]) == [[0.6]]
    assert [request["max_tokens"] for request in server.requests] == [
        8,
        2048,
        1024,
        512,
        256,
        128,
        64,
    ]


# --- sampled verdicts


@pytest.mark.parametrize("refused", [None, 400, 422, 500, 501])
def test_without_logprobs_verdicts_are_sampled(server, refused, capsys):
    verdicts = ["Yes.", "**No**", "I think", "yes, it is", "\nYES", "", None]

    def answer(number, body):
        if "logprobs" not in body:
            return chat(verdicts[body["seed"]])
        return (
            error(refused, "Logprobs are not supported by this model") if refused else chat("Yes")
        )

    server.answer = answer
    assert judge(server, samples=7).score_steps([(PROMPT, STEPS[:2])]) == [[0.75, 0.75]]
    assert len(server.requests) == 1 + 2 * 7  # log-probs are asked for once
    sampled = [request for request in server.requests if "logprobs" not in request]
    assert {request["temperature"] for request in sampled} == {1}
    assert sorted(request["seed"] for request in sampled) == sorted([*range(7), *range(7)])
    assert "gives no logprobs" in capsys.readouterr().out


def test_an_answer_without_the_words_among_its_logprobs_is_sampled(server):
    server.answer = lambda number, body: (
        chat("Sure", {"Sure": 1.0}) if "logprobs" in body else chat("No")
    )
    assert judge(server, samples=2).score_steps([(PROMPT, STEPS[:1])]) == [[0.0]]


def test_no_verdict_at_all_is_an_error_that_says_what_came(server):
    server.answer = lambda number, body: chat("There is no way to tell")
    reason = "asked for Yes or No 3 times and answered neither, but 'There is no way to tell'"
    with pytest.raises(JudgeError, match=reason):
        judge(server, samples=3).score_steps([(PROMPT, STEPS[:1])])
    assert len(server.requests) == 4


# --- a server that fails


def test_a_rate_limit_is_waited_for(server):
    server.answer = lambda number, body: (
        error(429, "slow down", **{"Retry-After": "0.01"}) if number < 2 else SURE
    )
    assert judge(server, max_retries=2).score_steps([(PROMPT, STEPS[:1])]) == [[0.9]]
    assert len(server.requests) == 3


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_server_is_one_line_and_costs_no_answer(server, name, tmp_path):
    failure, expected = FAILURES[name]
    server.answer = lambda number, body: SURE if number < 2 else failure
    with judge(server, in_flight=1, cache=tmp_path / "cache.jsonl") as first:
        with pytest.raises(ServerError, match=expected) as raised:
            first.score_steps(FOUR)
        assert server.url in str(raised.value) and "\n" not in str(raised.value)
        assert len(server.requests) == 3  # nothing is begun after a failure
    server.answer = lambda number, body: SURE
    with judge(server, cache=tmp_path / "cache.jsonl") as second:
        assert second.score_steps(FOUR) == [[0.9]] * 4
    assert len(server.requests) == 3 + 2


def test_a_slow_server(server):
    server.answer = lambda number, body: time.sleep(1) or SURE
    with pytest.raises(ServerError, match=r"127.0.0.1.* did not answer within 0\.1 s, 2 times"):
        judge(server, timeout=0.1, max_retries=1).score_steps([(PROMPT, STEPS[:1])])
    assert len(server.requests) == 2


def test_a_server_that_never_ends(server):
    """The time and the size of an answer have limits, whatever arrives before them."""

    def drip():
        while True:
            time.sleep(0.05)
            yield b" "

    server.answer = lambda number, body: (200, {}, drip())
    start = time.monotonic()
    with pytest.raises(ServerError, match=r"did not answer within 0\.3 s, 2 times"):
        judge(server, timeout=0.3, max_retries=1).score_steps(FOUR[:1])
    assert time.monotonic() - start < 5 and len(server.requests) == 2
    server.answer = lambda number, body: (200, {}, itertools.repeat(b" " * 2**20))
    with pytest.raises(ServerError, match="its answer has more than 16 MB"):
        judge(server).score_steps(FOUR[:1])
    assert len(server.requests) == 3


def test_a_compressed_answer(server, monkeypatch):
    """A megabyte of spaces is a kilobyte: what is unpacked has the same limit."""
    monkeypatch.setattr("lm.openai_client.MOST_BYTES", 2**20)
    whole = gzip.compress(json.dumps(SURE).encode())
    for status, content, expected in [
        (200, gzip.compress(b" " * 2**21), "more than 1 MB"),
        (500, gzip.compress(b" " * 2**21), "500: no word of a reason"),
        (200, b"no gzip", "no completion"),
        (200, whole[:20], "no completion"),
    ]:
        reply = (status, {"Content-Encoding": "gzip"}, content)
        server.answer = lambda number, body: reply  # noqa: B023
        with pytest.raises(ServerError, match=expected):
            judge(server).score_steps(FOUR[:1])
    server.answer = lambda number, body: (200, {"Content-Encoding": "gzip"}, whole)
    assert judge(server).score_steps(FOUR[:1]) == [[0.9]]


def test_no_other_host_gets_the_key(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with Server() as other:
        for status in (301, 302, 307, 308):
            place = {"Location": f"{other.url}/chat/completions?key=sk-secret"}
            server.answer = lambda number, body: (status, place, b"")  # noqa: B023
            with pytest.raises(ServerError, match=f"{status}: redirects to {other.url}") as raised:
                judge(server).score_steps(FOUR[:1])
            assert "sk-secret" not in str(raised.value)
        assert not other.requests


def test_an_error_with_the_status_200_is_an_error(server):
    """It is repeated, or ends the run, as its own code says."""
    busy = {"error": {"code": 503, "message": "busy"}}
    server.answer = lambda number, body: busy if number == 0 else SURE
    assert judge(server, max_retries=1).score_steps(FOUR[:1]) == [[0.9]]
    server.answer = lambda number, body: {"error": {"message": "no such model", "code": 404}}
    with pytest.raises(ServerError, match=r"404: no such model: is some-model a model"):
        judge(server, max_retries=1).score_steps(FOUR[:1])
    assert len(server.requests) == 3
    capped = {"error": "top_logprobs must be at most 5"}
    server.answer = lambda number, body: capped if body["top_logprobs"] > 5 else SURE
    assert judge(server).score_steps(FOUR[:1]) == [[0.9]]


def test_any_content_type_is_read(server):
    content = b"\xef\xbb\xbf" + json.dumps(SURE).encode()
    for kind in ("text/plain; charset=latin-1", "text/html", "application/json; charset=none", ""):
        server.answer = lambda number, body: (200, {"Content-Type": kind}, content)  # noqa: B023
        assert judge(server).score_steps(FOUR[:1]) == [[0.9]]


def test_a_long_retry_after_is_not_waited_for(server):
    for wait in ("86400", "Wed, 21 Oct 2099 07:28:00 GMT", "1e999"):
        server.answer = lambda number, body: error(429, "slow down", **{"Retry-After": wait})  # noqa: B023
        start = time.monotonic()
        with pytest.raises(ServerError, match="429: slow down: wait"):
            judge(server, max_retries=3).score_steps(FOUR[:1])
        assert time.monotonic() - start < 5


def test_a_server_that_is_down():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    reason = f"judge {url} cannot be reached .*is the server running"
    with pytest.raises(ServerError, match=reason) as raised:
        OpenAIJudge(url, "m", max_retries=0).score_steps(FOUR)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens",
        "the request exceeds the available context size, try increasing it",
        "prompt is too long: 9000 tokens > 8192 maximum",
    ],
)
def test_a_solution_longer_than_the_context_gets_none(server, message):
    server.answer = lambda number, body: (
        error(400, message) if "long" in body["messages"][0]["content"] else SURE
    )
    solutions = [(PROMPT, STEPS[:2]), (PROMPT, ["Step 1: 1", "a long step"]), (PROMPT, STEPS[:1])]
    assert judge(server).score_steps(solutions) == [[0.9, 0.9], None, [0.9]]


# --- many requests, kept answers


def test_requests_in_flight_are_many_and_bounded(server):
    server.answer = lambda number, body: time.sleep(0.05) or SURE
    judge(server, in_flight=4).score_steps([(PROMPT, [f"Step {k}: 1" for k in range(17)])])
    assert server.most == 4 and len(server.requests) == 17


@pytest.mark.process
def test_a_killed_run_asks_for_nothing_twice(server, tmp_path):
    cache = tmp_path / "new/cache.jsonl"

    def answer(number, body):
        yes = 0.5 + 0.01 * len(body["messages"][0]["content"]) % 0.4
        return chat("Yes", {"Yes": yes, "No": 0.1})

    server.answer = answer
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from reward_model.judges.openai import OpenAIJudge\n"
        "import os, signal\n"
        f"judge = OpenAIJudge({server.url!r}, 'some-model', cache={str(cache)!r})\n"
        f"judge.score_steps({FOUR[:2]!r})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == -9
    assert len(server.requests) == 2
    expected = judge(server).score_steps(FOUR)
    server.requests.clear()
    with cache.open("a") as file:
        file.write('{"key": "torn')
    for asked in (2, 0):
        with judge(server, cache=cache) as again:
            assert again.score_steps(FOUR) == expected
        assert len(server.requests) == asked
        server.requests.clear()
    with judge(server, cache=cache) as other:
        other.model = "another"
        other.score_steps(FOUR[:1])
    assert len(server.requests) == 1


def test_sampled_verdicts_are_kept_too(server, tmp_path):
    server.answer = lambda number, body: chat("No" if body.get("seed") else "Yes")
    for asked in (1 + 4 * 3, 0):
        with judge(server, samples=3, cache=tmp_path / "cache") as again:
            assert again.score_steps(FOUR) == [[round(1 / 3, 6)]] * 4
        assert len(server.requests) == asked
        server.requests.clear()


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    server, monkeypatch, tmp_path, capfd
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with judge(server, cache=tmp_path / "cache") as ours:
        ours.score_steps(FOUR[:1])
    assert server.requests[0]["key"] == "Bearer sk-secret"
    server.answer = lambda number, body: error(401, "bad key")
    with pytest.raises(ServerError) as raised:
        judge(server).score_steps(FOUR[:1])
    written = [str(raised.value), str(ours), *capfd.readouterr(), (tmp_path / "cache").read_text()]
    assert "secret" not in "".join(written)


SECRET = "sk-sEcret/123+x"


def echo(number: int, body: dict) -> tuple:
    words = f"no such thing: Authorization: Bearer {SECRET}; {SECRET[:-2]}, {SECRET!r}"
    return [error(400, words), error(401, words), error(500, words), (503, {}, words.encode())][
        number
    ]


def test_a_server_that_repeats_the_key(server, monkeypatch, tmp_path, capfd):
    """Neither a message nor what it was raised from has it."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    answers = [
        *(echo(number, {}) for number in range(4)),
        {"headers": {"Authorization": f"Bearer {SECRET}"}},
        chat(f"Yes {SECRET}", {"Yes": 0.9, "No": 0.1}, {f" {SECRET}": 1.0}),
        chat("Yes", {"Yes": 0.9, "No": 0.1}, {SECRET[:6]: 1.0}, {SECRET[6:]: 1.0}),
        error(400, f"logprobs are not supported for {SECRET}"),
        error(400, f"max_tokens must be at least 16, not {SECRET}"),
        (302, {"Location": f"http://ann:{SECRET}@elsewhere/"}, b""),
    ]
    for answer in answers:
        server.answer = lambda number, body: answer  # noqa: B023
        with judge(server, cache=tmp_path / "cache") as ours, pytest.raises(UserError) as raised:
            ours.score_steps(FOUR[:1])
        text = "".join(traceback.format_exception(raised.value))
        for cause in (raised.value.__cause__, raised.value.__context__):
            text += f"{cause!r}"
        assert "sEcret" not in text
        assert "\n" not in str(raised.value)
    assert "sEcret" not in "".join(capfd.readouterr())
    assert "sEcret" not in (tmp_path / "cache").read_text()


def test_the_word_in_place_of_a_key_may_be_in_an_answer(server, monkeypatch):
    for word in ("EMPTY", "none", "anything"):
        monkeypatch.setenv("OPENAI_API_KEY", word)
        server.answer = lambda number, body: chat(f"Yes {word}", {"Yes": 0.9, "No": 0.1})  # noqa: B023
        assert judge(server).score_steps(FOUR[:1]) == [[0.9]]


def test_a_url_with_a_password_is_refused_before_anything_is_written(tmp_path, monkeypatch, capsys):
    url = "http://ann:passw0rd@127.0.0.1:9/v1?api_key=passw0rd"
    pair = {"prompt": PROMPT, "chosen": STEPS[:1], "rejected": STEPS[1:2]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    out = ["--output", str(tmp_path / "out.jsonl")]
    judged = ["--judge", "openai", "--judge_base_url", url, "--judge_model", "m"]
    judged += ["--judge_cache", str(tmp_path / "cache"), "--input", str(tmp_path / "pairs.jsonl")]
    for main, flags in [
        (evaluate_steps.main, judged),
        (build_synthetic_dataset.main, ["--policy_base_url", url]),
    ]:
        code, printed, err = call_main(main, *flags, *out, monkeypatch=monkeypatch, capsys=capsys)
        assert (code, printed, len(err.splitlines())) == (2, "", 1)
        assert "set OPENAI_API_KEY" in err and "passw0rd" not in err
        assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_a_key_that_no_header_can_hold(monkeypatch):
    for key in ("sk-sEcret 1", "sk-sEcret\n1", "sk-sEcret\u00e9"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ServerError, match="copy the key again") as raised:
            OpenAIJudge("http://localhost:1/v1", "m")
        assert "sEcret" not in str(raised.value)


def test_a_key_with_a_line_end_around_it(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\r\n")
    assert judge(server).score_steps(FOUR[:1]) == [[0.9]]
    assert server.requests[0]["key"] == "Bearer sk-secret"


# --- text that no file can hold


def test_a_solution_that_is_not_unicode_gets_none(server):
    solutions = [FOUR[0], ("half \ud83d", ["Answer: 1"]), ("x", ["a", "\udcff"]), FOUR[1]]
    asked = judge(server)
    assert asked.score_steps(solutions) == [[0.9], None, None, [0.9]]
    assert "not Unicode" in asked.unscored_reason and len(server.requests) == 3


def test_an_answer_with_half_a_surrogate_pair_is_read(server, tmp_path):
    half = json.dumps(chat("Yes \ud83d", {"Yes": 0.9, "No": 0.1}, {" \ud83d": 0.5, "\udcff": 0.5}))
    server.answer = lambda number, body: (200, {}, half.encode())
    for asked in (1, 0):
        with judge(server, cache=tmp_path / "cache") as ours:
            assert ours.score_steps(FOUR[:1]) == [[0.9]]
        assert len(server.requests) == asked
        server.requests.clear()
    server.answer = lambda number, body: error(404, "no such \ud83d")
    with pytest.raises(ServerError, match="no such \ufffd"):
        judge(server).score_steps(FOUR[:1])


FOREIGN = [  # lines of a cache that this judge did not write, with %s for the key of a question
    "\x00\x00\x00", "[1, 2]", "null", "{}", '{"key": "%s"}',
    '{"key": "%s", "text": 3, "cut": false}',
    '{"key": ["%s"], "text": "No", "cut": false}', '{"key": {}, "text": "No", "cut": false}',
    '{"key": "%s", "text": "No", "top": 7, "cut": false}', '{"key": "%s", "text": "No"}',
    '{"key": "%s", "text": "No", "top": [1], "cut": false}',
    '{"key": "%s", "text": "No", "top": [[0, 2, []]], "cut": false}',
    '{"key": "%s", "text": "No", "top": [["0", 2, {"no": 1}]], "cut": false}',
    '{"key": "%s", "text": "No", "top": [[0, 2, {"no": "1"}]], "cut": false}',
    '{"key": "%s", "text": "No", "top": [[0, 2, {"no": NaN}]], "cut": false}',
    '{"key": "%s", "text": "No", "top": [[0, 2, {"no": 7}]], "cut": false}',
    '{"key": "%s", "text": "No", "top": [{"No": 0.9}]}', "9" * 5000, "[" * 50_000, "\ud83d",
    '{"key": "%s", "text": "No", "cut": "no"}',
]  # fmt: skip


def test_foreign_lines_in_the_cache_are_passed_over(server, tmp_path):
    cache = tmp_path / "cache"
    with judge(server, cache=cache) as ours:
        ours.score_steps(FOUR[:1])
    own = cache.read_text()
    key = json.loads(own)["key"]
    own = own.replace(key, "0" * len(key)).rstrip()  # the answer to another question
    lines = [own, *FOREIGN]
    lines = [line.replace("%s", key).encode(errors="surrogatepass") for line in lines]
    cache.write_bytes(b"\n".join([*lines, b"\xff\xfe", b""]))
    server.requests.clear()
    for asked in (1, 0):
        with judge(server, cache=cache) as ours:
            assert ours.score_steps(FOUR[:1]) == [[0.9]]
        assert len(server.requests) == asked
        server.requests.clear()


def test_bad_arguments_are_one_line(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for arguments, expected in [
        ({"base_url": "localhost:8000"}, "no URL"),
        ({"base_url": "http://[half"}, "no URL"),
        ({"base_url": "https://api.example.com/v1"}, "set OPENAI_API_KEY"),
        ({"template": "none"}, "expected one of plain"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"cache": tmp_path}, "cannot be written"),
    ]:
        with pytest.raises(UserError, match=expected):
            OpenAIJudge(**{"base_url": "http://localhost:1/v1", "model": "m", **arguments})


# --- a real server


@pytest.mark.slow
def test_transformers_serve(tmp_path):
    """This server ignores `logprobs`, so verdicts are sampled; where the judge is sure they agree
    with the transformers judge on the same model."""
    model = str(ROOT / "models/judge-mini")
    with transformers_serve(model, tmp_path) as (url, process):
        wrong = [STEPS[0], "Step 2: 12 + 36 = 49", "Answer: 49"]
        solutions = [(PROMPT, STEPS), (PROMPT, wrong)]
        options = {"template": "plain", "samples": 5, "cache": tmp_path / "cache"}
        with OpenAIJudge(url, model, **options) as judge:
            scores = judge.score_steps(solutions)
            assert judge._gives_logprobs is False
        expected = HFJudge(model, device="cpu").score_steps(solutions)
        for ours, theirs in zip(scores, expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert 0 <= a <= 1 and a * 5 == pytest.approx(round(a * 5))
                assert abs(a - b) < 0.75, (scores, expected)  # 5 samples
                assert 0.02 < b < 0.98 or abs(a - b) < 0.25, (scores, expected)
        process.kill()
        process.wait()
        with OpenAIJudge(url, model, **options, max_retries=0) as judge:
            # every answer is kept: the server is not needed
            assert judge.score_steps(solutions) == scores
            with pytest.raises(ServerError, match="cannot be reached"):
                judge.score_steps([("Another problem", ["Answer: 1"])])
