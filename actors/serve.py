"""`rlhf serve`: the reward pool over HTTP, for as long as nobody ends it.

rlhf serve ...                 the overrides of a run: models, references and utility are those of that run
rlhf serve data=none ...       no prompts of its own: references are made when they are asked for
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import HTTPOptions

from actors.fault import Fault
from actors.generator import Generator
from actors.resources import actor_options
from actors.reward_pool import RewardPool
from actors.server import Served, server
from actors.signals import orderly
from actors.stages.align import Align
from actors.stages.baseline import Baseline
from actors.stages.job import Job
from actors.stages.reward_models import RewardModels
from actors.stages.sft import Sft
from rlhf.config import Config
from rlhf.serving.protocol import ModelInfo
from rlhf.sources.source import rewards_of
from rlhf.utility.kinds import TRANSFORM_KINDS

TOKEN = "token"
PATHS = "/v1/rewards, /get_reward, /slime, /classify; /health, /metrics, /openapi.json"
SLACK = 5.0  # seconds beyond a request's own limit that Serve gives it
LOOK = 1.0  # seconds between two looks at whether all is well


def token_of(config: Config, folder: Path) -> tuple[str, str]:
    """The token that clients show, and where it is from, in words.

    Raises:
        ValueError: the environment variable that is named is not set; it names the key.
    """
    name = config.serve.token_env
    if name is not None:
        token = os.environ.get(name, "")
        if not token:
            raise ValueError(f"serve.token_env={name}: there is no such environment variable, or it is empty")
        return token, f"the environment variable {name}"
    token = secrets.token_urlsafe(32)
    path = folder / TOKEN
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token + "\n")
    return token, str(path)


def serve_rewards(job: Job, folder: Path) -> None:
    """Makes what is not there, and serves until a signal asks it to end and what is asked is answered."""
    config, settings = job.config, job.config.serve
    token, whence = token_of(config, folder)
    job.roles.http = HTTPOptions(
        host=settings.host, port=settings.port, request_timeout_s=settings.timeout + SLACK
    )
    job.make_all()
    with orderly(settings.drain, "requests under way are answered") as asked:
        pool = job.roles.rewards
        served = _served(job, pool)
        app = server(served, token, settings)
        serve.run(app, name="server", route_prefix="/", logging_config={"log_level": "ERROR"})
        job.view.line(f"serve: rewards {', '.join(served.models)} at {PATHS}")
        job.view.line(f"serve: http://{settings.host}:{settings.port}, the token is in {whence}")
        well = time.monotonic()
        while not asked():
            time.sleep(LOOK)
            if not _unwell(pool):
                well = time.monotonic()
            elif time.monotonic() - well > config.recovery.startup:
                raise Fault(
                    f"Serve's applications are not well for {config.recovery.startup:g} s: {_unwell(pool)}"
                )
        serve.delete("server")


def _unwell(pool: RewardPool) -> str:
    """What is wrong with what serves; "": nothing. A replica that died is started again meanwhile."""
    found = serve.status().applications
    states = {name: found[name].status if name in found else "gone" for name in ("server", pool.name)}
    return "; ".join(f"{name}: {state}" for name, state in states.items() if state != "RUNNING")


def _served(job: Job, pool: RewardPool) -> Served:
    config, stages = job.config, job.stages
    baseline, models, utility = stages.of(Baseline), stages.of(RewardModels), stages.of(Align).utility
    known = "baseline" in config.stages
    rewards = rewards_of(config.reward_models)
    needs_base = TRANSFORM_KINDS[utility.transform].needs_base
    generator, policy = None, None
    if (needs_base or any(r.sampled for r in baseline.rules.values())) and config.serve.unseen == "sample":
        options = {**actor_options(config.resources.generators), "max_restarts": -1, "max_task_retries": 2}
        policy = stages.of(Sft).policy_path
        actor = ray.remote(Generator).options(**options)
        generator = actor.remote(0, config.rollout, config.policy.chat_template, config.resources.generators)
        ray.get(generator.load.remote(policy), timeout=config.recovery.startup)
    served = Served(
        pool=pool.name,
        estimator=job.roles.baseline.actor,
        statistics=str(baseline.statistics_path) if known else None,
        keys=baseline.keys if known else dict.fromkeys(baseline.rules, "served"),
        exact=config.baseline.exact,
        generator=generator,
        policy=policy,
        models={
            name: ModelInfo(
                kind=own.kind,
                scale=utility.scale(name).kind,
                temperature=utility.scale(name).temperature,
                error_rate=utility.scale(name).error_rate,
                weight=own.weight,
                fingerprint=models.names[name],
            )
            for name, own in rewards.items()
        },
        reads_columns=any(source.reads_columns for source in config.reward_models.values()),
        utility=utility,
        rules=baseline.rules,
        canned={name: own.canned for name, own in rewards.items() if own.reference == "canned"},
        samples=config.baseline.samples,
        seed=config.seed,
    )
    asyncio.run(served.open_estimator())
    return served
