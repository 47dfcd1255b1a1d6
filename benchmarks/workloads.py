"""The workloads of the side-by-side benchmark: random Llama-style policies, two reward models, prompts.

Both sides load the same folders, sample from the same policy and take 8 prompts x 8 samples a step. The learning rate
is 0, so that the work and the lengths of responses stay what they are.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    def flops(self, tokens: float) -> float:
        """Of one forward pass over `tokens` tokens through the layers and the head, attention left out."""
        block = 4 * self.hidden**2 + 3 * self.hidden * 4 * self.hidden
        return 2 * tokens * (self.layers * block + self.hidden * self.vocabulary)

    def necessary(self, response_tokens: float) -> float:
        """Of one step, each token computed once by each: generation, the reference policy, two reward models, and the
        policy's forward and backward pass (three forward passes)."""
        return 7 * self.flops(PER_STEP * self.prompt + response_tokens)


WORKLOADS = {
    w.name: w
    for w in (
        Workload("W1", "1.3 M parameters, 48 tokens each", 128, 4, 1000, 16, 48, fixed=True),
        Workload("W2", "34 M parameters, geometric lengths, cut at 128", 512, 8, 16, 16, 128, fixed=False),
        Workload("W3", "34 M parameters, prompts of 256 tokens, 32 each", 512, 8, 1000, 256, 32, fixed=True),
    )
}


def make(workload: Workload, folder: Path) -> None:
    """Writes policy, rm0, rm1 and prompts.jsonl into `folder`."""
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
        "intermediate_size": 4 * workload.hidden,
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
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    (folder / "eval.jsonl").write_text(json.dumps({"prompt": usable[0]}) + "\n")


if __name__ == "__main__":  # python -m benchmarks.workloads W1 FOLDER
    import sys

    make(WORKLOADS[sys.argv[1]], Path(sys.argv[2]))
