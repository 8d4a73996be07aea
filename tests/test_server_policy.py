"""The policy on a server: against recorded answers on loopback, and against a real one."""

import copy
import itertools
import json
import re
import shutil
import time
from functools import partial

import pytest

import inference
from common.errors import ModelError, PromptTooLong, UserError
from common.files import read_records, write_records
from common.terminal import printable
from lm.policy import Policy, State
from lm.prompting import PLAIN_TEMPLATE
from lm.registry import PolicyArgs, check_policy
from lm.server_policy import ServerPolicy
from lm.text_encoding import format_prompt
from reasoning.records import PreferencePair, Problem
from reasoning.steps import one_line
from tests.helpers.mains import call_main
from tests.helpers.scripts import ROOT
from tests.helpers.servers import FAILURES, Server, error, transformers_serve
from tests.helpers.solutions import PROMPT, STEPS

PLAIN = PLAIN_TEMPLATE.format(prompt=PROMPT)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server()
    server.answer = lambda number, body: completion(
        STEPS[0] if "stop" in body else "\n".join(STEPS)
    )
    yield server
    server.http.shutdown()
    server.http.server_close()


def completion(text: str, reason: str = "stop", tokens: int | None = 7, **more) -> dict:
    """An answer as /v1/completions gives it."""
    usage = {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 16}
    return {
        "choices": [{"index": 0, "text": text, "finish_reason": reason, **more}],
        "usage": usage if tokens else None,
    }


def policy_on(server: Server, model: str = "./some-model", **arguments) -> ServerPolicy:
    return ServerPolicy(server.url, model, **{"max_retries": 0, "timeout": 10.0, **arguments})


def test_what_is_asked(server, capsys):
    policy = policy_on(server)
    state = policy.start(PROMPT, STEPS[:1])
    assert state == State(PROMPT, (), (), (STEPS[0],)) and not server.requests
    ((child,),) = policy.next_steps([state], temperature=0.7, max_new_tokens=40)
    (request,) = server.requests
    assert 0 <= request.pop("seed") < 2**31
    assert request == {
        "path": "/v1/completions",
        "key": "Bearer none",
        "model": "./some-model",
        "prompt": f"{PLAIN}{STEPS[0]}\n",
        "stop": ["\n"],
        "temperature": 0.7,
        "top_p": 1,
        "max_tokens": 40,
    }
    assert child == State(PROMPT, (), (), (STEPS[0], STEPS[0])) and child.sampled == 7
    assert child.first(1) == state and child.first(2) is child
    assert child.first(0) == policy.start(PROMPT)
    ((whole,),) = policy.rollouts([state])
    assert "stop" not in server.requests[1]
    assert (whole.steps, whole.status) == ((STEPS[0], *STEPS), "finished")

    with pytest.raises(ValueError, match="finished cannot be continued"):
        policy.rollouts([whole])
    assert capsys.readouterr().err.count("the plain template: no tokenizer of ./some-model") == 1


ANSWERS = [  # the server's answer to a request for one step -> steps, status
    (completion(STEPS[0]), STEPS[:1], "open"),
    # as `transformers serve` has it, which returns the stop
    (completion(f"{STEPS[0]}\n"), STEPS[:1], "open"),
    # a server that does not stop there
    (completion(f"\n\n  {STEPS[0]}\n\n{STEPS[1]}\nStep", "length"), STEPS[:1], "open"),
    # vLLM reports its stop
    (completion("Step 1:\t12  * 3", stop_reason="\n"), ["Step 1: 12 * 3"], "open"),
    (completion("So be it.", stop_reason=None), ["So be it."], "finished"),  # from EOS
    (completion("So be it.", stop_reason=128009), ["So be it."], "finished"),
    (completion("Answer: 48\n"), ["Answer: 48"], "finished"),
    (completion("Step 1: 12 *", "length"), ["Step 1: 12 *"], "cut"),
    (completion("Answer: 4", "length"), ["Answer: 4"], "cut"),
    (completion(" \n", "length"), [], "cut"),
    (completion("Step 1:", "content_filter"), ["Step 1:"], "cut"),
    (completion("", stop_reason=None), [], "finished"),
]


