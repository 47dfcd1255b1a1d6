"""The method of a configuration, in sentences of Markdown. A test keeps them complete."""

from __future__ import annotations

from typing import Any

from rlhf.config import AlgorithmConfig, AlignConfig, BaselineConfig, Config
from rlhf.sources.source import Source, rewards_of
from rlhf.utility.kinds import is_expression
from rlhf.utility.scales import BRADLEY_TERRY, REFERRED, WRONG, Scale

ARXIV = "https://arxiv.org/abs/"

TRANSFORMS = {
    "linear": "`u = r`, the reward as it is",
    "centered_linear": "`u = r - r_ref`",
    "lsc": f"`u = log sigmoid(r - r_ref)`, the log-probability that the response is good ([LSC]({ARXIV}2402.00742))",
    "log_sigmoid": "`u = log sigmoid(r)`, not centred",
    "sigmoid": "`u = sigmoid(r - r_ref)`, the probability that the response is good",
    "par": f"`u = mean of sigmoid(r - r_j)` over base rewards `r_j` of the prompt ([PAR]({ARXIV}2502.18770))",
    "quantile_rank": "`u =` the share of the base policy's rewards of the prompt that are below `r`",
    "zscore": "`u = (r - mean) / std` over the base policy's rewards of the prompt",
    "zscore_global": "`u = (r - mean) / std` over the base policy's rewards of all prompts",
    "min_max": "`u = (r - low) / (high - low)` over the base policy's rewards of the prompt",
    "clip": "`u = r - r_ref`, clipped to [{low:g}, {high:g}]",
    "tanh": "`u = s tanh((r - r_ref) / s)` with `s` = {scale:g}",
    "inada": "a concave utility of `r - r_ref`, with scale {scale:g} and aversion {aversion:g}",
}
COMBINATIONS = {
    "weighted_sum": "their weighted sum",
    "min": "their minimum, the worst property",
    "softmin": "their soft minimum, with temperature {temperature:g}",
    "product": "their product: good in every property",
    "and": "the logical AND: good in every property",
    "or": "the logical OR: good in at least one property",
}
ADVANTAGES = {
    "leave_one_out": f"REINFORCE with the mean of the prompt's other responses as baseline ([RLOO]({ARXIV}2402.14740))",
    "group_mean": f"policy gradient with the prompt's mean as baseline (as [GRPO]({ARXIV}2402.03300))",
    "batch_mean": f"policy gradient with the batch's mean as baseline (as [REINFORCE++]({ARXIV}2501.03262))",
    "gdpo": f"policy gradient with each reward normalised by itself over the prompt ([GDPO]({ARXIV}2601.05242))",
    "gae": f"actor-critic with generalised advantage estimation (as [PPO]({ARXIV}1707.06347))",
}
SCALED = {
    "none": "",
    "group": ", divided by the deviation of the prompt's responses",
    "batch": ", divided by the deviation of the batch",
}


def sentences(config: Config, steps: int) -> list[str]:
    """How the policy was trained for this many steps."""
    utility, rewards = config.utility, rewards_of(config.reward_models)
    transform = TRANSFORMS[utility.transform].format_map(utility.parameters)
    found = [f"Each reward `r` becomes a utility: {transform}."]
    if len(rewards) == 1 and not is_expression(utility.combine):
        found.append("There is one reward, so its utility is what is maximised.")
    elif is_expression(utility.combine):
        found.append(f"What is maximised is the expression `{utility.combine}` of the properties.")
    else:
        combined = COMBINATIONS[utility.combine].format_map(utility.parameters)
        found.append(f"What is maximised is {combined} (of {', '.join(rewards)}).")
    return [*found, _penalty(config.align, config.algorithm), _training(config, steps), *_adapter(config)]


def _penalty(align: AlignConfig, algorithm: AlgorithmConfig) -> str:
    if align.kl_coef == 0:
        return "There was no KL penalty."
    where = (
        "subtracted from the reward"
        if algorithm.kl == "reward"
        else f"added to the loss (estimator {algorithm.kl_estimator})"
    )
    if isinstance(align.kl_coef, list):
        told = f"a coefficient that goes, by steps, through {align.kl_coef}"
    else:
        told = f"the coefficient {align.kl_coef:g}"
    if algorithm.kl_target is not None:
        told += f" to begin with, adapted to reach {algorithm.kl_target:g} nats a response"
    return f"The KL divergence from the base policy was {where}, with {told}."


def _training(config: Config, steps: int) -> str:
    align, algorithm = config.align, config.algorithm
    clipped = [
        f"{side} {bound:g}"
        for side, bound in (("below 1 -", algorithm.clip_low), ("above 1 +", algorithm.clip_high))
        if bound is not None
    ]
    clip = f", the probability ratio clipped {' and '.join(clipped)}" if clipped else ""
    return (
        f"Algorithm: {ADVANTAGES[algorithm.advantage]}{SCALED[algorithm.scale]}{clip}; {steps} steps of "
        f"{align.prompts_per_step} prompts with {align.samples_per_prompt} responses each, at temperature "
        f"{config.rollout.temperature:g} and up to {config.rollout.max_new_tokens} tokens."
    )


def _adapter(config: Config) -> list[str]:
    lora = config.policy.lora
    if lora is None:
        return []
    return [
        f"Low-rank adapters were trained (rank {lora.rank}, alpha {lora.alpha}). They are merged into the weights "
        "here; `adapter/` has them apart."
    ]


def reward_row(name: str, source: Source, scale: Scale, baseline: BaselineConfig) -> dict[str, Any]:
    """What is to be known of one reward: a row of the card's table."""
    unit = ""
    if scale.kind == BRADLEY_TERRY and scale.temperature != 1:
        unit = f", divided by {scale.temperature:.3g}"
    elif scale.kind in WRONG:
        unit = f", error rate {scale.error_rate:g}"
    return {
        "reward": name,
        "source": source.kind + (", trained with this policy" if source.trains() else ""),
        "scale": scale.kind + unit,
        "reference": reference(source, scale, baseline),
        "weight": f"{source.weight:g}",
    }


def reference(source: Source, scale: Scale, baseline: BaselineConfig) -> str:
    """What r_ref is, or why there is none."""
    if scale.kind not in REFERRED:
        return "none: the scale has a zero of its own"
    samples = (
        f"{baseline.samples} samples"
        if baseline.tolerance is None
        else f"up to {baseline.max_samples} samples"
    )
    return {
        "quantile": f"{100 * baseline.level:g} % quantile of {samples} of the base policy",
        "mean": f"mean of {samples} of the base policy",
        "canned": "mean reward of canned responses",
        "constant": f"{source.constant:g}",
        "column": "given with each prompt",
    }[source.reference or "quantile"]
