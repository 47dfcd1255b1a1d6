"""Types of the configuration. The values, and so every default, are in `conf/`; checks are in `config_checks.py`,
ranges of numbers in `config_numbers.py`.

Imports neither torch nor Ray, so that a bad configuration is refused at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

STAGES = ("sft", "reward_models", "baseline", "align", "evaluate", "report")


@dataclass
class MicrocosmConfig:
    """Size of the embedded data set (`rlhf/data/microcosm.py`)."""

    demonstrations: int
    pairs: int
    eval_share: float  # share of the prompts held out for evaluation
    seed: int


@dataclass
class DataConfig:
    """Either the microcosm, or the user's own files and hub data sets."""

    microcosm: MicrocosmConfig | None
    prompts: Any  # a file, a folder, a hub name or a pattern, or a list of these (see rlhf/data/rows.py)
    eval_prompts: Any  # likewise; null: eval_size prompts are held out of `prompts`
    eval_size: int  # evaluation prompts used, at most
    train_size: int | None  # training prompts used, at most; null: all
    demonstrations: Any  # likewise, for the sft stage
    tolerated_share: float  # of preference rows that are no pair: left out and counted; more is an error
    judge: str | None  # "microcosm", or null: the reward models judge


@dataclass
class TrainingConfig:
    """Supervised or Bradley-Terry training of one model."""

    steps: int
    batch_size: int  # examples (or pairs) a step, over all ranks
    learning_rate: float
    warmup_steps: int
    weight_decay: float


