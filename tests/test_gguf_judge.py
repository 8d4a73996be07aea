"""The two step judges of GGUF files, `gguf` and `llamacpp`, against transformers, and all input
that would crash their libraries."""

import os
import random
import signal
import struct
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import JudgeError, ModelError
from lm.chat_template import chat_frame
from lm.gguf_export import export_gguf
from lm.gguf_file import GGUFFile, TokenType, read_gguf
from lm.prompting import plain_chat_template
from lm.text_encoding import CUT
from reward_model.judges.hf import HFJudge
from reward_model.judges.llamacpp import LlamaCppJudge
from reward_model.judges.native import NativeJudge, NativeModel, spellings
from reward_model.templates import (
    CHAT,
    NO,
    PLAIN,
    TEMPLATES,
    YES,
    JudgeTemplate,
    chat_judge_template,
    gguf_template,
)
from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer
from tests.helpers.chat_models import CHATML, HEAD, THINKING, chat_model
from tests.helpers.solutions import PROMPT, STEPS

pytestmark = pytest.mark.process  # the judges have a process of their own
JUDGES = [TinyLlamaRewardScorer, LlamaCppJudge]
both = pytest.mark.parametrize("kind", JUDGES)

STRANGE = ["🙂🙂 a🙂b", "e\u0301 x\u0301", "كم تفاحة؟ 12", "\ufffd", "\0", "a\0\0b", "\U0010ffff"]
STRANGE += ["</s>", "<s><unk><0x0A>", "▁", "\u200b"]


@pytest.fixture(scope="module", params=JUDGES)
def judge(request, tiny_gguf):
    with request.param(tiny_gguf, threads=1) as judge:
        yield judge


@contextmanager
def in_this_process(judge: NativeJudge) -> Iterator[NativeModel]:
    """The library's model with the judge's settings: to look at ids and logits."""
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    with TemporaryDirectory() as folder:
        yield sys.modules[type(judge).__module__]._Model({**judge._settings, "folder": folder})
    for kind, handler in handlers.items():  # llama.cpp's server has set its own
        signal.signal(kind, handler)


@pytest.fixture(scope="module")
def native(judge):
    with in_this_process(judge) as model:
        yield model


