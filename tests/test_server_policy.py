"""The policy on a server: against recorded answers on loopback, and against a real one."""

import itertools
import json
import shutil
import time

import pytest

import inference
from common.cli import run
from common.errors import ModelError, PromptTooLong, UserError
from common.files import read_records, write_records
from lm.policy import Policy, State
from lm.registry import PolicyArgs, check_policy
from lm.server_policy import ServerPolicy
from lm.text_encoding import PLAIN_TEMPLATE, format_prompt
from reasoning.records import PreferencePair, Problem
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


def remote(server: Server, model: str = "./some-model", **arguments) -> ServerPolicy:
    return ServerPolicy(server.url, model, **{"max_retries": 0, "timeout": 10.0, **arguments})


def test_what_is_asked(server, capsys):
    policy = remote(server)
    state = policy.start(PROMPT, STEPS[:1])
    assert state == State(PROMPT, (), (), (STEPS[0],)) and not server.requests
    ((child,),) = policy.next_steps([state], temperature=0.7, max_new_tokens=40)
    (request,) = server.requests
    assert (
        request["path"] == "/v1/completions"
        and request["model"] == "./some-model"
        and request["key"] == "Bearer none"
    )
    assert request["prompt"] == f"{PLAIN}{STEPS[0]}\n" and request["stop"] == ["\n"]
    assert (request["temperature"], request["top_p"], request["max_tokens"]) == (
        0.7,
        1,
        40,
    ) and 0 <= request["seed"] < 2**31
    assert child == State(PROMPT, (), (), (STEPS[0], STEPS[0])) and child.sampled == 7
    assert (
        child.first(1) == state
        and child.first(2) is child
        and child.first(0) == policy.start(PROMPT)
    )
    ((whole,),) = policy.rollouts([state])
    assert (
        "stop" not in server.requests[1]
        and whole.steps == (STEPS[0], *STEPS)
        and whole.status == "finished"
    )
    with pytest.raises(ValueError, match="finished cannot be continued"):
        policy.rollouts([whole])
    assert capsys.readouterr().err.count("the plain template: no tokenizer of ./some-model") == 1


