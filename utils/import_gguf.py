"""Turn a GGUF file into a plain Hugging Face directory: dequantized weights, tokenizer with its chat template, generation config.

    python utils/import_gguf.py --input SmolLM2-135M-Instruct.Q4_1.gguf --output models/smollm2-135m-instruct

Any file that transformers reads will do. The weights keep the values that the quantized file stands for, rounded to --dtype: it is
a model to go on from, and no better than its file. (A GGUF for llama.cpp is made by utils/export_gguf.py.)
"""

import hashlib
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import check_input, check_output, parse_args, run
from common.errors import JudgeError, UserError
from lm.gguf_file import read_gguf

PROBE = "Mia has 12 apples. She buys 3 boxes of 4 apples.\nStep 1: 3 * 4 = 12, 12 + 12 = 24\nAnswer: 24"  # what the copy is checked on
# tokenizer -> GGUF
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

CARD = """---
library_name: transformers{license}
---

# {name}

{title}: the dequantized weights of `{file}` (GGUF, sha256 `{sha256}`)
in {dtype}, written by `utils/import_gguf.py`. {parameters:.0f} million parameters, a context of {context} tokens, {template}.
"""


@dataclass
class ImportArguments:
    input: str = field(metadata={"help": "GGUF file, of any kind that transformers reads"})
    output: str = field(metadata={"help": "model directory to write"})
    dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "how the weights are kept: 2 bytes each, or float32 for every bit of the dequantized values",
            "choices": ["bfloat16", "float16", "float32"],
        },
    )
    sha256: str | None = field(
        default=None, metadata={"help": "refuse the file unless this is its SHA-256"}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "replace a model directory that is there"}
    )


def import_gguf(source: Path, output: Path, dtype: str = "bfloat16", sha256: str = "") -> None:
    """Write the model directory `output`, whole or not at all. Raises UserError if the file cannot be read, or if what was written
    is not the same model: other token ids, another chat template or other logits (exactly, in `dtype`) on a short text."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    try:
        # the library would take a damaged length as it stands
        header = read_gguf(source, any_kind=True).metadata
    except JudgeError as error:
        raise UserError(str(error).removeprefix("judge ")) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, dtype=getattr(torch, dtype)
        ).eval()
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        IndexError,
        AttributeError,
        NotImplementedError,
    ) as error:
        raise UserError(
            f"{source}: transformers cannot read this GGUF file ({type(error).__name__}: {error})"
        ) from None
    for name, key in SPECIAL.items():  # transformers leaves them out for some vocabularies
        index = header.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and getattr(tokenizer, name) is None:
            setattr(tokenizer, name, header["tokenizer.ggml.tokens"][index])
    model.hf_quantizer = (
        None  # the weights are plain numbers now, and save_pretrained refuses a quantizer
    )
    del model.config.quantization_config
    # what the file calls itself is no place to load from
    vars(model.config).pop("_model_name_or_path", None)
    if model.generation_config is None:
        model.generation_config = GenerationConfig.from_model_config(model.config)

    staging = output.parent / f".{output.name}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        _check_copy(model, tokenizer, staging, dtype)
        (staging / "README.md").write_text(
            _card(model, tokenizer, header, source, output, dtype, sha256), encoding="utf-8"
        )
        shutil.rmtree(output, ignore_errors=True)
        os.replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check_copy(model, tokenizer, folder: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    copied = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(PROBE, return_tensors="pt")["input_ids"]
    same = (
        torch.equal(ids, copied(PROBE, return_tensors="pt")["input_ids"])
        and tokenizer.eos_token_id == copied.eos_token_id
    )
    if not same or tokenizer.chat_template != copied.chat_template:
        raise UserError(
            f"{folder}: the saved tokenizer is not the file's (other ids or another chat template)"
        )
    copy, loading = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True
    )
    with torch.inference_mode():
        before, after = model(input_ids=ids).logits, copy.eval()(input_ids=ids).logits
    if loading["missing_keys"] or not torch.equal(before, after) or not before.isfinite().all():
        raise UserError(
            f"{folder}: the saved model does not give the file's logits; try --dtype float32"
        )


def _card(
    model, tokenizer, header: dict, source: Path, output: Path, dtype: str, sha256: str
) -> str:
    licence = header.get("general.license")
    return CARD.format(
        license=f"\nlicense: {licence}" if licence else "",
        name=output.name,
        title=header.get("general.name", source.stem),
        file=source.name,
        sha256=sha256,
        dtype=dtype,
        parameters=model.num_parameters() / 1e6,
        context=model.config.max_position_embeddings,
        template="with a chat template" if tokenizer.chat_template else "without a chat template",
    )


def main() -> None:
    (args,) = parse_args(ImportArguments, description=__doc__.split("\n\n")[0])
    source, output = Path(args.input), Path(args.output)
    check_input(args.input)
    check_output(args.output, args.overwrite)
    if output.is_file() or (
        output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file()
    ):
        raise UserError(
            f"{output} is no model directory: it is not replaced, give another --output"
        )
    with open(source, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if args.sha256 and sha256 != args.sha256.lower():
        raise UserError(
            f"{source}: its SHA-256 is {sha256}, expected {args.sha256.lower()}; the file is damaged or another one"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    import_gguf(source, output, args.dtype, sha256)
    size = sum(path.stat().st_size for path in output.iterdir()) / 1e6
    print(
        f"wrote {output}: {size:.0f} MB in {args.dtype}; same ids, chat template and logits as the file"
    )


if __name__ == "__main__":
    run(main)
