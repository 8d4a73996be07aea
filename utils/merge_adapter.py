"""Merge an adapter (LoRA) into its base, and write a plain model directory.

    python utils/merge_adapter.py --model_name_or_path saved_model/mine

The result is a model like any other: transformers, vLLM and lm-evaluation-harness read it without
PEFT. Tokenizer and chat template go along. The merge is computed in float32.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_model, check_output, parse_args, run
from common.errors import ModelError, UserError, first_line
from common.files import write_text
from common.outputs import replacing_folder
from common.progress import taking_long

CARD = """---
library_name: transformers
---

# {name}

{base} with the adapter {adapter} merged into its weights, in {dtype}.
"""


@dataclass
class MergeArguments:
    model_name_or_path: str = arg(help="adapter: a directory or a hub name")
    output: str | None = arg(
        None, "model directory to write (default: NAME_merged beside the adapter's directory)"
    )
    merged_dtype: str = arg(
        "auto",
        "of the written weights; auto: that of the base's stored weights. In 16 bits small updates "
        "are rounded away",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    overwrite: bool = arg(False, "replace an existing model directory")


def main() -> None:
    (args,) = parse_args(MergeArguments, description=__doc__)
    adapter = args.model_name_or_path
    check_model(adapter)
    folder = Path(adapter)
    parent = folder.resolve().parent if folder.is_dir() else Path()
    output = Path(args.output or parent / f"{folder.resolve().name}_merged")
    check_output(output, args.overwrite, [adapter], folder=True)

    with taking_long("loading the libraries"):  # torch
        import torch
        from transformers import AutoConfig

        from lm.loading import LOAD_ERRORS, base_of, load_model, merge_adapter

    try:
        base, is_adapter = base_of(adapter)
        stored = AutoConfig.from_pretrained(base, trust_remote_code=False).dtype
    except LOAD_ERRORS as error:
        raise ModelError(f"{adapter}: its base cannot be found ({first_line(error)})") from None
    if not is_adapter:
        raise UserError(f"{adapter} is a whole model, not an adapter: nothing is to be merged")
    dtype = stored or torch.float32
    if args.merged_dtype != "auto":
        dtype = getattr(torch, args.merged_dtype)
    model, tokenizer = load_model(adapter, "float32")
    merged = merge_adapter(model, dtype)
    dtype_name = str(dtype).removeprefix("torch.")
    with taking_long(f"writing {output}"), replacing_folder(output) as written:
        merged.save_pretrained(written)
        tokenizer.save_pretrained(written)
        names = {"name": output.resolve().name, "base": Path(base).name, "adapter": folder.name}
        write_text(written / "README.md", [CARD.format(**names, dtype=dtype_name)])
    print(f"wrote {base} with {adapter} merged into it to {output} ({dtype_name})")


if __name__ == "__main__":
    run(main)
