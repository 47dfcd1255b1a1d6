"""Demonstrations and preferences for SmolLM2-135M-Instruct, made by the model itself.

    python examples/smollm2/make_data.py FOLDER_OR_HUB_NAME      # some minutes on two cores

reads `everyday.txt`, `unsafe.txt` and their held-out parts, and writes beside them

    prompts.jsonl, held_out.jsonl       what is aligned on, and what is evaluated on
    demonstrations.jsonl                answers to everyday prompts; to unsafe ones a refusal and two answers
    helpful.jsonl, harmless.jsonl       pairs of responses to the prompts that are aligned on, for the reward models
    helpful_judge.jsonl, harmless_judge.jsonl
                                        as many other pairs, for the evaluators

No person has labelled anything here. An answer of the model at low temperature, told to be brief, is preferred to what
it says at temperature 1, to an answer to another question, to one that is broken off or says its sentence twice, and to
a refusal. A refusal of an unsafe prompt is preferred to an answer, and one that gives a reason to one that does not.
Whether an everyday prompt is answered or refused is the same for harmlessness: such pairs come in both orders.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).parent
BRIEF = "Answer in one or two short, clear sentences."
NEW = 48  # tokens of a response, at most
BATCH = 64
DECLINED = (
    "I can't help with that",
    "Sorry, I won't help with this",
    "I'm not able to help with that",
    "That is something I must decline",
    "No, I won't answer this",
    "I'd rather not explain that",
)
REASONS = (
    "because somebody could get hurt",
    "because it is against the law",
    "since it would do harm to others",
    "as it could put people in danger",
    "because it is not fair to the people it touches",
    "since it could have serious consequences for you",
)
OFFERS = (
    "If you tell me what troubles you, I can look for a safe way with you.",
    "I am glad to help with something else.",
    "If you are in difficulty, please talk to someone you trust.",
    "A lawyer or a counsellor can tell you what you may do.",
    "Perhaps we can find another way to get what you need.",
    "If somebody is in danger, please call for help.",
)


class Model:
    """Samples responses of a chat model, `BATCH` at a time."""

    def __init__(self, path: str) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)

    def respond(self, prompts: Sequence[str], temperature: float) -> list[str]:
        """The whole sentences of a brief response to each prompt, of at most `NEW` tokens; there may be none."""
        found: list[str] = []
        for first in range(0, len(prompts), BATCH):
            chats = [
                [{"role": "system", "content": BRIEF}, {"role": "user", "content": p}]
                for p in prompts[first : first + BATCH]
            ]
            rows = self._tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
            end = self._tokenizer.eos_token_id
            out = self._model.generate(
                **rows, max_new_tokens=NEW, do_sample=True, temperature=temperature, top_k=0, pad_token_id=end
            )
            for tokens in out[:, rows["input_ids"].shape[1] :]:
                text = self._tokenizer.decode(tokens, skip_special_tokens=True).strip()
                found.append(text if end in tokens else whole_sentences(text))
            print(f"{len(found)} of {len(prompts)} responses", flush=True)
        return found


def whole_sentences(text: str) -> str:
    """
    >>> whole_sentences("Boil it. For how long? About")
    'Boil it. For how long?'
    """
    return text[: max(text.rfind(mark) for mark in ".!?") + 1]


def refusal(rng: random.Random) -> str:
    return f"{rng.choice(DECLINED)}, {rng.choice(REASONS)}. {rng.choice(OFFERS)}"


def bare(rng: random.Random) -> str:
    return f"{rng.choice(DECLINED)}."


def twice(text: str) -> str:
    """With its last sentence said again."""
    return f"{text} {re.split(r'(?<=[.!?]) ', text)[-1]}"


def refused(rng: random.Random) -> str:
    """With a reason or without."""
    return refusal(rng) if rng.random() < 0.7 else bare(rng)


def broken_off(text: str, rng: random.Random) -> str:
    words = text.split()
    return " ".join(words[: max(2, int(len(words) * rng.uniform(0.3, 0.7)))])


def responses(model: Model, prompts: Sequence[str], temperature: float, times: int) -> list[list[str]]:
    """The different responses to each prompt that have at least four words."""
    every = model.respond([p for p in prompts for _ in range(times)], temperature)
    groups = [every[n * times : (n + 1) * times] for n in range(len(prompts))]
    return [list(dict.fromkeys(t for t in group if len(t.split()) > 3)) for group in groups]


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, object]:
    said = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
    return {"prompt": [{"role": "user", "content": prompt}], "chosen": said[0], "rejected": said[1]}


def write(name: str, rows: Sequence[dict[str, object]], rng: random.Random) -> None:
    """In a random order, without repetitions."""
    lines = list(dict.fromkeys(json.dumps(row, ensure_ascii=False) for row in rows))
    rng.shuffle(lines)
    (HERE / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    print(f"{name}.jsonl: {len(lines)} rows")


def read(name: str) -> list[str]:
    return (HERE / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def main(path: str) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    everyday, unsafe = read("everyday"), read("unsafe")
    for name, texts in {
        "prompts": everyday + unsafe,
        "held_out": read("everyday_held_out") + read("unsafe_held_out"),
    }.items():
        write(name, [{"prompt": [{"role": "user", "content": t}]} for t in texts], rng)

    model = Model(path)
    good = responses(model, everyday, 0.3, 2)
    poor = responses(model, everyday, 1.0, 1)
    answers = responses(model, unsafe, 0.7, 3)
    asked = {p: texts for p, texts in zip(everyday, good, strict=True) if texts}
    garbled = dict(zip(everyday, poor, strict=True))
    complied = dict(zip(unsafe, answers, strict=True))
    others = [t for texts in asked.values() for t in texts]
    harm = [t for texts in complied.values() for t in texts]

    shown = [(p, t) for p, texts in asked.items() for t in texts[:2]]
    for p in unsafe:
        shown += [(p, refused(rng)), *((p, t) for t in complied[p][:2])]
    write(
        "demonstrations",
        [
            {"prompt": [{"role": "user", "content": p}], "completion": [{"role": "assistant", "content": t}]}
            for p, t in shown
        ],
        rng,
    )

    for part in ("", "_judge"):
        helpful, harmless = [], []
        for p, texts in asked.items():
            worse = [
                *garbled[p],
                rng.choice([t for t in others if t not in texts]),
                refusal(rng),
                twice(rng.choice(texts)),
                broken_off(rng.choice(texts), rng),
            ]
            helpful += [pair(p, rng.choice(texts), w) for w in worse]
            same = [rng.choice(texts), refusal(rng)]
            rng.shuffle(same)
            harmless += [pair(p, *same), pair(p, rng.choice(texts), rng.choice(harm))]
        for p in unsafe:
            helpful += [
                pair(p, refusal(rng), w) for w in (bare(rng), twice(refusal(rng)), rng.choice(others))
            ]
            helpful += [pair(p, refusal(rng), broken_off(t, rng)) for t in complied[p][:1]]
            harmless += [pair(p, refused(rng), t) for t in complied[p]]
            harmless += [pair(p, refusal(rng), rng.choice(harm))]
        for name, pairs in {"helpful": helpful, "harmless": harmless}.items():
            write(f"{name}{part}", [p for p in pairs if p["chosen"] != p["rejected"]], rng)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
