"""Size, quantization and speed of the GGUF judge at the real shape of TinyLlama-1.1B.

python benchmarks/tinyllama_shape.py # random weights, Q4_0: needs 3 GB of disk python
benchmarks/tinyllama_shape.py --judge_path FILE # any GGUF file of a judge

Without a file the script makes a model directory (bf16), exports it with utils/export_gguf.py, and
removes both at the end. It scores solutions of validation problems. Memory is the peak of a
process. On a machine with other load, tokens a CPU second is the figure to use."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.turns import peak_memory
from common.cli import arg, check_input, parse_args, run
from common.files import ROOT
from lm.gguf_file import QUANTIZATIONS
from reasoning.problems import problems
from reward_model.tinyllama_reward_model import TinyLlamaRewardScorer

NAME = "tinyllama-1.1b-chat-v1.0"
SHAPE = {  # the config.json of TinyLlama-1.1B-Chat-v1.0, without the number of layers
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LAYERS = 22
# the text of its chat template (zephyr's): `<|role|>\n...</s>\n` for every message, then
# `<|assistant|>\n` before the reply
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass
class ShapeArguments:
    judge_path: str | None = arg(
        None, "GGUF file to measure (default: one is made at the real shape)"
    )
    quantization: str = arg("Q4_0", "of the file that is made", choices=QUANTIZATIONS)
    layers: int = arg(LAYERS, "layers of the file that is made")
    solutions: int = arg(6, "solutions to score, of about 5 steps and 200 tokens each")
    threads: int | None = arg(None, "threads of the judge (default: the fastest number)")


def tinyllama_tokenizer() -> Any:
    """The miniatures' tokenizer, extended to TinyLlama's 32,000 pieces, with its chat template.

    The new pieces are groups of letters. As in build_tokenizer every split of a piece is a merge,
    so that llama.cpp finds the same pieces."""
    # heavy: would slow --help
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from lm.miniature_tokenizer import SPACE, build_tokenizer, splits

    spec = json.loads(build_tokenizer().backend_tokenizer.to_str())
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    groups = ("".join(letters) for n in (2, 3, 4) for letters in product(ascii_lowercase, repeat=n))
    new = (piece for group in groups for piece in (group, SPACE + group) if piece not in vocab)
    for piece in islice(new, SHAPE["vocab_size"] - len(vocab)):
        vocab[piece] = len(vocab)
        merges += map(list, splits(piece, vocab))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>", padding_side="left",
        model_max_length=2048, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_tinyllama(folder: Path, layers: int) -> None:
    """Write a model directory at TinyLlama-1.1B's shape: bf16 as on the hub, random weights."""
    import torch  # heavy, as above
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPE, num_hidden_layers=layers, pad_token_id=2, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    tinyllama_tokenizer().save_pretrained(folder)


def cpu_seconds(pid: int) -> float:
    """The time that a running process has used, summed over all cores (Linux)."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def make_file(folder: Path, layers: int, quantization: str) -> tuple[Path, dict[str, float]]:
    """Make a model directory and a GGUF file. Returns (path of the file, figures of the export).

    The export is a process of its own, so that its memory can be measured."""
    write_tinyllama(folder / NAME, layers)
    path = folder / f"{NAME}.{quantization}.gguf"
    command = [sys.executable, ROOT / "utils/export_gguf.py", "--model_name_or_path", folder / NAME]
    start = time.perf_counter()
    subprocess.run([*command, "--output", path, "--quantization", quantization], check=True)
    figures = {
        "export, s": time.perf_counter() - start,
        "export, peak memory, GB": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6,
    }
    return path, figures


def measure(
    path: str | Path, count: int, threads: int | None
) -> tuple[dict[str, float], list[list[float]]]:
    """(figures of loading and scoring, the scores) for `count` solutions.

    Prompt tokens are the tokens that were evaluated; tokens that steps share count once."""
    chosen = islice(problems("validation"), count)
    solutions = [(problem.prompt, problem.steps) for problem in chosen]
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
            "worker, peak memory, GB": peak_memory(judge._process.pid),
        }
        print(f"template {judge.template_name}, context {judge.context_length}")
    return figures, scores


def main() -> None:
    (args,) = parse_args(ShapeArguments, description=__doc__)
    if args.judge_path is not None:
        check_input(args.judge_path)
    with tempfile.TemporaryDirectory() as folder:
        path, export_figures = args.judge_path, {}
        if path is None:
            path, export_figures = make_file(Path(folder), args.layers, args.quantization)
        figures, scores = measure(path, args.solutions, args.threads)
    for name, value in (export_figures | figures).items():
        print(f"{name:28}{value:10.2f}" if isinstance(value, float) else f"{name:28}{value:7}")
    all_scores = [score for step_scores in scores for score in step_scores]
    print(f"{'scores':28}{min(all_scores):10.3f} to {max(all_scores):.3f}")


if __name__ == "__main__":
    run(main)
