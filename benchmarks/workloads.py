"""The workloads of the side-by-side benchmark: a Llama-style policy, two reward models, prompts.

Those of W1 to W3 are random; W4 is SmolLM2-135M-Instruct with its chat template (`make smollm2`), and two reward models
of its body with random heads. Both sides load the same folders, sample from the same policy and take 8 prompts x 8
samples a step. The learning rate is 0, so that the work and the lengths of responses stay what they are.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[1] / "examples" / "smollm2"
PROMPTS, PER_STEP, SAMPLES = 64, 8, 8
KL_COEF = 0.05


@dataclass(frozen=True)
class Workload:
    name: str
    about: str
    hidden: int
    layers: int
    vocabulary: int
    prompt: int  # tokens
    new: int  # tokens, at most
    fixed: bool  # every response has `new` tokens: the policy cannot produce the end token
    known: bool = False  # a model that people know, and not a random one
    wide: int | None = None  # of the middle of a layer; None: four times `hidden`
    keys: int | None = None  # of the key and value projections; None: `hidden`

    @property
    def intermediate(self) -> int:
        return self.wide or 4 * self.hidden

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of the matrices of a layer, (out, in)."""
        d, keys, wide = self.hidden, self.keys or self.hidden, self.intermediate
        return [(d, d), (keys, d), (keys, d), (d, d), (wide, d), (wide, d), (d, wide)]

    def layers_flops(self, tokens: float) -> float:
        """Of one forward pass of tokens through the layers, attention left out."""
        return 2 * tokens * self.layers * sum(a * b for a, b in self.shapes)

    def necessary(self, response_tokens: float) -> float:
        """Of one step, each token computed once by each: generation, the reference policy, two reward models, and the
        policy's forward and backward pass (three forward passes). Words are predicted for responses alone, and not by
        reward models."""
        head = 2 * response_tokens * self.hidden * self.vocabulary
        return 7 * self.layers_flops(PER_STEP * self.prompt + response_tokens) + 5 * head


WORKLOADS = {
    w.name: w
    for w in (
        Workload("W1", "1.3 M parameters, 48 tokens each", 128, 4, 1000, 16, 48, fixed=True),
        Workload("W2", "34 M parameters, geometric lengths, cut at 128", 512, 8, 16, 16, 128, fixed=False),
        Workload("W3", "34 M parameters, prompts of 256 tokens, 32 each", 512, 8, 1000, 256, 32, fixed=True),
        Workload(
            "W4",
            "SmolLM2-135M-Instruct, chat, cut at 64",
            576,
            30,
            49152,
            38,
            64,
            fixed=False,
            known=True,
            wide=1536,
            keys=192,
        ),
    )
}


def make(workload: Workload, folder: Path) -> None:
    """Writes policy, rm0, rm1, prompts.jsonl and eval.jsonl into `folder`."""
    (_make_known if workload.known else _make_random)(workload, folder)


def _make_known(workload: Workload, folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaForSequenceClassification

    from benchmarks.smollm2 import make as fetched

    source = fetched()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "policy").symlink_to(source, target_is_directory=True)
    torch.manual_seed(0)
    for name in ("rm0", "rm1"):
        reward = LlamaForSequenceClassification.from_pretrained(source, num_labels=1)
        reward.config.pad_token_id = reward.config.eos_token_id
        reward.save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder / name)
    texts = (EXAMPLE / "everyday.txt").read_text(encoding="utf-8").splitlines()[: PROMPTS + 1]
    *prompts, other = [[{"role": "user", "content": text}] for text in texts]
    _write_prompts(folder, prompts, other)


def _write_prompts(folder: Path, prompts: Sequence[Any], other: Any) -> None:
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    (folder / "eval.jsonl").write_text(json.dumps({"prompt": other}) + "\n")


def _make_random(workload: Workload, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<bos>", "<unk>"] if workload.fixed else ["<pad>", "<bos>", "<eos>", "<unk>"]
    words += [f"w{i}" for i in range(workload.vocabulary - len(words))]
    if workload.fixed:
        words.append("<eos>")  # beyond the policy's vocabulary
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{n}_token": f"<{n}>" for n in ("pad", "bos", "eos", "unk")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **special)
    common: dict[str, Any] = {
        "vocab_size": workload.vocabulary,
        "hidden_size": workload.hidden,
        "intermediate_size": workload.intermediate,
        "num_hidden_layers": workload.layers,
        "num_attention_heads": max(1, workload.hidden // 32),
        "num_key_value_heads": max(1, workload.hidden // 32),
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**common)).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    for name in ("rm0", "rm1"):
        reward = LlamaConfig(**common | {"vocab_size": len(words)}, num_labels=1)
        LlamaForSequenceClassification(reward).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rng = random.Random(0)
    usable = [w for w in words if not w.startswith("<")]
    prompts = [" ".join(rng.choices(usable, k=workload.prompt)) for _ in range(PROMPTS)]
    _write_prompts(folder, prompts, usable[0])


if __name__ == "__main__":  # python -m benchmarks.workloads W1 FOLDER
    import sys

    make(WORKLOADS[sys.argv[1]], Path(sys.argv[2]))