ANSWERS = [  # what the server says to a request for one step -> steps, status
    (completion(STEPS[0]), STEPS[:1], "open"),
    # as `transformers serve` has it, which returns the stop
    (completion(f"{STEPS[0]}\n"), STEPS[:1], "open"),
    # a server that does not stop there
    (completion(f"\n\n  {STEPS[0]}\n\n{STEPS[1]}\nStep", "length"), STEPS[:1], "open"),
    # vLLM tells its stop
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
    policy = remote(server)
    ((child,),) = policy.next_steps([policy.start(PROMPT)])
    assert (list(child.steps), child.status, child.sampled) == (steps, status, 7) and len(
        server.requests
    ) == 1


@pytest.mark.parametrize(
    ("behind", "steps", "status"), [(STEPS[1], STEPS[:2], "open"), ("", STEPS[:1], "finished")]
)
def test_an_empty_line_is_no_end(server, behind, steps, status):
    server.answer = lambda number, body: completion(
        behind if body["prompt"].endswith("\n\n") else "", tokens=3
    )
    policy = remote(server)
    ((child,),) = policy.next_steps([policy.start(PROMPT, STEPS[:1])], max_new_tokens=20)
    assert (list(child.steps), child.status, child.sampled) == (steps, status, 6)
    assert [
        (request["prompt"][len(PLAIN) :], request["max_tokens"]) for request in server.requests
    ] == [(f"{STEPS[0]}\n", 20), (f"{STEPS[0]}\n\n", 17)]


def test_samples_are_seeded_by_their_state(server):
    server.answer = lambda number, body: completion(f"Step 1: 1 + {body['seed']}")
    policy = remote(server)
    states = [policy.start(f"Problem {k}", STEPS[:k]) for k in range(3)]
    children = policy.next_steps([*states, states[1]], n=4)
    assert (
        len({child.steps[-1] for group in children[:3] for child in group})
        == 12
        == len(server.requests)
    )
    assert children[3] == children[1] == policy.next_steps(states[1:2], n=4)[0]
    assert policy.next_steps(states[1:2], n=4, seed=1)[0] != children[1]
    server.requests.clear()
    (greedy,) = policy.next_steps(states[:1], n=4, temperature=0)
    assert len(set(greedy)) == 1 == len(server.requests) and server.requests[0]["temperature"] == 0


def test_requests_in_flight_are_many_and_bounded(server):
    server.answer = lambda number, body: time.sleep(0.05) or completion("Answer: 1")
    (answers,) = remote(server, in_flight=4).generate([PROMPT], 17, temperature=1.0)
    assert server.most == 4 and len(server.requests) == 17
    assert all(
        (answer.steps, answer.finished, answer.tokens) == (["Answer: 1"], True, 7)
        for answer in answers
    )


def test_the_chat_template_of_the_model_and_one_bos(server, tokenizer, tmp_path, capsys):
    """The server adds BOS as the tokenizer does, so the template's own is left out."""
    tokenizer = type(tokenizer).from_pretrained(
        shutil.copytree(save(tokenizer, tmp_path / "saved"), tmp_path / "chat")
    )
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    model = save(tokenizer, tmp_path / "chat")
    policy = remote(server, model)
    policy.next_steps([policy.start(PROMPT, STEPS[:1])])
    text = format_prompt(PROMPT, tokenizer)
    assert (
        text.startswith("<s>[")
        and server.requests[0]["prompt"] == f"{text.removeprefix('<s>')}{STEPS[0]}\n"
    )
    ids = tokenizer(server.requests[0]["prompt"])["input_ids"]
    assert (
        ids.count(tokenizer.bos_token_id) == 1
        and ids == tokenizer(f"{text}{STEPS[0]}\n", add_special_tokens=False)["input_ids"]
    )
    assert f"the chat template of {model}" in capsys.readouterr().err
    remote(server, str(tmp_path / "saved"))
    assert "has no chat template" in capsys.readouterr().err


def save(tokenizer, folder) -> str:
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_context_bounds_what_is_written(server):
    def answer(number, body):  # a context of 300 characters, where a token is one
        if len(body["prompt"]) + body["max_tokens"] > 300:
            return error(
                400,
                f"This model's maximum context length is 300 tokens. However, you requested {body['max_tokens']}",
            )
        return completion("Step 1: 1 + 1 = 2", "length")

    server.answer = answer
    policy = remote(server)
    ((child,),) = policy.rollouts([policy.start(PROMPT)], max_new_tokens=256)
    assert (
        [request["max_tokens"] for request in server.requests] == [256, 128]
        and child.status == "cut"
        and child.steps
    )
    long = "long " * 60
    (full,), (fits,) = policy.rollouts(
        [policy.start(long), policy.start(PROMPT)], max_new_tokens=64
    )
    assert (full.steps, full.status, full.sampled) == ((), "cut", 0) and fits.steps
    with pytest.raises(
        PromptTooLong, match=r"no room in the model's context behind 'long long"
    ) as raised:
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
        remote(server).generate([PROMPT], n=4, temperature=1.0)
    assert str(raised.value).startswith(f"policy {server.url}") and "\n" not in str(raised.value)


def test_a_slow_server_and_one_that_recovers(server):
    server.answer = lambda number, body: time.sleep(1) or completion("")
    with pytest.raises(ModelError, match=r"policy .* did not answer within 0\.1 s, 2 times"):
        remote(server, timeout=0.1, max_retries=1).generate([PROMPT])
    server.requests.clear()
    server.answer = lambda number, body: (
        completion("Answer: 1") if number else error(503, "busy", **{"Retry-After": "0.01"})
    )
    assert remote(server, max_retries=1).generate([PROMPT])[0][0].steps == ["Answer: 1"]


def test_what_needs_ids_is_refused_in_one_line(server):
    for refused in (ServerPolicy.logps, ServerPolicy.step_logps):
        with pytest.raises(
            ModelError, match="need token ids, a server gives text: take a model without"
        ) as raised:
            refused(remote(server), [(PROMPT, [], STEPS)])
        assert "\n" not in str(raised.value) and not server.requests
    with pytest.raises(ModelError, match="surrogate"):
        remote(server).generate(["\ud800"])


def test_odd_servers_are_said_once(server, capsys):
    server.answer = lambda number, body: completion("Step 1: 1 + 1 = 2", tokens=None)
    policy = remote(server)
    states = [policy.start(PROMPT), policy.start(PROMPT, STEPS[:1])]
    for _ in range(2):
        children = policy.next_steps(states, n=8)
    assert {child.sampled for group in children for child in group} == {7}  # words
    printed = capsys.readouterr().err
    assert (
        printed.count("does not count tokens") == 1
        and printed.count("does the server sample?") == 1
    )


def test_arguments():
    check_policy(PolicyArgs("served-name", "http://localhost:8000/v1", 4))
    for args, expected in [
        (PolicyArgs(policy_requests=4), "goes with --policy_base_url"),
        (PolicyArgs("served-name", "http://localhost:8000/v1", 0), "expected 1 or more"),
        (PolicyArgs("no/such/model"), "not found"),
    ]:
        with pytest.raises(UserError, match=expected):
            check_policy(args)
    with pytest.raises(ModelError, match="policy 'localhost:8000' is no URL"):
        ServerPolicy("localhost:8000", "m")


def test_inference_from_a_server(server, monkeypatch, capsys):
    arguments = [
        "inference.py",
        "--prompt",
        PROMPT,
        "--model_name_or_path",
        "./some-model",
        "--policy_base_url",
        server.url,
    ]
    monkeypatch.setattr("sys.argv", arguments)
    run(inference.main)
    assert capsys.readouterr().out == "\n".join([*STEPS, ""])
    server.answer = lambda number, body: error(404, "no such model")
    with pytest.raises(SystemExit, match="2"):
        run(inference.main)
    printed = capsys.readouterr()
    assert not printed.out and "./some-model a model of this server" in printed.err.splitlines()[-1]


@pytest.mark.slow
def test_transformers_serve(tmp_path, run_script):
    """Greedily it writes what the same model writes here, step by step and as a whole; its samples make pairs."""
    model = str(tmp_path / "policy")
    shutil.copytree(ROOT / "models/policy-mini", model)
    config = json.loads((tmp_path / "policy/generation_config.json").read_text())
    # else it is always greedy
    (tmp_path / "policy/generation_config.json").write_text(
        json.dumps({**config, "do_sample": True})
    )
    problems = list(
        itertools.islice(read_records(ROOT / "data/problems_validation.jsonl", Problem), 6)
    )
    prompts = [problem.prompt for problem in problems]
    with transformers_serve(model, tmp_path) as (url, _):
        ours, theirs = Policy.load(model), ServerPolicy(url, model, in_flight=1)
        assert theirs.generate(prompts) == ours.generate(prompts)
        states = [(ours.start(prompt), theirs.start(prompt)) for prompt in prompts]
        while states:
            ended = []
            for side, policy in enumerate((ours, theirs)):
                ended.append(
                    [
                        child
                        for (child,) in policy.next_steps(
                            [pair[side] for pair in states], temperature=0
                        )
                    ]
                )
            for our, their in zip(*ended, strict=True):
                assert (our.steps, our.sampled) == (their.steps, their.sampled)
            # a step that states the answer ends a solution there; here EOS does, which this model always writes behind it
            assert [our.status for our in ended[0]] == [their.status for their in ended[1]]
            states = [pair for pair in zip(*ended, strict=True) if pair[0].status == "open"]
        samples = theirs.next_steps([theirs.start(prompt) for prompt in prompts], n=4)
        assert samples == theirs.next_steps([theirs.start(prompt) for prompt in prompts], n=4)
        assert any(len({child.steps for child in of_state}) > 1 for of_state in samples)

        write_records(
            tmp_path / "problems.jsonl",
            [{"prompt": p.prompt.replace("?", " ?"), "answer": p.answer} for p in problems],
        )
        script = [
            "utils/build_synthetic_dataset.py",
            "--input",
            tmp_path / "problems.jsonl",
            "--output",
            tmp_path / "pairs.jsonl",
        ]
        script += ["--samples", "4", "--model_name_or_path", model, "--policy_base_url"]
        done = run_script(*script, url)
        assert done.returncode == 0, done.stderr
        assert list(read_records(tmp_path / "pairs.jsonl", PreferencePair))
        shown = run_script(
            "inference.py",
            "--prompt",
            prompts[0],
            "--model_name_or_path",
            model,
            "--policy_base_url",
            url,
        )
        assert (
            shown.stdout
            == run_script(
                "inference.py", "--prompt", prompts[0], "--model_name_or_path", model
            ).stdout
        )
    down = run_script(*script, url, "--overwrite")
    assert down.returncode == 2 and "cannot be reached" in down.stderr.splitlines()[-1]