@pytest.fixture(scope="module")
def parent(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()


def parent_score(parent, tokenizer, prompt, steps, template=PLAIN):
    """P(yes) / (P(yes) + P(no)) of the last step, from a plain forward pass over the whole text."""
    lines = "".join(step + "\n" for step in steps)
    text = template.before.format(prompt=prompt) + lines + template.question
    with torch.no_grad():
        logits = parent(**tokenizer(text, return_tensors="pt")).logits[0, -1].double()
    probability, vocabulary = logits.softmax(-1), tokenizer.get_vocab()

    def total(words):
        pieces = [piece for word in words for piece in (word, "▁" + word)]
        return sum(probability[vocabulary[piece]] for piece in pieces if piece in vocabulary)

    return float(total(YES) / (total(YES) + total(NO)))


def score_step(judge, prompt, step, previous=()):
    return judge.score_steps([(prompt, [*previous, step])], skip=[len(previous)])[0][0]


# --- text


@pytest.mark.parametrize("text", [PROMPT, *STRANGE, " two  spaces ", "tab\t, \r\n and \n\n lines"])
def test_ids_equal_those_of_the_tokenizer(judge, native, tokenizer, text):
    ours = native._ids(judge._text.control("{prompt}", text, is_start=True))
    assert ours == tokenizer(text, split_special_tokens=True)["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_solution_in_pieces_has_the_ids_of_the_whole_text(judge, native, tokenizer, name):
    template, text = TEMPLATES[name], judge._text
    before = text.control(template.before, PROMPT, is_start=True)
    lines = [text.plain(step + "\n") for step in STEPS]
    pieces = [before, *lines, text.control(template.question)]
    ids = native._ids([item for piece in pieces for item in piece])
    whole = template.before.format(prompt=PROMPT) + "\n".join(STEPS) + "\n" + template.question
    assert ids == tokenizer(whole)["input_ids"]


def test_control_tokens_are_ids_in_a_template_and_text_in_a_users_text(judge):
    items = judge._text.control("x</s>y {prompt}", "z</s>")
    if isinstance(judge, LlamaCppJudge):
        assert items == ["x", 2, f"y z<{CUT}/s>"]
    else:
        assert items == ["x", 2, " y z<", "/s>"]


# --- the template


def chat_file(tiny_model_dir, folder: Path, template: str, **options) -> str:
    """The GGUF file of a tiny chat model."""
    chat_model(tiny_model_dir, folder / "chat", template, **options)
    export_gguf(folder / "chat", folder / "chat.gguf", "F32")
    return str(folder / "chat.gguf")


def changed(path: str, old: bytes, new: bytes) -> str:
    """The file with bytes replaced by as many others."""
    data = Path(path).read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    Path(path).write_bytes(data.replace(old, new))
    return path


def ids_of(judge: NativeJudge, prompt: str, steps: list[str]) -> list[int]:
    text = judge._text
    before = text.control(judge.template.before, prompt, is_start=True)
    lines = [item for step in steps for item in text.plain(step + "\n")]
    with in_this_process(judge) as native:
        return native._ids([*before, *lines, *text.control(judge.template.question)])


CONTENT = CHAT.before.format(prompt=PROMPT) + "\n".join(STEPS) + "\n" + CHAT.question


@both
@pytest.mark.parametrize("template", [CHATML, THINKING, CHATML.replace("{{ bos_token }}", "")])
@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_file_is_asked_in_its_own_chat_template(
    tiny_model_dir, tmp_path, template, adds_bos, kind
):
    path = chat_file(tiny_model_dir, tmp_path, template)
    if not adds_bos:
        key = b"tokenizer.ggml.add_bos_token" + struct.pack("<I", 7)
        changed(path, key + b"\1", key + b"\0")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": CONTENT}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert ("<think>\n\n</think>" in whole) == (template == THINKING)
    bos = tokenizer.bos_token
    if adds_bos:  # once, whoever writes it
        whole = bos + whole.removeprefix(bos)
    expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
    with kind(path, threads=1) as judge:
        assert judge.template_name == "chat" and "template chat" in str(judge)
        assert ids_of(judge, PROMPT, STEPS) == expected
        scores = judge.score_steps([(PROMPT, STEPS)])[0]
    assert expected.count(1) == (adds_bos or template.startswith("{{ bos_token"))
    hf = HFJudge(path, device="cpu")
    assert hf._texts(PROMPT, STEPS, 2) == [expected] and hf.template_name == "chat"
    assert hf.score_steps([(PROMPT, STEPS)])[0] == pytest.approx(scores, abs=2e-3)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML.replace(HEAD, HEAD + "<think>\n"), "makes the model think"),
        (CHATML + "{{ raise_exception('no\x1b[31m') }}", r"TemplateError: 'no\\x1b"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{{ messages[0].content | upper }}", "does not write every message"),
    ],
)
@pytest.mark.parametrize("judge", [*JUDGES, HFJudge])
def test_a_chat_template_that_cannot_be_used_names_the_flag(
    tiny_model_dir, tmp_path, template, reason, judge
):
    path = chat_file(tiny_model_dir, tmp_path, template)
    with pytest.raises(JudgeError, match=reason) as error:
        judge(path)
    message = str(error.value)
    assert path in message and "choose one with --judge_template (plain, zephyr" in message
    assert "\n" not in message and "\x1b" not in message
    with judge(path, "chatml") as other:  # the flag chooses
        assert len(other.score_steps([(PROMPT, STEPS)])[0]) == 3


