"""Bad configurations: one to three keys of a good one replaced, and all that happens before Ray starts."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from actors.errors import in_one_line
from actors.preflight import preflight
from actors.stages.stage import Stages
from rlhf.config_checks import typed
from rlhf.store import Store
from tests.fuzz.trial import Trial
from tests.tiny import save_policy, save_reward_model

CONF = Path(__file__).resolve().parents[2] / "conf"
VALUES: list[Any] = [
    None, True, False, 0, 1, 2, 3, -1, -2.5, 0.5, 1e-9, 1e300, 10**9, 2**63, -(2**63), 10**400, 2**31,
    float("nan"), float("inf"), float("-inf"), "", " ", "x", "0", "nan", "none", "null", "auto", "é", "漢字", "🙂",
    "\u202eabc", "a\x00b", "a\x1b[31mb", "a\nb", "a\tb", "../x", "../../x", "a/b", "/dev/null/x", "~/nowhere",
    "~nobody/x", "con", "a.b", "a b", "a'b", 'a"b', "<script>", "{{ 1/0 }}", "{% for %}", "$HOME", "${seed}",
    "${nowhere}", "%s", "x" * 300, "x" * 5000, [], [1], ["x"], [None], [[0, 1]], [[0, "a"]], [[1, 1], [0, 1]],
    [float("nan")], [[0, -1]],
    {}, {"x": 1}, {"x": {"y": None}}, {"1": 2}, "helpful & ~(", "helpful &", "((((", "not", "1 + 1",
    "*.jsonl", "[", "https://nobody:secret@localhost:1/x", "file:///etc/passwd", ".", "/", "float32", "bfloat16",
]  # fmt: skip
CHOICES = {
    "algorithm": ["ppo", "grpo", "dr_grpo", "rloo", "reinforce_pp", "gdpo", "nothing", "../rloo", "", "é"],
    "utility": [*(path.stem for path in sorted((CONF / "utility").glob("*.yaml"))), "nothing", "lsc.yaml"],
    "baseline": ["gaussian", "quantile", "x"],
    "evaluators": ["microcosm", "none", "x"],
    "deepspeed": ["zero0", "zero3", "zero4"],
    "resources": ["local", "cluster", "gpu1", "gpu8", "x"],
    "experiment": ["quick", "x", "null"],
    "data": ["files", "microcosm", "x"],
    "nothing": ["x"],
}
NEW_KEYS = ("x", "steps", "é", "../x", "a.b", "a/b", "con", "1", "x" * 300, "None", "joint", "helpful")
LITTLE = [
    "data.microcosm.demonstrations=20",
    "data.microcosm.pairs=20",
    "data.train_size=8",
    "data.eval_size=4",
]


def configurations(number: int, seed: int, folder: Path) -> Iterator[Trial]:
    """So many trials, the same for a seed. Models and data are written to `folder` first."""
    draw = random.Random(seed)
    bases = _bases(folder)
    with initialize_config_dir(str(CONF), version_base=None):
        keys = [sorted(_keys(compose("config", base))) for base in bases]
        store = Store(folder / "store")
        for i in range(number):
            which = draw.randrange(len(bases))
            changes = [_change(draw, keys[which]) for _ in range(draw.choice((1, 1, 2, 3)))]
            overrides = [override for override, _ in changes]
            yield Trial(
                f"configuration {i}: {' '.join(overrides)[:400]!r}",
                lambda b=bases[which], o=overrides: _start(b, o, store),
                tuple(name for _, names in changes for name in names),
            )


def _bases(folder: Path) -> list[list[str]]:
    """The microcosm's configuration, and one of files, a given policy and given reward models."""
    rows = [
        {"prompt": f"what is {word} ?", "r": 0.5} for word in ("tea", "bread", "lock", "good", "bad", "the")
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    policy = save_policy(folder / "policy")
    models = {name: save_reward_model(folder / name, 1 + i) for i, name in enumerate(("helpful", "harmless"))}
    ours = [f"output_dir={folder}/out"]
    files = [
        "data=files", f"data.prompts={folder}/prompts.jsonl", "data.eval_size=2", f"policy.path={policy}",
        *(f"reward_models.{name}.path={path}" for name, path in models.items()),
    ]  # fmt: skip
    more = ["algorithm=ppo", "policy.lora={rank: 2, alpha: 4, target_modules: all-linear}"]
    return [[*ours, *LITTLE], [*ours, *files], [*ours, *files, *more]]


def _start(base: list[str], overrides: list[str], store: Store) -> None:
    config = typed(compose("config", [*base, *overrides]))
    data = preflight(config, store)
    Stages(config, data, store).complete()


def _keys(values: DictConfig, above: str = "") -> Iterator[str]:
    """Every key, of groups and of single values."""
    for name in values:
        yield f"{above}{name}"
        if not OmegaConf.is_missing(values, name) and isinstance(values[name], DictConfig):
            yield from _keys(values[name], f"{above}{name}.")


def _change(draw: random.Random, keys: list[str]) -> tuple[str, tuple[str, ...]]:
    """An override, and the words of which a refusal has one: the key, its parts, the value."""
    kind = draw.random()
    if kind < 0.06:
        group = draw.choice(sorted(CHOICES))
        choice = draw.choice(CHOICES[group])
        return f"{group}={choice}", (group, choice or group, "data.microcosm")
    key = draw.choice(keys)
    if kind < 0.14:
        new = draw.choice(NEW_KEYS)
        key = f"{key}.{new}" if draw.random() < 0.6 else f"reward_models.{new}"
        return f"{draw.choice(('', '+', '++'))}{key}={_written(draw.choice(VALUES))}", (
            key,
            key.split(".")[0],
            new,
        )
    if kind < 0.16:
        return f"~{key}", (key, *_parts(key))
    value = draw.choice(VALUES)
    words = value if isinstance(value, list) else [value]  # what is no data, or not there, is named itself
    texts = [word for word in words if isinstance(word, str)]
    told = tuple(in_one_line(f"{word}: {why}") for word in texts for why in ("no ", "this directory was not"))
    told += tuple(w for w in words if isinstance(w, str) and (w.startswith("${") or len(w) > 255))
    return f"{key}={_written(value)}", (key, *_parts(key), *told)


def _parts(key: str) -> tuple[str, ...]:
    first, *_, last = key.split(".") if "." in key else (key, key)
    return (last, first)


def _written(value: Any) -> str:
    """A value in the language of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return "'" + value.replace("\\'", "\\\\'").replace("'", "\\'") + "'"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}: {_written(part)}" for name, part in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)
