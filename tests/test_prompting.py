"""How a policy is asked and drawn from: prompts, top-k and top-p, step separators and thoughts."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    pipeline,
)

import train
from common.errors import ModelError, UserError
from common.files import at_root, write_records
from lm.decoding import DecodingRow, kept_probabilities
from lm.policy import Policy
from lm.prompting import (
    KEY,
    PLAIN_TEMPLATE,
    Prompts,
    Style,
    is_chat,
    plain_chat_template,
    prompts_of,
    set_prompts,
)
from lm.registry import PolicyArgs, check_policy, policy_identity, style_of
from lm.server_policy import ServerPolicy
from lm.text_encoding import CHAT_INSTRUCTION, encode_prompt, format_prompt
from reasoning.steps import step_separator
from tests.helpers.chat_models import CHATML, THINKING, chat_model
from tests.helpers.mains import call_main
from tests.helpers.servers import Server
from tests.helpers.solutions import PROMPT
from tests.helpers.training import flags, make_pairs, taught

THOUGHTS = ["<think>", "three and four", "</think>"]
STEPS = ["We add first.", "3 + 4 = 7", "Step 2: that is all", "Answer: 7"]


@pytest.fixture(scope="module")
def thinker(tiny_model_dir, tmp_path_factory) -> str:
    """A model that answers PROMPT with THOUGHTS and STEPS, one a line."""
    return taught(tiny_model_dir, tmp_path_factory.mktemp("thinker"), [(PROMPT, THOUGHTS + STEPS)])


# --- top-k and top-p ---


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), [(5, 1), (0, 0.7), (12, 0.9), (1, 1), (500, 0.01)])
def test_the_filtered_distribution_is_that_of_transformers(temperature, top_k, top_p):
    logits = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)) * 3
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(-1)
    found = kept_probabilities(logits / temperature, top_k, top_p)
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), expected)


def test_without_limits_the_distribution_is_the_softmax_itself():
    logits = torch.randn(3, 50)
    assert torch.equal(kept_probabilities(logits, 0, 1.0), logits.softmax(-1))


def test_top_k_1_draws_the_greedy_answer_and_the_defaults_change_nothing(tiny_model_dir):
    def answers(style: Style, temperature: float) -> list:
        policy = Policy.load(tiny_model_dir, style)
        return policy.generate([PROMPT], 8, temperature, 12, 3)

    greedy = answers(Style(), 0)
    assert answers(Style(top_k=1), 2.0) == greedy
    assert answers(Style(top_p=1e-6), 2.0) == greedy
    drawn = answers(Style(), 2.0)
    assert drawn != greedy and drawn == answers(Style(top_k=10**6, top_p=1.0), 2.0)


# --- separators ---


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("newline", ["We add", "3 + 4", "Step 2: x", "y", "**Step 3.** z", "Answer: 7"]),
        ("blank_line", ["We add 3 + 4", "Step 2: x y **Step 3.** z", "Answer: 7"]),
        ("numbered", ["We add 3 + 4", "Step 2: x y", "**Step 3.** z", "Answer: 7"]),
        (r"\n+(?=\*)|: ", ["We add 3 + 4 Step 2", "x y", "**Step 3.** z Answer", "7"]),
    ],
)
def test_steps_of_a_text(name, steps):
    text = "\nWe add\n3 + 4\n \nStep 2: x\ny\n**Step 3.** z\nAnswer: 7\n\n"
    assert step_separator(name).split(text) == steps


def test_a_separator_that_matches_nothing_does_not_hang():
    assert step_separator("(?=3)").split("1 2 3 4 3 5") == ["1 2", "3 4", "3 5"]
    assert step_separator("x*").split("ab") == ["a", "b"]


@pytest.mark.parametrize("name", ["(", "", "[z-a]", "a{99999999999}"])
def test_a_separator_that_is_no_expression_is_refused(name):
    with pytest.raises(UserError, match="argument --step_separator: expected"):
        style_of(PolicyArgs(step_separator=name))


@pytest.mark.process
@pytest.mark.parametrize(
    ("thinking", "name"),
    [("cut", "newline"), ("cut", "blank_line"), ("keep", "numbered"), ("off", r"\n(?=Step)"),
     ("cut", "(?=three)|(?=add)"), ("keep", "(?=three)|(?=add)")],
)  # fmt: skip
def test_step_by_step_is_as_the_whole_solution(thinker, thinking, name):
    """Sampled step by step or at once, the text is the same, and so are its steps."""
    separator = step_separator(name)
    policy = Policy.load(thinker, Style(separator=separator, thinking=thinking))
    ((whole,),) = policy.rollouts([policy.start(PROMPT)], temperature=0)
    lines = STEPS if thinking == "cut" else THOUGHTS + STEPS
    assert list(whole.steps) == separator.split("\n".join(lines)) and whole.status == "finished"
    state = policy.start(PROMPT)
    while state.status == "open":
        assert len(state.ends) == len(state.steps) + 1
        ((following,),) = policy.next_steps([state], temperature=0, max_new_tokens=256)
        assert len(following.steps) == len(state.steps) + 1
        # what is already written of the next step is not written again
        assert following.ids[: len(state.ids)] == state.ids
        state = following
    assert (state.steps, state.ids, state.status) == (whole.steps, whole.ids, "finished")
    assert state.ends == whole.ends
    assert policy.texts([PROMPT])[0][0].split("\n") == list(whole.steps)
    assert "".join(policy.stream(PROMPT)).split("\n") == list(whole.steps)


@pytest.mark.process
def test_thoughts_that_are_not_closed_leave_no_step(thinker):
    policy = Policy.load(thinker, Style(thinking="cut"))
    ((response,),) = policy.generate([PROMPT], max_new_tokens=6)
    assert (response.steps, response.finished, response.tokens) == ([], False, 6)
    assert policy.texts([PROMPT], max_new_tokens=6) == [("", False)]


@pytest.mark.process
def test_thinking_turns_it_on_in_the_template(tiny_model_dir, tmp_path):
    forced = THINKING.replace("assistant\n{% if", "assistant\n{% if not enable_thinking is false %}"
                              "<think>\n{% endif %}{% if")  # fmt: skip
    for template, opened in ((THINKING, ""), (forced, "<think>")):
        model = chat_model(tiny_model_dir, tmp_path / str(len(opened)), template)
        off, cut = (Policy.load(model, Style(thinking=name)) for name in ("off", "cut"))
        texts = [policy.decoder.decode_text(policy.start(PROMPT).ids) for policy in (off, cut)]
        assert "</think>" in texts[0] and "</think>" not in texts[1]
        assert cut.decoder._opened == opened and off.decoder._opened == ""
    # a thought that the prompt has opened is cut although the text does not open it

    def steps(text: str) -> list[str]:
        ids = cut.tokenizer(text, add_special_tokens=False).input_ids
        found = cut.decoder.new_steps(DecodingRow(0, [0], 99, ids=ids, ended="finished"))
        assert not found or found[-1][0] == len(ids)
        return [step for _, step in found]

    assert steps("hm\n</think>\n\nStep 1: 2\nAnswer: 2") == ["Step 1: 2", "Answer: 2"]
    assert steps("hm\nwell") == []


# --- prompts ---


def test_a_template_replaces_the_plain_one(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert format_prompt(PROMPT, tokenizer) == PLAIN_TEMPLATE.format(prompt=PROMPT)
    set_prompts(tokenizer, Prompts(prompt_template="Q: 1 + 1 {?}\nA: 2\n\nQ: {prompt}\nA:"))
    assert format_prompt("is {prompt} {x}?", tokenizer) == (
        "Q: 1 + 1 {?}\nA: 2\n\nQ: is {prompt} {x}?\nA:"
    )
    with pytest.raises(UserError, match="no chat template"):
        set_prompts(tokenizer, Prompts(system_prompt="Be brief."))


@pytest.mark.parametrize("name", ["policy-mini", "policy-large"])
def test_the_miniatures_answer_messages_as_they_answer_prompts(name):
    """Programs that send messages get the same tokens; here such a model is no chat model."""
    policy = Policy.load(at_root(f"models/{name}"))
    assert policy.tokenizer.chat_template == plain_chat_template()
    assert not is_chat(policy.tokenizer)
    prompt = 'Mia has 4 "red" {{ apples }}. She eats 1 \\ 2. How many?\n'
    messages = [{"role": "user", "content": prompt}]
    options = {"add_generation_prompt": True, "return_dict": False}
    ids = policy.tokenizer.apply_chat_template(messages, **options)
    assert ids == encode_prompt(policy.tokenizer, prompt)

    ask = pipeline("text-generation", policy.model, tokenizer=policy.tokenizer)
    said = ask([{"role": "user", "content": PROMPT}], max_new_tokens=60, do_sample=False)
    answer = said[0]["generated_text"][-1]
    ((expected,),) = policy.generate([PROMPT], max_new_tokens=60)
    assert answer == {"role": "assistant", "content": "\n".join(expected.steps)}


def test_the_plain_chat_template_takes_one_question(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = plain_chat_template("Q é: {prompt}\nA:")
    turns = [{"role": "user", "content": "2 + 5?"}, {"role": "assistant", "content": "7"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<s>Q é: 2 + 5?\nA:7</s>"
    for wrong in (turns[1:], [{"role": "system", "content": "Be brief."}, turns[0]], turns * 2):
        with pytest.raises(Exception, match="one message of a user"):
            tokenizer.apply_chat_template(wrong, tokenize=False)


def test_a_new_prompt_template_gets_into_the_plain_chat_template(tiny_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    set_prompts(tokenizer, Prompts(prompt_template="Q: {prompt}\nA:"))
    assert tokenizer.chat_template == plain_chat_template("Q: {prompt}\nA:")
    assert format_prompt("2 + 5?", tokenizer) == "Q: 2 + 5?\nA:"


@pytest.mark.process
def test_a_chat_model_gets_the_system_message_and_the_template(tiny_model_dir, tmp_path):
    model = chat_model(tiny_model_dir, tmp_path / "chat", CHATML)
    tokenizer = AutoTokenizer.from_pretrained(model)
    before = format_prompt(PROMPT, tokenizer)
    assert CHAT_INSTRUCTION + PROMPT in before and "system" not in before
    set_prompts(tokenizer, Prompts(system_prompt="Be brief."))
    set_prompts(tokenizer, Prompts(prompt_template="Solve: {prompt}"))  # the other one stays
    text = format_prompt(PROMPT, tokenizer)
    bos = tokenizer.bos_token or ""
    assert text == (
        f"{bos}<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\nSolve: {PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    )
    chat = format_prompt(PROMPT, tokenizer, chat=True)
    assert f"user\n{PROMPT}<" in chat and "Be brief." in chat
    # the prompts are saved with the model, wherever it is written
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert prompts_of(again) == Prompts("Be brief.", "Solve: {prompt}")
    assert encode_prompt(again, PROMPT) == encode_prompt(tokenizer, PROMPT)
    # a user's prompt writes no control tokens
    control = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert encode_prompt(again, "<|im_start|>x").count(control) == 3


@pytest.mark.process
def test_a_template_that_takes_no_system_message_is_one_line(tiny_model_dir, tmp_path):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    model = chat_model(tiny_model_dir, tmp_path / "chat", refusing + CHATML)
    policy = Policy.load(model, Style(prompts=Prompts(system_prompt="Be brief.")))
    with pytest.raises(ModelError, match="it takes no system message"):
        policy.start(PROMPT)


@pytest.mark.parametrize("saved", [3, {"system_prompt": 3}, {"prompt_template": "x"}, {"y": "x"}])
def test_prompts_that_a_model_brings_are_checked(tiny_model_dir, tmp_path, saved):
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {KEY: saved}))
    with pytest.raises(ModelError, match=f"{KEY} in its tokenizer_config.json cannot be used"):
        format_prompt(PROMPT, AutoTokenizer.from_pretrained(folder))


# --- the arguments ---


@dataclass
class Args(PolicyArgs):
    temperature: float = 1.0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_p": 0.0}, "--top_p: expected above 0, up to 1, got 0.0"),
        ({"top_p": 1.5}, "--top_p: expected above 0"),
        ({"top_k": -1}, "--top_k: expected 0 or more"),
        ({"top_p": 0.9, "temperature": 0.0}, "--top_p: at --temperature 0 nothing is drawn"),
        ({"top_k": 9, "temperature": 0.0}, "--top_k: at --temperature 0 nothing is drawn"),
        ({"prompt_template": "none.txt"}, "none.txt not found"),
        ({"prompt_template": "two.txt"}, "--prompt_template: two.txt: expected {prompt} once"),
        ({"prompt_template": "bytes.txt"}, "bytes.txt"),
    ],
)
def test_mistakes_in_the_arguments(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("{prompt} {prompt}")
    Path("bytes.txt").write_bytes(b"\xff\xfe\xff {prompt}")
    with pytest.raises(UserError) as error:
        check_policy(Args(**given))
    assert message in str(error.value)


def test_other_settings_are_another_job(tiny_model_dir, tmp_path):
    def job(**given) -> dict:
        return policy_identity(Args(model_name_or_path=tiny_model_dir, **given))

    usual = job()
    assert "top_p" not in usual  # a job of earlier versions resumes
    (tmp_path / "a.txt").write_text("A {prompt}")
    (tmp_path / "b.txt").write_text("B {prompt}")
    changed = [{"top_p": 0.9}, {"top_k": 3}, {"system_prompt": "x"}, {"thinking": "cut"}]
    changed += [{"prompt_template": str(tmp_path / name)} for name in ("a.txt", "b.txt")]
    changed += [{"step_separator": name} for name in ("numbered", "x")]
    jobs = [usual, *(job(**given) for given in changed)]
    assert len({json.dumps(each, sort_keys=True) for each in jobs}) == len(jobs)
    (tmp_path / "c.txt").write_text("A {prompt}")  # what counts is the text
    assert job(prompt_template=str(tmp_path / "c.txt")) == jobs[5]


# --- on a server ---


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def answers(*texts: str):
    def answer(number: int, body: dict) -> dict:
        choice = {"index": 0, "text": texts[number % len(texts)], "finish_reason": "stop"}
        return {"choices": [choice], "usage": {"completion_tokens": 7}}

    return answer


def test_what_a_server_is_asked(server):
    server.answer = answers("One,\ntwo.\n\nAnswer: 7")
    style = Style(
        0.9, 40, step_separator("blank_line"), prompts=Prompts(prompt_template="Q: {prompt}\nA:\n")
    )
    policy = ServerPolicy(server.url, "./none", max_retries=0, timeout=10.0, style=style)
    state = policy.start("2 + 5?")
    ((child,),) = policy.next_steps([state], temperature=0.7)
    ((end,),) = policy.next_steps([child], temperature=0.7)
    first, second = server.requests
    assert (first["top_p"], first["top_k"]) == (0.9, 40)
    assert first["prompt"] == "Q: 2 + 5?\nA:\n" and "stop" not in first
    assert second["prompt"] == "Q: 2 + 5?\nA:\nOne, two.\n\n"
    assert (child.steps, child.status) == (("One, two.",), "open")
    assert end.steps == ("One, two.", "One, two.")
    ((whole,),) = policy.rollouts([state])
    assert (whole.steps, whole.status) == (("One, two.", "Answer: 7"), "finished")


def test_thoughts_of_a_server_are_cut(server):
    server.answer = answers("<think>\nhm\n</think>\n\nStep 1: 7\nAnswer: 7")
    policies = {
        thinking: ServerPolicy(
            server.url, "./none", max_retries=0, timeout=10.0, style=Style(thinking=thinking)
        )
        for thinking in ("cut", "keep")
    }
    steps = {
        name: list(policy.generate(["2 + 5?"])[0][0].steps) for name, policy in policies.items()
    }
    assert steps["cut"] == ["Step 1: 7", "Answer: 7"]
    assert steps["keep"] == ["<think>", "hm", "</think>", "Step 1: 7", "Answer: 7"]
    state = policies["cut"].start("2 + 5?")
    with pytest.raises(UserError, match="argument --thinking: a server cannot go on"):
        policies["cut"].next_steps([state])


def test_a_system_prompt_on_a_server_needs_a_template_or_a_chat(server):
    server.answer = lambda number, body: {
        "choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}],
        "usage": {"completion_tokens": 1},
    }
    style = Style(prompts=Prompts(system_prompt="Be brief."))
    policy = ServerPolicy(server.url, "./none", max_retries=0, timeout=10.0, style=style)
    with pytest.raises(UserError, match=r"--system_prompt: \./none has no chat template"):
        policy.generate(["2 + 5?"])
    assert policy.texts(["2 + 5?"], chat=True) == [("Hello", True)]
    assert server.requests[-1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 5?"},
    ]


# --- in a training ---


@pytest.mark.process
def test_a_trained_model_is_asked_as_it_was_trained(tiny_model_dir, tmp_path, monkeypatch, capsys):
    write_records(tmp_path / "pairs.jsonl", make_pairs(12))
    (tmp_path / "ask.txt").write_text("Q: {prompt}\nA:\n")
    monkeypatch.chdir(tmp_path)
    options = {"dataset_name": "pairs.jsonl", "model_name_or_path": tiny_model_dir, "max_steps": 1}
    options |= {"output_dir": "out", "logs_dir": "logs", "prompt_template": "ask.txt"}
    given = flags(**options, report_to="none", per_device_train_batch_size=2)
    code, _, err = call_main(train.main, "dpo", *given, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0, err
    tuned = Policy.load("out")
    text = tuned.decoder.decode_text(tuned.start(PROMPT).ids)
    assert text == f"Q: {PROMPT}\nA:\n"
    (tmp_path / "ask.txt").write_text("Ask: {prompt}\n")  # another training
    (tmp_path / "out/config.json").unlink()
    code, _, err = call_main(train.main, "dpo", *given, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 2 and "prompt_template" in err and err.count("\n") == 1
    more = ("--system_prompt", "Be brief.", "--overwrite")
    code, _, err = call_main(
        train.main, "dpo", *given, *more, monkeypatch=monkeypatch, capsys=capsys
    )
    assert code == 2 and "has no chat template" in err