@both
def test_a_model_that_begins_to_think_gives_no_verdict(tiny_model_dir, tmp_path, kind):
    asked = chat_judge_template(chat_frame(CHATML, {"bos_token": "<s>"}))
    text = asked.before.format(prompt=PROMPT) + "\n".join(STEPS) + "\n" + asked.question
    for says, thinks in (("<think>", True), ("Yes", False)):
        (tmp_path / says).mkdir()
        path = chat_file(tiny_model_dir, tmp_path / says, CHATML, says=says, after=text)
        with kind(path, threads=1) as judge:
            if thinks:
                with pytest.raises(JudgeError, match=r"begins to think .* --judge_template"):
                    judge.score_steps([(PROMPT, STEPS)], skip=[2])
            else:
                assert judge.score_steps([(PROMPT, STEPS)])[0][2] > 0.9
        with kind(path, "chatml", threads=1) as judge:
            assert judge.score_steps([(PROMPT, STEPS)])[0]


def test_a_control_token_that_the_vocabulary_holds_as_text(tiny_model_dir, tmp_path):
    path = chat_file(tiny_model_dir, tmp_path, CHATML)
    file = read_gguf(path)
    types = struct.pack(f"<{len(file.tokens)}i", *file.token_types)
    start = file.tokens.index("<|im_start|>") * 4
    changed(path, types, types[:start] + struct.pack("<i", TokenType.NORMAL) + types[start + 4 :])
    with pytest.raises(JudgeError, match=r"'<\|im_start\|>', which the vocabulary holds as plain"):
        TinyLlamaRewardScorer(path)


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("judge-mini", "plain"),
        ("tinyllama_tinyllama-1.1b-chat-v1.0", "zephyr"),
        ("Llama-2-7b-chat-hf", "llama-2"),
        ("Mistral-7B-Instruct-v0.1", "llama-2"),
        ("dolphin-chatml", "chatml"),
        (5, "plain"),
    ],
)
def test_without_a_chat_template_the_name_decides_and_is_printed(name, template, capsys):
    file = GGUFFile("x.gguf", {"general.name": name})
    assert gguf_template(file) == (template, TEMPLATES[template])
    file.metadata["tokenizer.chat_template"] = plain_chat_template()  # of a model without chat
    assert gguf_template(file) == (template, TEMPLATES[template])
    printed = capsys.readouterr().out
    assert not printed if template == "plain" else f"the template {template} is used" in printed


def test_of_several_chat_templates_the_default_is_used(capsys):
    key = "tokenizer.chat_template"
    several = {f"{key}s": ["tool_use"], f"{key}.tool_use": "{{ raise_exception('no tools') }}"}
    name, template = gguf_template(GGUFFile("x", {**several, key: CHATML}))
    assert name == "chat" and template.question.endswith(f"<|im_end|>\n{HEAD}")
    for wrong, reason in ((several, "none of tool_use is named default"), ({key: 5}, "no text")):
        with pytest.raises(JudgeError, match=f"{reason}.*--judge_template"):
            gguf_template(GGUFFile("x", wrong))


# --- scores


@pytest.mark.parametrize("judge", JUDGES[:1], indirect=True)
def test_logits_agree_with_transformers(native, parent, tokenizer):
    ids = tokenizer(PLAIN.before.format(prompt=PROMPT) + "\n".join(STEPS))["input_ids"]
    native._evaluate(ids, 0)
    logits = native.llm.ctransformers_llm_logits_data()[: len(tokenizer)]
    with torch.no_grad():
        expected = parent(torch.tensor([ids])).logits[0, -1]
    assert (torch.tensor(logits) - expected).abs().max() < 1e-2
    native.held = []


@both
@pytest.mark.parametrize("template", ["plain", "zephyr"])
def test_scores_agree_with_transformers(tiny_gguf, parent, tokenizer, template, kind):
    other = ("🙂 How many?", ["Step 1: é", "Answer: 3"])
    with kind(tiny_gguf, template, threads=1) as judge:
        scores = judge.score_steps([(PROMPT, STEPS), other])

    def expected(prompt, steps):
        return parent_score(parent, tokenizer, prompt, steps, TEMPLATES[template])

    assert scores[0] == pytest.approx(
        [expected(PROMPT, STEPS[: k + 1]) for k in range(3)], abs=2e-3
    )
    assert scores[1][1] == pytest.approx(expected(*other), abs=2e-3)
    assert all(score == round(score, 6) for score in scores[0])