@pytest.mark.parametrize(("answer", "steps", "status"), ANSWERS)
def test_one_step(server, answer, steps, status):
    server.answer = lambda number, body: answer
    policy = policy_on(server)
    ((child,),) = policy.next_steps([policy.start(PROMPT)])
    assert (list(child.steps), child.status, child.sampled) == (steps, status, 7)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("behind", "steps", "status"), [(STEPS[1], STEPS[:2], "open"), ("", STEPS[:1], "finished")]
)
def test_an_empty_line_is_no_end(server, behind, steps, status):
    server.answer = lambda number, body: completion(
        behind if body["prompt"].endswith("\n\n") else "", tokens=3
    )
    policy = policy_on(server)
    ((child,),) = policy.next_steps([policy.start(PROMPT, STEPS[:1])], max_new_tokens=20)
    assert (list(child.steps), child.status, child.sampled) == (steps, status, 6)
    asked = [(request["prompt"], request["max_tokens"]) for request in server.requests]
    assert asked == [(f"{PLAIN}{STEPS[0]}\n", 20), (f"{PLAIN}{STEPS[0]}\n\n", 17)]


def test_samples_are_seeded_by_their_state(server):
    server.answer = lambda number, body: completion(f"Step 1: 1 + {body['seed']}")
    policy = policy_on(server)
    states = [policy.start(f"Problem {k}", STEPS[:k]) for k in range(3)]
    children = policy.next_steps([*states, states[1]], n=4)
    last_steps = {child.steps[-1] for group in children[:3] for child in group}
    assert len(last_steps) == 12 == len(server.requests)

    assert children[3] == children[1] == policy.next_steps(states[1:2], n=4)[0]
    assert policy.next_steps(states[1:2], n=4, seed=1)[0] != children[1]
    server.requests.clear()
    (greedy,) = policy.next_steps(states[:1], n=4, temperature=0)
    assert len(set(greedy)) == 1 == len(server.requests) and server.requests[0]["temperature"] == 0


def test_requests_in_flight_are_many_and_bounded(server):
    server.answer = lambda number, body: time.sleep(0.05) or completion("Answer: 1")
    (answers,) = policy_on(server, in_flight=4).generate([PROMPT], 17, temperature=1.0)
    assert server.most == 4 and len(server.requests) == 17
    assert all(
        (answer.steps, answer.finished, answer.tokens) == (["Answer: 1"], True, 7)
        for answer in answers
    )


def test_the_chat_template_of_the_model_and_one_bos(server, tokenizer, tmp_path, capsys):
    """The server adds BOS as the tokenizer does, so the template's own is not sent."""
    tokenizer.save_pretrained(tmp_path / "plain")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    policy = policy_on(server, str(tmp_path / "chat"))
    policy.next_steps([policy.start(PROMPT, STEPS[:1])])
    text = f"{format_prompt(PROMPT, tokenizer)}{STEPS[0]}\n"
    sent = server.requests[0]["prompt"]
    assert text.startswith("<s>[") and sent == text.removeprefix("<s>")
    ids = tokenizer(sent)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert f"the chat template of {tmp_path / 'chat'}" in capsys.readouterr().err
    server.answer = lambda number, body: completion("<think>\nWell, 1 + 1")
    with pytest.raises(ModelError, match="thinks before it answers"):
        policy.generate([PROMPT])
    policy_on(server, str(tmp_path / "plain"))
    assert "has no chat template" in capsys.readouterr().err


def test_the_context_bounds_what_is_written(server):
    def answer(number, body):  # a context of 300 characters, where a token is one
        if len(body["prompt"]) + body["max_tokens"] > 300:
            return error(400, "This model's maximum context length is 300 tokens.")
        return completion("Step 1: 1 + 1 = 2", "length")

    server.answer = answer
    policy = policy_on(server)
    ((child,),) = policy.rollouts([policy.start(PROMPT)], max_new_tokens=256)
    assert [request["max_tokens"] for request in server.requests] == [256, 128]
    assert child.status == "cut" and child.steps
    long = "long " * 60
    states = [policy.start(long), policy.start(PROMPT)]
    (full,), (fits,) = policy.rollouts(states, max_new_tokens=64)
    assert (full.steps, full.status, full.sampled) == ((), "cut", 0) and fits.steps
    expected = "no room in the model's context behind 'long long"
    with pytest.raises(PromptTooLong, match=expected) as raised:
        policy.generate([PROMPT, long])

    assert "\n" not in str(raised.value)
    assert policy.generate([PROMPT])


@pytest.mark.parametrize(
    "name",
    ["its fault", "key", "model", "dropped connection", "web page", "no choices", "other schema"],
)
def test_a_failing_server_is_one_line(server, name):
    failure, expected = FAILURES[name]
    server.answer = lambda number, body: failure
    with pytest.raises(ModelError, match=expected) as raised:
        policy_on(server).generate([PROMPT], n=4, temperature=1.0)
    assert str(raised.value).startswith(f"policy {server.url}") and "\n" not in str(raised.value)


