"""Write a model as a GGUF file, which llama.cpp and the judges of GGUF files read.

    python utils/export_gguf.py --model_name_or_path models/judge-mini \\
        --output models/judge-mini/judge-mini.Q8_0.gguf --overwrite

The model is a Hugging Face directory of the kinds LLaMA, Mistral, Qwen2 or Qwen3, with byte-level
BPE (SmolLM2, Qwen, Llama 3) or a SentencePiece-style tokenizer (BPE with byte fallback). An adapter
is merged into its base first. `--judge gguf` reads LLaMAs with the second kind of tokenizer,
`--judge llamacpp` and `--judge hf` read all.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_model, check_output, parse_args, run
from common.files import at_root
from lm.gguf_file import QUANTIZATIONS


@dataclass
class ExportArguments:
    model_name_or_path: str = arg(
        at_root("models/judge-mini"), "model directory, adapter directory or hub name to export"
    )
    output: str | None = arg(
        None, "GGUF file to write (default: <directory>/<name>.<quantization>.gguf)"
    )
    quantization: str = arg(
        "Q8_0", "how matrices are stored: Q8_0, Q4_0 in blocks", choices=QUANTIZATIONS
    )
    overwrite: bool = arg(False, "replace an existing output")


def main() -> None:
    (args,) = parse_args(ExportArguments, description=__doc__)
    check_model(args.model_name_or_path)
    folder = Path(args.model_name_or_path)
    parent = folder if folder.is_dir() else Path()  # for a hub name: the current folder
    output = args.output or str(parent / f"{folder.resolve().name}.{args.quantization}.gguf")
    check_output(output, args.overwrite, [args.model_name_or_path])
    from lm.gguf_export import export_gguf  # here: transformers would slow --help

    export_gguf(args.model_name_or_path, output, args.quantization)
    print(f"wrote {output} ({os.path.getsize(output) / 1e6:.1f} MB, {args.quantization})")


if __name__ == "__main__":
    run(main)