def test_a_score_depends_on_nothing_but_its_solution(judge, tiny_gguf):
    alone = judge.score_steps([(PROMPT, STEPS)])[0]
    judge.score_steps(
        [
            ("Another problem.", ["Step 1: 1 + 1 = 2"]),
            (PROMPT, [STEPS[0], "Step 2: 1"]),
            (PROMPT, [PLAIN.question]),
        ]
    )
    assert judge.score_steps([(PROMPT, STEPS), (PROMPT, STEPS)]) == [alone, alone]
    steps = [score_step(judge, PROMPT, STEPS[k], STEPS[:k]) for k in (2, 0, 1)]
    assert steps == [alone[2], alone[0], alone[1]]
    solutions = [(PROMPT, STEPS), (PROMPT, []), (PROMPT, STEPS)]
    assert judge.score_steps(solutions, skip=[1, 0, 3]) == [alone[1:], [], []]
    with type(judge)(tiny_gguf, threads=2) as other:
        assert score_step(other, PROMPT, STEPS[2], STEPS[:2]) == alone[2]
    assert len(set(alone)) == 3


@both
def test_what_steps_share_is_evaluated_once(tiny_gguf, tokenizer, kind):
    def count(text):
        return len(tokenizer(text)["input_ids"])

    whole = count(PLAIN.before.format(prompt=PROMPT) + "\n".join(STEPS) + "\n")
    question = count("\n" + PLAIN.question) - count("\n")
    # between the old question and the same one again
    spare = 1 if kind is LlamaCppJudge else 0
    with kind(tiny_gguf, threads=1) as judge:
        judge.score_steps([(PROMPT, STEPS)])
        assert judge.tokens_evaluated == whole + 3 * question
        judge.score_steps([(PROMPT, STEPS)], skip=[2])  # all in the cache but the question
        assert judge.tokens_evaluated == whole + 4 * question + spare
        evaluated = judge.tokens_evaluated
        # another problem begins like this one, up to its first word
        judge.score_steps([("Zoe has 2 cups.", ["Answer: 2"])])
        other = count(PLAIN.before.format(prompt="Zoe has 2 cups.") + "Answer: 2\n") + question
        head = count("Problem:") if kind is LlamaCppJudge else 0
        assert judge.tokens_evaluated - evaluated == other - head


@pytest.mark.parametrize("text", STRANGE)
def test_any_unicode_is_scored(judge, text):
    scores = judge.score_steps([(text, [text, "Answer: 1"])])[0]
    assert len(scores) == 2 and all(0 < score < 1 for score in scores)
    assert score_step(judge, PROMPT, text) != score_step(judge, PROMPT, STEPS[0])


def test_what_cannot_be_scored_is_an_error_of_one_line(judge, tiny_gguf):
    assert judge.score_steps([("\ud800", ["Answer: 1"])]) == [None]
    for arguments in ({"template": "none"}, {"threads": 0}, {"context_length": 0}):
        with pytest.raises(ModelError, match=r"expected one of plain|at least 1"):
            type(judge)(tiny_gguf, **arguments)


@both
def test_a_solution_longer_than_the_context_gets_none_before_anything_is_evaluated(
    tiny_gguf, tokenizer, kind
):
    def count(text):
        return len(tokenizer(text)["input_ids"])

    length = count(PLAIN.before.format(prompt=PROMPT) + STEPS[0] + "\n" + PLAIN.question)
    with kind(tiny_gguf, threads=1, context_length=length) as judge:
        score = score_step(judge, PROMPT, STEPS[0])  # fits to the last token
        evaluated = judge.tokens_evaluated
        assert judge.score_steps([(PROMPT, STEPS)]) == [None]
        assert judge.tokens_evaluated == evaluated
        assert judge.score_steps([(PROMPT, STEPS), (PROMPT, STEPS[:1])]) == [None, [score]]
    with kind(tiny_gguf, threads=1) as judge:
        # the file's; llama.cpp keeps a place for the next token
        assert judge.context_length == (511 if kind is LlamaCppJudge else 512)
        assert score_step(judge, PROMPT, STEPS[0]) == score
        around = count(PLAIN.before.format(prompt="x") + "\n" + PLAIN.question)
        steps = ["a " * (judge.context_length - around + more) for more in (-1, 0, 1)]
        lengths = [
            count(PLAIN.before.format(prompt="x") + f"{step}\n{PLAIN.question}") for step in steps
        ]
        expected = [length <= judge.context_length for length in lengths]
        assert {True, False} == {*expected} and judge.context_length in lengths
        assert [bool(judge.score_steps([("x", [step])])[0]) for step in steps] == expected