@dataclass
class ArchitectureConfig:
    """A Llama-style model made from nothing; used when neither path nor init_from is given."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    max_positions: int
    activation: str  # transformers' name: relu, silu, ...
    initializer_range: float


@dataclass
class LoraConfig:
    """Low-rank adapters, by peft. The reference policy is then the policy with its adapter off."""

    rank: int
    alpha: int  # the adapter's product is scaled by alpha / rank
    target_modules: Any  # names of modules, or "all-linear"


@dataclass
class PolicyConfig:
    path: str | None  # a finished base policy: the sft stage is skipped
    init_from: str | None  # the model that sft starts from; null: `architecture`, with random weights
    chat_template: (
        str | None
    )  # Jinja text, a file, "hh", or the name of one of the tokenizer's; null: its own
    architecture: ArchitectureConfig
    training: TrainingConfig
    lora: LoraConfig | None  # align adapters and not the policy's own weights; null: all weights


@dataclass
class UtilityConfig:
    transform: str  # a name in rlhf.utility.kinds
    combine: str  # a name in rlhf.utility.kinds, or an expression: "helpful & ~(verbose | sycophantic)"
    parameters: dict[str, float]  # of the transform and the combination
    calibrated: (
        bool  # divide Bradley-Terry rewards by their fitted temperatures first (rlhf/utility/calibration.py)
    )


@dataclass
class BaselineConfig:
    samples: int  # base-policy responses for each prompt; with a tolerance, of each round
    level: float  # of the quantile
    estimator: str  # empirical | gaussian
    tolerance: (
        float | None
    )  # sample on until r_ref's standard error is at most this, in reward units; null: one round
    max_samples: int  # responses for each prompt, at most, with a tolerance
    exact: int  # samples of a prompt kept as they are; beyond, a quantile sketch
    known: str | None  # statistics.npz of an earlier run with the same policy and reward models; null: none
    unseen: str  # prompts that `known` does not have: sample | refuse


@dataclass
class CriticConfig:
    init_from: str | None  # a causal model or sequence classifier; null: the base policy
    learning_rate: Any  # a number, or a schedule
    trace: float  # lambda of GAE: 1: no bootstrapping, 0: one step
    clip: float | None  # how far a value may move from the old one before its error stops counting; null: any


@dataclass
class AlgorithmConfig:
    """How a policy learns from the utilities of its responses (`rlhf/learn/alignment.py`)."""

    advantage: str  # a name in rlhf.learn.advantages.ADVANTAGES
    scale: str  # what divides advantages: none | group | batch
    aggregate: (
        str  # the weight of a token in the loss: response_sum | token_mean | response_mean | length_limit
    )
    epochs: int  # passes over a batch
    minibatches: int  # optimiser steps of one pass
    clip_low: float | None  # limits of the probability ratio, 1 - clip_low and 1 + clip_high; null: none
    clip_high: float | None
    importance_cap: float  # truncation of the importance weight of a stale token
    entropy_coef: float  # nats of utility for one nat of entropy
    kl: str  # where the KL penalty is: reward | loss
    kl_estimator: str  # k1 | k2 | k3
    kl_target: float | None  # nats a response; the KL coefficient is adapted to reach it; null: it is not
    kl_horizon: float  # responses over which it is adapted
    critic: CriticConfig | None  # for advantage=gae


@dataclass
class RolloutConfig:
    engine: str  # a name in rlhf.generate.engines, of an installed package, or "package.module:Class"
    options: dict[str, Any]  # the engine's own settings
    dtype: str  # of the generators
    max_new_tokens: int
    temperature: float
    slots: int  # responses that one generator samples at a time, at most
    prompts_per_item: int  # prompts in one work item: what one generator samples at a time


@dataclass
class CheckpointConfig:
    """When the stages that train save what they need to go on (`align`; `sft` and `reward_models` likewise)."""

    every: int | None  # steps; null: by minutes alone
    minutes: float | None  # since the last one; null: by steps alone
    keep: int  # newest checkpoints kept
    resume: str  # auto: the newest of the same configuration and code; never; or the folder of one


@dataclass
class AlignConfig:
    steps: int
    prompts_per_step: int
    samples_per_prompt: int
    kl_coef: Any  # a number, or a schedule [[step, value], ...] interpolated linearly
    learning_rate: Any  # likewise
    weight_decay: float
    max_grad_norm: float
    staleness: int  # versions a trained sample may be behind the policy; 0: on-policy, reproducible
    max_skipped: int  # steps in a row left out because their gradient is not finite; one more ends the run
    checkpoint: CheckpointConfig


@dataclass
class RecoveryConfig:
    """How long a role is waited for, and what is done when it ends or is stuck."""

    restarts: int  # of a stage's roles, without a trained step between them
    backoff: float  # seconds before the first restart; twice as many before each further one, 60 at most
    silence: float  # seconds without a sign of life after which a role at work is stuck
    startup: float  # seconds in which a role has to start and to load its model
    grace: float  # seconds for a checkpoint after SIGTERM or Ctrl-C


@dataclass
class EvaluateConfig:
    samples: int  # responses of each policy to each evaluation prompt
    judge_samples: int  # base responses from which the judge and the evaluators take their reference
    level: float  # of the quantile of base responses that wins, judged by evaluators
    best_of: list[int]  # best-of-n of base responses as a further policy to compare with
    every: (
        int | None
    )  # steps of align between evaluations of the policy as it is then; null: none before its end
    during_samples: int  # responses to each evaluation prompt at each of these
    policy: str  # which evaluated step's policy is kept: best (by the reward models' joint win rate) | last
    max_kl: float | None  # nats a response, of the best; null: any
    patience: (
        int | None
    )  # evaluations in a row after which align ends early (rlhf/evaluate/curve.py); null: never


@dataclass
class DeepSpeedConfig:
    zero_stage: int
    dtype: str  # of the learner's forward and backward passes; master weights are float32
    micro_batch_tokens: int  # tokens a rank puts through the model at once
    offload_optimizer: bool  # the optimiser's state and its step are the CPU's
    activation_checkpointing: bool  # decoder layers' activations are computed again in the backward pass


@dataclass
class RoleConfig:
    count: int  # processes: generators, learner ranks, replicas of each reward model
    cpus: float  # of each
    gpus: float  # of each


@dataclass
class ResourcesConfig:
    address: str | None  # of a Ray cluster; null: the job's own, or a new one on this machine
    autoscaling: bool  # the cluster may grow to what is asked
    generators: RoleConfig
    learner: RoleConfig
    reward: RoleConfig
    max_reward_replicas: int | None  # Serve adds replicas of a model up to this under load; null: never
    master_port: int | None  # of the learner's process group; null: any free one
    dashboard_port: int | None  # of Ray's dashboard; null: none


@dataclass
class WandbConfig:
    """Its key is in WANDB_API_KEY, or kept by `wandb login`."""

    mode: str  # online | offline
    entity: str | None  # a user or team; null: the key's own
    group: str | None


@dataclass
class MlflowConfig:
    """Its key is in MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""

    mode: str  # online | offline
    uri: (
        str | None
    )  # of a server; null: MLFLOW_TRACKING_URI. Offline sqlite:///FILE; null: mlflow.db in output_dir
    experiment: str | None  # null: logging.project


