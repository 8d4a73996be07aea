"""Loading of models and tokenizers, with all checks: a model whose weights are not all there, or that
only its own code can run, is refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import find_adapter_config_file

from common.errors import ModelError, first_line

# what the libraries raise for a folder that is no model, as far as it can be listed
LOAD_ERRORS = (OSError, ValueError, RuntimeError, ImportError, KeyError, SafetensorError)


def pick_device() -> tuple[str, bool]:
    """(device, bf16) of this machine. On a CPU bf16 is 1.5 times faster with instructions of its own
    and 3.5 times slower without them, so it is used only where they are."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return "cpu", bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def scoring_device(device: str | None = None) -> tuple[str, torch.dtype | str]:
    """(device, dtype) of a model that scores: by default the GPU if there is one; float32 on a CPU and
    the dtype of the stored weights on a GPU."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, torch.float32 if device == "cpu" else "auto"


def base_of(path: str, revision: str | None = None) -> tuple[str, bool]:
    """(path of the base model, True) for a PEFT adapter; (path, False) for any other model.

    Raises ValueError if the adapter names no base."""
    adapter = find_adapter_config_file(path, revision=revision)
    if adapter is None:
        return path, False
    base = json.loads(Path(adapter).read_text("utf-8")).get("base_model_name_or_path")
    if not base:
        raise ValueError("its adapter_config.json names no base_model_name_or_path")
    return base, True


def load_weights(
    model_class: Any, path: str, may_miss: Any = lambda model, key: False, **options: Any
) -> Any:
    """model_class.from_pretrained with safetensors only, and all weights there.

    may_miss(model, key): whether a weight may be missing, so that it is initialized at random. Raises
    ValueError if another one is, besides what transformers raises."""
    model, loading = model_class.from_pretrained(
        path, use_safetensors=True, output_loading_info=True, **options
    )
    missing = [key for key in loading["missing_keys"] if not may_miss(model, key)]
    if missing:
        raise ValueError(f"weights are missing, {min(missing)} for one")
    return model


def load_adapter(
    model: Any, path: str, trainable: bool = False, revision: str | None = None
) -> Any:
    """The PEFT adapter at `path` on its loaded base. Raises ValueError if part of it is missing, or if
    it is no LoRA-like adapter."""
    from peft import PeftModel

    if Path(path).is_dir() and not (Path(path) / "adapter_model.safetensors").is_file():
        raise ValueError("adapter_model.safetensors is missing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # peft would initialize the missing weights at random
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            model = PeftModel.from_pretrained(
                model, path, is_trainable=trainable, revision=revision
            )
        except UserWarning as warning:
            raise ValueError(str(warning)) from None
    if model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type.value
        raise ValueError(f"its adapter is of the type {kind}, expected LoRA or its kin")
    return model


def merge_adapter(model: Any, dtype: torch.dtype | None = None) -> Any:
    """The model with its adapter merged into the base, all weights trainable; a model without an
    adapter as it is. dtype: of the merged weights."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload().to(dtype).requires_grad_(True)  # PEFT had frozen the base
    return model


def load_tokenizer(path: str, base: str, **options: Any) -> Any:
    """The tokenizer at `path`, or that of its base where an adapter has none."""
    try:
        return AutoTokenizer.from_pretrained(path, **options)
    except (OSError, ValueError):
        if path == base:
            raise
        return AutoTokenizer.from_pretrained(base)


def load_model(
    path: str,
    dtype: torch.dtype | str,
    trainable: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a directory or a hub name: a causal LM, or a LoRA-like adapter on its base.

    An adapter is a PeftModel and stays beside its base: in weights of 16 bits a merge would round small
    updates away (`merge_adapter`, best in float32). trainable: the adapter is loaded to be trained.
    revision: of the model that is named, not of an adapter's base. Raises ModelError if the model
    cannot be loaded, or not all of it."""
    base = path
    try:
        base, is_adapter = base_of(path, revision)
        hub = {"revision": None if is_adapter else revision, "trust_remote_code": trust_remote_code}
        model = load_weights(AutoModelForCausalLM, base, dtype=dtype, **hub)
        if not is_adapter:
            return model, AutoTokenizer.from_pretrained(path, **hub)
        model = load_adapter(model, path, trainable, revision)
        return model, load_tokenizer(path, base, revision=revision)
    except LOAD_ERRORS as error:
        place = "it" if base == path else f"it and its base {base}"
        raise ModelError(
            f"{path}: no model can be loaded from {place} ({first_line(error)})"
        ) from None
