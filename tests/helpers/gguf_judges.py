"""A GGUF judge with random weights."""

import json
import shutil
from pathlib import Path


def export_judge(model_dir: str, folder: Path, context: int) -> str:
    """Write the tiny model as a GGUF judge with this context, and return its path."""
    from lm.gguf_export import export_gguf

    shutil.copytree(model_dir, folder / "judge")
    path = folder / "judge" / "config.json"
    config = json.loads(path.read_text()) | {"max_position_embeddings": context}
    path.write_text(json.dumps(config))
    export_gguf(folder / "judge", folder / "judge.gguf", "Q8_0")
    return str(folder / "judge.gguf")