# --- the worker


@both
def test_a_dead_worker_is_one_error_that_names_the_input(tiny_gguf, kind):
    with kind(tiny_gguf, threads=1) as judge:
        scores = judge.score_steps([(PROMPT, STEPS)])
        os.kill(judge._process.pid, signal.SIGKILL)
        place = r"SIGKILL.*step 1 'Step 1: boom' of prompt 'The deadly problem.'"
        with pytest.raises(JudgeError, match=place) as error:
            judge.score_steps([("The deadly problem.", ["Step 1: boom"])])
        assert "\n" not in str(error.value)
        assert judge.score_steps([(PROMPT, STEPS)]) == scores  # a new worker, the same scores


def test_the_worker_stays_light(judge):
    maps = Path(f"/proc/{judge._process.pid}/maps").read_text() if Path("/proc").exists() else ""
    assert "libtorch" not in maps


@both
def test_weights_that_are_not_finite(tiny_gguf, tmp_path, kind):
    path = tmp_path / "nan.gguf"
    path.write_bytes(Path(tiny_gguf).read_bytes())
    reader = GGUFReader(path, "r+")
    norm = next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    norm.data[:] = float("nan")
    reader.data.flush()
    with (
        kind(path, threads=1) as judge,
        pytest.raises(ModelError, match="not finite at step 1 'x'"),
    ):
        score_step(judge, PROMPT, "x")


# --- the file