def test_what_a_server_refuses_is_asked_for_in_another_way(server, capsys):
    """OpenAI's reasoning models, and servers that know few parameters."""
    refused = {
        "max_tokens": "use max_completion_tokens",
        "seed": "Extra inputs",
        "top_p": "unknown",
    }

    def answer(number, body):
        for name, words in refused.items():
            if name in body:
                return error(400, f"Unsupported parameter: '{name}': {words}")
        reply = {"message": {"content": "48"}, "finish_reason": "stop"}
        return {"choices": [reply], "usage": {"completion_tokens": 1}}

    server.answer = answer
    policy = policy_on(server)
    for _ in range(2):
        assert policy.texts([PROMPT, PROMPT], max_new_tokens=9, chat=True) == [("48", True)] * 2
    assert server.requests[-1].pop("key")
    assert server.requests[-1] == {
        "path": "/v1/chat/completions",
        "model": "./some-model",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_completion_tokens": 9,
        "temperature": 0.0,
    }
    said = [line for line in capsys.readouterr().err.splitlines() if "refuses" in line]
    assert len(said) == 3
    server.requests.clear()
    policy.texts([PROMPT], chat=True)
    assert len(server.requests) == 1


def test_a_context_is_asked_for_less_after_a_renamed_parameter_too(server):
    def answer(number, body):
        if "max_tokens" in body:
            return error(400, "Unknown parameter: 'max_tokens'")
        if body["max_completion_tokens"] > 40:
            return error(400, "maximum context length is 50 tokens")
        return completion("Answer: 1")

    server.answer = answer
    assert policy_on(server).generate([PROMPT], max_new_tokens=64)[0][0].steps == ["Answer: 1"]


@pytest.mark.parametrize(
    ("reason", "status"), [("eos_token", "finished"), ("stop_sequence", "open"), ("length", "cut")]
)
def test_the_ends_that_tgi_reports(server, reason, status):
    server.answer = lambda number, body: completion("So be it.", reason)
    policy = policy_on(server)
    ((child,),) = policy.next_steps([policy.start(PROMPT)])
    assert (child.steps, child.status) == (("So be it.",), status)


def test_an_answer_with_half_a_surrogate_pair_can_be_written(server, tmp_path):
    answer = json.dumps(completion("Step 1: \ud83d\nAnswer: 1\udcff"))
    server.answer = lambda number, body: (200, {}, answer.encode())
    ((response,),) = policy_on(server).generate([PROMPT])
    assert response.steps == ["Step 1: \ufffd", "Answer: 1\ufffd"]
    write_records(tmp_path / "answers.jsonl", [{"prompt": PROMPT, "steps": response.steps}])


def test_a_slow_server_and_one_that_recovers(server):
    server.answer = lambda number, body: time.sleep(1) or completion("")
    with pytest.raises(ModelError, match=r"policy .* did not answer within 0\.1 s, 2 times"):
        policy_on(server, timeout=0.1, max_retries=1).generate([PROMPT])
    server.requests.clear()
    server.answer = lambda number, body: (
        completion("Answer: 1") if number else error(503, "busy", **{"Retry-After": "0.01"})
    )
    assert policy_on(server, max_retries=1).generate([PROMPT])[0][0].steps == ["Answer: 1"]


def test_what_needs_ids_is_refused_in_one_line(server):
    expected = "need token ids, but a server gives text: leave out --policy_base_url"
    for method in (ServerPolicy.logps, ServerPolicy.step_logps):
        with pytest.raises(ModelError, match=expected) as raised:
            method(policy_on(server), [(PROMPT, [], STEPS)])

        assert "\n" not in str(raised.value) and not server.requests
    with pytest.raises(ModelError, match="surrogate"):
        policy_on(server).generate(["\ud800"])


def test_notes_on_a_server_are_printed_once(server, capsys):
    server.answer = lambda number, body: completion("Step 1: 1 + 1 = 2", tokens=None)
    policy = policy_on(server)
    states = [policy.start(PROMPT), policy.start(PROMPT, STEPS[:1])]
    for _ in range(2):
        children = policy.next_steps(states, n=8)
    assert {child.sampled for group in children for child in group} == {7}  # words
    printed = capsys.readouterr().err
    assert printed.count("does not count tokens") == 1
    assert printed.count("does the server sample?") == 1