@dataclass
class TrackioConfig:
    """Its key is in HF_TOKEN, or kept by `hf auth login`; of a server in TRACKIO_WRITE_TOKEN."""

    mode: str  # online | offline
    space: str | None  # a Hugging Face Space, OWNER/NAME
    server: str | None  # the address of a server of one's own
    group: str | None


@dataclass
class LoggingConfig:
    live: str  # auto | plain | off
    loggers: list[str]  # names in rlhf.loggers.kinds or of entry points, or package.module:Class
    project: str  # of W&B and Trackio; MLflow's experiment
    run: str | None  # the run's name; null: that of its folder
    tags: list[str]
    patience: float  # seconds in which a logger has to take what is left, at the end of align and of the run
    wandb: WandbConfig
    mlflow: MlflowConfig
    trackio: TrackioConfig
    custom: dict[str, Any]  # settings of loggers of your own


@dataclass
class HubConfig:
    """Where the aligned policy is pushed to. The token is in HF_TOKEN, or kept by `hf auth login`."""

    repo: str | None  # OWNER/NAME; null: nowhere
    private: bool  # of a repository that is not there yet
    license: str | None  # of the model card; null: it says none


@dataclass
class ServeConfig:
    """`rlhf serve`: the reward pool over HTTP."""

    host: str
    port: int
    token_env: (
        str | None
    )  # environment variable with the token that clients show; null: one is made, and kept in a file
    unseen: str  # prompts whose references need samples that are not there: sample | refuse
    max_body: int  # bytes of a request
    max_responses: int  # of a request
    timeout: float  # seconds of a request
    batch: int  # responses of several requests that are scored together, at most
    drain: float  # seconds for requests under way when it is ended
    strip: list[str]  # texts that end responses where a client's tokenizer leaves them there


@dataclass
class PlanConfig:
    """`rlhf plan`: the memory and the time that a run needs."""

    response_tokens: int | None  # how long responses are expected to get; null: rollout.max_new_tokens
    measure: bool  # run two steps of align first, and tell the time from them


@dataclass
class StudyConfig:
    """A cell of a sweep that is compared with its other cells (`rlhf/evaluate/comparison.py`)."""

    arm: str  # what is compared: a name in conf/arm
    point: str  # which of kl_coefs
    kl_coefs: dict[str, float]


@dataclass
class Config:
    stages: list[str]
    seed: int
    dtype: str  # float32 | bfloat16 | auto: bfloat16 where the processor multiplies it faster
    output_dir: str
    trust_remote_code: bool  # run code that comes with a given model or tokenizer
    data: DataConfig
    policy: PolicyConfig
    reward_models: dict[str, Any]  # sources of rewards (rlhf/sources/source.py), typed by their kinds
    evaluators: dict[str, Any]  # likewise, never optimised: they judge by the reward of the same name
    utility: UtilityConfig
    baseline: BaselineConfig
    algorithm: AlgorithmConfig
    rollout: RolloutConfig
    align: AlignConfig
    evaluate: EvaluateConfig
    deepspeed: DeepSpeedConfig
    resources: ResourcesConfig
    recovery: RecoveryConfig
    logging: LoggingConfig
    hub: HubConfig
    serve: ServeConfig
    plan: PlanConfig
    study: StudyConfig | None
