"""The GGUF judge at TinyLlama-1.1B's real shape: does its size hold, its quantization, its speed?

    python benchmarks/tinyllama_shape.py                    # random weights at the real shape, Q4_0: 3 GB of disk for a while
    python benchmarks/tinyllama_shape.py --judge_path FILE  # any GGUF file, such as tinyllama-1.1b-chat-v1.0.Q4_K_M.gguf

Makes the model directory (bf16), exports it with utils/export_gguf.py, and scores solutions of validation problems. Memory is the
most a process ever held; tokens a CPU second is the figure that means something on a machine that others use too. Nothing is kept.
"""

import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_input, parse_args, run
from common.files import ROOT
from lm.gguf_export import QUANTIZATIONS

NAME = "tinyllama-1.1b-chat-v1.0"
SHAPE = {  # TinyLlama-1.1B-Chat-v1.0's config.json, but for the layers
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LAYERS = 22
# what its chat template (zephyr's) writes: every message is `<|role|>\n...</s>\n`, the reply begins after `<|assistant|>\n`
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass
class ShapeArguments:
    judge_path: str | None = field(
        default=None,
        metadata={"help": "GGUF file to measure (default: one is made at the real shape)"},
    )
    quantization: str = field(
        default="Q4_0", metadata={"help": "of the file that is made", "choices": [*QUANTIZATIONS]}
    )
    layers: int = field(default=LAYERS, metadata={"help": "layers of the file that is made"})
    solutions: int = field(
        default=6, metadata={"help": "solutions to score, of about 5 steps and 200 tokens each"}
    )
    threads: int | None = field(
        default=None, metadata={"help": "threads of the judge (default: as many as pay off)"}
    )


def tinyllama_tokenizer():
    """The miniatures' tokenizer grown to TinyLlama's 32,000 pieces by groups of letters, with TinyLlama's chat template. As in
    build_tokenizer every split of a piece is a merge, so that llama.cpp finds the same pieces."""
    from itertools import islice, product
    from string import ascii_lowercase

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from lm.miniature_tokenizer import SPACE, build_tokenizer

    spec = json.loads(build_tokenizer().backend_tokenizer.to_str())
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    groups = ("".join(letters) for n in (2, 3, 4) for letters in product(ascii_lowercase, repeat=n))
    fresh = (piece for group in groups for piece in (group, SPACE + group) if piece not in vocab)
    for piece in islice(fresh, SHAPE["vocab_size"] - len(vocab)):
        vocab[piece] = len(vocab)
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        merges += [[left, right] for left, right in splits if left in vocab and right in vocab]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>", padding_side="left",
        model_max_length=2048, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_tinyllama(folder: str | Path, layers: int = LAYERS) -> None:
    """A model directory at TinyLlama-1.1B's shape: bf16 as on the hub, random weights (seed 0)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(
            LlamaConfig(
                **SHAPE, num_hidden_layers=layers, pad_token_id=2, tie_word_embeddings=False
            )
        )
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    tinyllama_tokenizer().save_pretrained(folder)


def most_memory(pid: int) -> float:
    """The most memory that a running process has held, in GB (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith("VmHWM:"))


def cpu_seconds(pid: int) -> float:
    """What a running process has used of all cores together (Linux)."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def make_file(folder: Path, layers: int, quantization: str) -> tuple[Path, dict[str, float]]:
    """Model directory and GGUF file, the file by the script in a process of its own. (its path, what it took)"""
    import resource
    import subprocess

    write_tinyllama(folder / NAME, layers)
    path = folder / f"{NAME}.{quantization}.gguf"
    command = [sys.executable, ROOT / "utils/export_gguf.py", "--model_name_or_path", folder / NAME]
    start = time.perf_counter()
    subprocess.run([*command, "--output", path, "--quantization", quantization], check=True)
    took = {
        "export, s": time.perf_counter() - start,
        "export, most memory, GB": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6,
    }
    return path, took


def measure(
    path: str | Path, count: int, threads: int | None
) -> tuple[dict[str, float], list[list[float]]]:
    """(what loading and scoring took, the scores). Prompt tokens are those that were evaluated, one after the other in a
    solution; what steps share is evaluated once and counted once."""
    from itertools import islice

    from reasoning.problems import problems
    from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer

    solutions = [
        (problem.prompt, problem.steps) for problem in islice(problems("validation"), count)
    ]
    start = time.perf_counter()
    with TinyLlamaRewardScorer(path, threads=threads) as judge:
        loaded, used = time.perf_counter(), cpu_seconds(judge._process.pid)
        scores = judge.score_steps(solutions)
        seconds, used = time.perf_counter() - loaded, cpu_seconds(judge._process.pid) - used
        steps = sum(map(len, scores))
        figures = {
            "file, MB": Path(path).stat().st_size / 1e6,
            "load, s": loaded - start,
            "threads": judge.threads,
            "steps scored": steps,
            "tokens evaluated": judge.tokens_evaluated,
            "prompt tokens a second": judge.tokens_evaluated / seconds,
            "prompt tokens a CPU second": judge.tokens_evaluated / used,
            "steps a second": steps / seconds,
            "worker, most memory, GB": most_memory(judge._process.pid),
        }
        print(f"template {judge.template_name}, context {judge.context_length}")
    return figures, scores


def main() -> None:
    (args,) = parse_args(ShapeArguments, description=__doc__)
    if args.judge_path is not None:
        check_input(args.judge_path)
    with tempfile.TemporaryDirectory() as folder:
        path, took = (
            (args.judge_path, {})
            if args.judge_path
            else make_file(Path(folder), args.layers, args.quantization)
        )
        figures, scores = measure(path, args.solutions, args.threads)
    for name, value in (took | figures).items():
        print(f"{name:28}{value:10.2f}" if isinstance(value, float) else f"{name:28}{value:7}")
    flat = [score for of_steps in scores for score in of_steps]
    print(f"{'scores':28}{min(flat):10.3f} to {max(flat):.3f}")


if __name__ == "__main__":
    run(main)