def bad_files(good: bytes) -> dict[str, tuple[bytes, str]]:
    """Name -> (bytes, what the error says)."""

    def changed(old: bytes, new: bytes) -> bytes:
        assert good.count(old) == 1 and len(old) == len(new)
        return good.replace(old, new)

    def field(key: bytes, value: bytes) -> bytes:
        return struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value

    architecture, model = b"general.architecture", b"tokenizer.ggml.model"
    block_count, width = (
        f"llama.{key}".encode() + struct.pack("<I", 4)
        for key in ("block_count", "embedding_length")
    )
    return {
        "empty": (b"", "no GGUF"),
        "text": (b"hello, this is no model\n" * 50, "no GGUF"),
        "magic only": (b"GGUF", "ends inside its header"),
        "garbage": (b"GGUF" + random.Random(0).randbytes(5000), "GGUF version"),
        "garbage counts": (good[:8] + random.Random(0).randbytes(5000), "garbage"),
        "version": (good[:4] + struct.pack("<I", 4) + good[8:], "version 4"),
        "cut header": (good[:900], "ends inside its header"),
        "cut data": (good[:-64], "cut off"),
        "architecture": (
            changed(field(architecture, b"llama"), field(architecture, b"qwen2")),
            "'qwen2', expected 'llama'; --judge llamacpp reads such files",
        ),
        "gpt2 tokenizer": (
            changed(field(model, b"llama"), field(model, b"gpt-2")),
            "tokenizer is 'gpt-2', expected 'llama' (SentencePiece); --judge llamacpp reads",
        ),
        "no tokens": (
            changed(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"),
            "tokens, scores and token types",
        ),
        "no context length": (
            changed(b"llama.context_length", b"llama.context_lengty"),
            "llama.context_length",
        ),
        "no byte token": (changed(b"<0x7F>", b"<0x7f>"), "byte tokens"),
        "no layer": (
            changed(b"blk.1.attn_q.weight", b"blk.1.attn_X.weight"),
            "'blk.1.attn_q.weight' is missing",
        ),
        # one flipped byte of a number: a library would build all these layers
        "blocks": (
            changed(block_count + b"\2\0\0\0", block_count + b"\2\0\0\1"),
            "'llama.block_count' is 16777218, more than its tensors hold",
        ),
        "width": (
            changed(width + b"\x40\0\0\0", width + b"\x40\0\0\x80"),
            "'llama.embedding_length' is 2147483712, more",
        ),
        "no output": (
            changed(
                struct.pack("<Q", 13) + b"output.weight", struct.pack("<Q", 13) + b"output.weighs"
            ),
            "output.weight",
        ),
    }


def test_a_bad_file_is_one_line_that_names_it(tiny_gguf, tmp_path):
    for name, (content, expected) in bad_files(Path(tiny_gguf).read_bytes()).items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        tracemalloc.start()
        with pytest.raises(ModelError) as error:
            TinyLlamaRewardScorer(path)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000, name
        tracemalloc.stop()
        message = str(error.value)
        assert str(path) in message and expected in message and "\n" not in message, name


# what llama.cpp finds in the files that the checks of any kind of file let pass
LLAMA_CPP_FINDS = {
    "architecture": "'qwen2.context_length' is missing",
    "gpt2 tokenizer": "unknown tokenizer: 'gpt-2'",
    "no tokens": "tokens or token types are missing",
    "no byte token": None,
    "no layer": "tensor 'blk.1.attn_q.weight' not found",
    "no output": "wrong number of tensors",
}


def test_a_bad_file_is_one_line_of_the_llama_cpp_judge_too(tiny_gguf, tmp_path):
    for name, (content, expected) in bad_files(Path(tiny_gguf).read_bytes()).items():
        expected = LLAMA_CPP_FINDS.get(name, expected)
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        if expected is None:
            LlamaCppJudge(path, threads=1).close()
            continue
        with pytest.raises(ModelError) as error:
            LlamaCppJudge(path, threads=1)
        message = str(error.value)
        assert str(path) in message and expected in message and "\n" not in message, name
        assert "--judge llamacpp" not in message


@both
def test_a_file_that_only_the_library_finds_wrong(tiny_gguf, tmp_path, kind):
    path = tmp_path / "bad.gguf"
    key = b"llama.feed_forward_length" + struct.pack("<I", 4)
    data = Path(tiny_gguf).read_bytes()
    path.write_bytes(data.replace(key + struct.pack("<I", 96), key + struct.pack("<I", 97)))
    with pytest.raises(ModelError, match=r"bad\.gguf cannot be loaded: .*(wrong shape)") as error:
        kind(path)
    assert "\n" not in str(error.value)


def test_a_damaged_header_never_hangs_or_crashes(tiny_gguf, tmp_path):
    good, rng = Path(tiny_gguf).read_bytes(), random.Random(0)
    header = good.index(b"blk.1.ffn_down") + 100
    path = tmp_path / "damaged.gguf"
    for _ in range(150):
        data = bytearray(good)
        for _ in range(rng.choice([1, 4])):
            data[rng.randrange(4, header)] = rng.randrange(256)
        path.write_bytes(data[: rng.choice([len(data), rng.randrange(len(data))])])
        try:
            assert isinstance(read_gguf(path), GGUFFile)
        except ModelError as error:
            assert str(path) in str(error)


def test_a_vocabulary_without_the_words(judge):
    tokens = {"tokenizer.ggml.tokens": ["a"] * len(judge.file.tokens)}
    with pytest.raises(ModelError, match=r"x\.gguf .* no token Yes or yes"):
        spellings(GGUFFile("x.gguf", judge.file.metadata | tokens), YES)


def test_a_template_of_ones_own(judge, tiny_gguf):
    own = JudgeTemplate("Q: {prompt} {braces}\n", "OK?")
    with type(judge)(tiny_gguf, own, threads=1) as other:
        assert score_step(other, PROMPT, STEPS[0]) != score_step(judge, PROMPT, STEPS[0])
