"""The model card of an aligned policy, for people and for the Hugging Face hub. It names no path of the machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.config import Config
from rlhf.data.rows import HUB_NAME
from rlhf.evaluate import words
from rlhf.files import write_atomic
from rlhf.publish.method import reward_row, sentences
from rlhf.sources.source import rewards_of
from rlhf.store import ADAPTER
from rlhf.utility.scales import Scale

CARD = "README.md"
PAPER = "[Transforming and Combining Rewards for Aligning Large Language Models](https://arxiv.org/abs/2402.00742)"


def write_card(
    policy: Path, config: Config, summary: Mapping[str, Any], scales: Mapping[str, Scale], steps: int
) -> None:
    """Writes the card into the folder of the aligned policy.

    Args:
        summary: what summary.json holds.
        scales: of the rewards, as the utility took them.
        steps: that the policy was trained for.
    """
    text = card(policy, config, summary, scales, steps)
    path = policy / CARD
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)


def card(
    policy: Path, config: Config, summary: Mapping[str, Any], scales: Mapping[str, Scale], steps: int
) -> str:
    name = (config.hub.repo or "").rpartition("/")[2] or "Aligned policy"
    base, parts = base_model(config), [f"# {name}"]
    start = f"[{base}](https://huggingface.co/{base})" if base else "a language model"
    parts.append(
        f"This is {start}, aligned to {_listed(list(rewards_of(config.reward_models)))} with "
        f"`rlhf`, by transforming rewards and combining them ({PAPER})."
    )
    chosen = steps if summary["chosen_step"] is None else summary["chosen_step"]
    parts += ["## Method", "\n".join(f"- {text}" for text in sentences(config, steps))]
    if chosen != steps:
        parts.append(f"These weights are of step {chosen}, the best by the reward models' joint win rate.")
    if summary["stopped_early"]:
        parts.append(f"Training ended early: {summary['stopped_early']}.")
    rewards = rewards_of(config.reward_models)
    rows = [reward_row(n, source, scales[n], config.baseline) for n, source in rewards.items()]
    parts += ["## Rewards", _table(rows)]
    if summary["warnings"]:
        parts.append("\n".join(f"- {warning}" for warning in summary["warnings"]))
    parts += ["## Evaluation", *_evaluation(summary)]
    parts += ["## Use", _usage(policy, config.hub.repo), *_template_note(config.policy.chat_template)]
    parts += [
        "## Versions",
        ", ".join(f"{n} {version}" for n, version in sorted(summary["versions"].items())),
    ]
    return _metadata(config, base) + "\n\n".join(parts) + "\n"


def base_model(config: Config) -> str | None:
    """The hub's name of what the policy was made from; None: it was made here, or is a folder of this machine."""
    path = config.policy.path or config.policy.init_from
    if path is None:
        return None
    adapter = Path(path).expanduser() / ADAPTER
    if adapter.is_file():
        path = str(json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path"))
    return _on_hub(path)


def data_sets(config: Config) -> list[str]:
    """Of the hub, by name."""
    data, given = config.data, [config.data.prompts]
    if config.policy.path is None:
        given.append(data.demonstrations)
    for source in config.reward_models.values():
        given += [source.calibration, getattr(source, "preferences", None) if source.trains() else None]
    flat = [one for value in given for one in (value if isinstance(value, list) else [value]) if one]
    names = [
        _on_hub(found["name"]) for one in flat if not _exists(one) and (found := HUB_NAME.fullmatch(one))
    ]
    return list(dict.fromkeys(name for name in names if name))


def _on_hub(name: str) -> str | None:
    """The name, unless it is a path."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if _exists(name):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def _metadata(config: Config, base: str | None) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base,
        datasets=data_sets(config) or None,
        library_name="transformers",
        license=config.hub.license,
        pipeline_tag="text-generation",
        tags=["rlhf"],
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _evaluation(summary: Mapping[str, Any]) -> Iterable[str]:
    own, properties = summary["judge"] == "own", list(summary["left_behind"])
    wins = {**summary, "properties": properties}
    found = words.verdict(wins, own)
    yield found.headline.replace("\u00a0", " ")
    rates, intervals = summary["win_rate"], summary["win_rate_ci"]
    yield _table(
        [
            {
                "win rate": name,
                "base policy": words.percent(rates[name]["base"]),
                "this policy": words.percent(rates[name]["aligned"]),
                "95 % CI": words.interval(intervals[name]["aligned"]),
                "beats a random base response": words.percent(summary["win_vs_random"][name]),
            }
            for name in rates
        ]
    )
    judge = "an own judge of the data set" if own else "the reward models that it was trained on"
    yield "\n".join(
        [
            f"- Judged by {judge}, on {summary['prompts']} held-out prompts with {summary['samples']} responses each. "
            "A response wins when it reaches the reference of its prompt, jointly when it does in every property.",
            f"- KL divergence from the base policy: {summary['kl']:.2f} nats a response (standard error "
            f"{summary['kl_standard_error']:.2f}).",
            *(f"- {detail}".replace("\u00a0", " ") for detail in found.details),
        ]
    )


def _usage(policy: Path, repo: str | None) -> str:
    code = "auto_map" in json.loads((policy / "config.json").read_text(encoding="utf-8"))
    trust = ", trust_remote_code=True" if code else ""
    if _has_template(policy):
        prompt = (
            'messages = [{"role": "user", "content": "..."}]\n'
            "inputs = tokenizer.apply_chat_template(\n"
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n)'
        )
    else:
        prompt = 'inputs = tokenizer("...", return_tensors="pt")'
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{repo or "."}"{"" if repo else "  # this folder"}
tokenizer = AutoTokenizer.from_pretrained(name{trust})
model = AutoModelForCausalLM.from_pretrained(name{trust})
{prompt}
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```"""


def _template_note(given: str | None) -> list[str]:
    if given is None:
        return []
    which = "that of hh-rlhf's transcripts" if given == "hh" else "one that was given"
    return [
        f"It was trained on prompts under another chat template than its tokenizer has: {which}. Prompts should be "
        "written under it here too."
    ]


def _has_template(policy: Path) -> bool:
    """Whether the saved tokenizer has a chat template."""
    if (policy / "chat_template.jinja").is_file() or (policy / "additional_chat_templates").is_dir():
        return True
    settings = policy / "tokenizer_config.json"
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(cell.replace(chr(160), ' ') for cell in line)} |" for line in lines)


def _listed(names: Sequence[str]) -> str:
    """
    >>> _listed(["a"]), _listed(["a", "b", "c"])
    ('`a`', '`a`, `b` and `c`')
    """
    quoted = [f"`{name}`" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
