"""Turn a GGUF file into a plain Hugging Face directory: weights, tokenizer and generation config.

    python utils/import_gguf.py --input SmolLM2-135M-Instruct.Q4_1.gguf \\
        --output models/smollm2-135m-instruct

Every file that transformers reads can be imported. The weights are the values of the quantized
file, rounded to --dtype: the model can be trained further, and is no better than its file. The
tokenizer keeps its chat template. (utils/export_gguf.py makes a GGUF file for llama.cpp.) """

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import arg, check_input, check_output, parse_args, run
from common.errors import UserError
from common.outputs import replacing_folder
from common.progress import taking_long
from lm.gguf_file import read_gguf

# the text on which the copy is compared with the file
PROBE = (
    "Mia has 12 apples. She buys 3 boxes of 4 apples.\nStep 1: 3 * 4 = 12, 12 + 12 = 24\nAnswer: 24"
)

CARD = """---
library_name: transformers{license}
---

# {name}

{title}: the dequantized weights of `{file}` (GGUF, sha256 `{sha256}`)
in {dtype}, written by `utils/import_gguf.py`. {parameters:.0f} million parameters, a context of {context} tokens, {template}.
"""  # noqa: E501 (Markdown)


@dataclass
class ImportArguments:
    input: str = arg(help="GGUF file, of any kind that transformers reads")
    output: str = arg(help="model directory to write")
    dtype: str = arg(
        "bfloat16",
        "how the weights are stored: 2 bytes each, or the exact values as float32",
        choices=["bfloat16", "float16", "float32"],
    )
    sha256: str | None = arg(None, "refuse the file unless this is its SHA-256")
    overwrite: bool = arg(False, "replace an existing model directory")


def import_gguf(source: Path, output: Path, dtype: str, sha256: str) -> None:
    """Write the model directory `output`, whole or not at all.

    Raises UserError if the file cannot be read, or if the copy differs from it on a short text: in
    token ids, chat template or logits (which must be equal, in `dtype`)."""
    # transformers would slow --help
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig

    from lm.loading import LOAD_ERRORS, load_tokenizer, load_weights

    # first, because transformers trusts damaged lengths
    header = read_gguf(source, any_kind=True)
    transformers.logging.set_verbosity_error()
    try:
        tokenizer = load_tokenizer(source.parent, gguf_file=source.name)
        options = {"dtype": dtype, "gguf_file": source.name}
        model = load_weights(AutoModelForCausalLM, source.parent, **options).eval()
    except (*LOAD_ERRORS, IndexError, AttributeError, NotImplementedError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{source}: transformers cannot read this GGUF file ({reason})") from None
    # transformers ignores special tokens for some vocabularies, and all chat templates but one
    for name, token in header.special_tokens.items():
        if getattr(tokenizer, name) is None:
            setattr(tokenizer, name, token)
    if len(header.chat_templates) > 1:
        tokenizer.chat_template = header.chat_templates
    # the weights are plain numbers now, and save_pretrained refuses a quantizer
    model.hf_quantizer = None
    del model.config.quantization_config
    # a name from the metadata of the file: it is not the path of this model
    vars(model.config).pop("_model_name_or_path", None)
    if model.generation_config is None:
        model.generation_config = GenerationConfig.from_model_config(model.config)

    with replacing_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        check_copy(model, tokenizer, folder, dtype)
        licence = header.metadata.get("general.license")
        card = CARD.format(
            license=f"\nlicense: {licence}" if licence else "",
            name=output.name,
            title=header.metadata.get("general.name", source.stem),
            file=source.name,
            sha256=sha256,
            dtype=dtype,
            parameters=model.num_parameters() / 1e6,
            context=model.config.max_position_embeddings,
            template=f"{'with' if tokenizer.chat_template else 'without'} a chat template",
        )
        (folder / "README.md").write_text(card, encoding="utf-8")


def check_copy(model: Any, tokenizer: Any, folder: Path, dtype: str) -> None:
    """Raises UserError if the saved model or tokenizer differs from the one that was loaded."""
    import torch  # heavy, as above

    from lm.loading import load_model

    copy, copied = load_model(str(folder), dtype)
    ids = tokenizer(PROBE, return_tensors="pt")["input_ids"]
    same_ids = torch.equal(ids, copied(PROBE, return_tensors="pt")["input_ids"])
    same_eos = tokenizer.eos_token_id == copied.eos_token_id
    if not (same_ids and same_eos and tokenizer.chat_template == copied.chat_template):
        raise UserError(
            f"{folder}: the saved tokenizer differs from the file's (ids or chat template)"
        )
    with torch.inference_mode():
        before, after = model(input_ids=ids).logits, copy.eval()(input_ids=ids).logits
    if not torch.equal(before, after) or not before.isfinite().all():
        raise UserError(
            f"{folder}: the saved model does not give the file's logits; try --dtype float32"
        )


def main() -> None:
    (args,) = parse_args(ImportArguments, description=__doc__.split("\n\n")[0])
    source, output = Path(args.input), Path(args.output)
    check_input(args.input)
    check_output(args.output, args.overwrite, [args.input], folder=True)
    with open(source, "rb") as file, taking_long(f"reading {source} (its hash)"):
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if args.sha256 and sha256 != args.sha256.lower():
        raise UserError(
            f"{source}: its SHA-256 is {sha256}, expected {args.sha256.lower()}; "
            "the file is damaged or another one"
        )
    with taking_long(f"converting {source}"):
        import_gguf(source, output, args.dtype, sha256)
    size = sum(path.stat().st_size for path in output.iterdir()) / 1e6
    print(
        f"wrote {output}: {size:.0f} MB in {args.dtype}; "
        "same ids, chat template and logits as the file"
    )


if __name__ == "__main__":
    run(main)