def test_arguments():
    check_policy(PolicyArgs("served-name", "http://localhost:8000/v1", 4))
    for args, expected in [
        (PolicyArgs(policy_requests=4), "needs --policy_base_url"),
        (PolicyArgs("served-name", "http://localhost:8000/v1", 0), "expected 1 or more"),
        (PolicyArgs("no/such/model"), "not found"),
    ]:
        with pytest.raises(UserError, match=expected):
            check_policy(args)
    with pytest.raises(ModelError, match="policy 'localhost:8000' is no URL"):
        ServerPolicy("localhost:8000", "m")


def test_inference_from_a_server(server, monkeypatch, capsys):
    arguments = ["--prompt", PROMPT, "--model_name_or_path", "./some-model"]
    call = partial(call_main, inference.main, *arguments, "--policy_base_url", server.url)
    assert call(monkeypatch=monkeypatch, capsys=capsys)[:2] == (0, "\n".join([*STEPS, ""]))
    attack = "\x1b]52;c;ZWNobw==\x07\x1b[2J Step 1: 1\r\u202e2\x9b\nAnswer:\t3"
    server.answer = lambda number, body: completion(attack)
    code, out, _ = call(monkeypatch=monkeypatch, capsys=capsys)
    assert out == printable("\n".join(one_line(line) for line in attack.split("\n"))) + "\n"
    assert "\x1b" not in out and "Step 1: 1" in out
    for flags in (["--search", "majority_vote", "--n", "2"], []):
        for shown in ([], ["--show_scores"] if flags else []):
            arguments = [*flags, *shown]
            _, out, err = call(*arguments, monkeypatch=monkeypatch, capsys=capsys)
            assert "[2J" in out and not re.search("[\x1b\r\x9b\u202e]", out + err)
    server.answer = lambda number, body: error(404, "no such model \x1b[2J")
    code, out, err = call(monkeypatch=monkeypatch, capsys=capsys)
    assert "\x1b" not in err and "[2J" in err
    assert (code, out) == (2, "")
    assert "./some-model a model of this server" in err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.process
def test_transformers_serve(tmp_path, run_script):
    """Greedily it writes what the same model writes here, in steps and as a whole; its samples make
    pairs."""
    model = str(tmp_path / "policy")
    shutil.copytree(ROOT / "models/policy-mini", model)
    config_file = tmp_path / "policy/generation_config.json"
    config = json.loads(config_file.read_text())
    # without do_sample the server is always greedy
    config_file.write_text(json.dumps({**config, "do_sample": True}))
    rows = read_records(ROOT / "data/problems_validation.jsonl", Problem)
    problems = list(itertools.islice(rows, 6))
    prompts = [problem.prompt for problem in problems]
    with transformers_serve(model, tmp_path) as (url, _):
        ours, theirs = Policy.load(model), ServerPolicy(url, model, in_flight=1)
        assert theirs.generate(prompts) == ours.generate(prompts)
        pairs = [(ours.start(prompt), theirs.start(prompt)) for prompt in prompts]
        while pairs:
            our_states, their_states = (
                [child for (child,) in policy.next_steps(states, temperature=0)]
                for policy, states in zip((ours, theirs), zip(*pairs, strict=True), strict=True)
            )
            pairs = list(zip(our_states, their_states, strict=True))
            for our, their in pairs:
                assert (our.steps, our.sampled) == (their.steps, their.sampled)
                # the server's state ends with a step that states the answer, ours with EOS, which
                # this model always writes behind that step
                assert our.status == their.status
            pairs = [pair for pair in pairs if pair[0].status == "open"]
        starts = [theirs.start(prompt) for prompt in prompts]
        samples = theirs.next_steps(starts, n=4)
        assert samples == theirs.next_steps(starts, n=4)
        assert any(len({child.steps for child in group}) > 1 for group in samples)

        rows = [{"prompt": p.prompt.replace("?", " ?"), "answer": p.answer} for p in problems]
        write_records(tmp_path / "problems.jsonl", rows)
        here = ["--model_name_or_path", model]
        there = [*here, "--policy_base_url", url]
        script = ["utils/build_synthetic_dataset.py", "--input", tmp_path / "problems.jsonl"]
        script += ["--output", tmp_path / "pairs.jsonl", "--samples", "4", *there]
        done = run_script(*script)
        assert done.returncode == 0, done.stderr
        assert list(read_records(tmp_path / "pairs.jsonl", PreferencePair))
        answers = [
            run_script("inference.py", "--prompt", prompts[0], *arguments).stdout
            for arguments in (here, there)
        ]
        assert answers[0] == answers[1]
    down = run_script(*script, "--overwrite")
    assert down.returncode == 2 and "cannot be reached" in down.stderr.splitlines()[-1]
