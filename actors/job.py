"""The Ray job: Hydra's entry, what is checked before Ray starts, and Ray's start and stop.

rlhf utility=linear align.kl_coef=0.1      one run
rlhf -m utility=lsc,linear                 a sweep
rlhf experiment=study                      the comparison of methods, a sweep of conf/arm
rlhf --cfg job                             the composed configuration
rlhf serve ...                             the rewards of such a run over HTTP
rlhf plan ...                              the memory that such a run needs, and its time
rlhf doctor ...                            whether this machine can do that
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from actors.errors import told
from actors.leftovers import keep
from actors.session import Session
from actors.signals import Ended, deaf, end_by_signals, leave
from actors.sweep import Sweep
from rlhf.config import Config
from rlhf.config_checks import typed
from rlhf.config_serving import to_serve

CONFIGURATION = Path(__file__).resolve().parents[1] / "conf"
COMMANDS = ("serve", "plan", "doctor")  # beside a run
NO_RUNS = ("plan", "doctor")  # leave no folder of a run
_command = ""  # one of these, or none
IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the entry point of a submitted job


def main() -> None:
    """The console script. A user's error ends it with status 1 and one line; SIGTERM with 143, SIGINT with 130."""
    global _command
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        _command = sys.argv.pop(1)
    os.environ.setdefault("RLHF_OUTPUT_DIR", _default_output())
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, and prints none
    os.environ["RAY_DISABLE_FAILURE_SIGNAL_HANDLER"] = "1"  # it replaces ours, and aborts on SIGTERM
    OmegaConf.register_new_resolver("home", os.path.expanduser, replace=True)  # for conf/config.yaml
    # overrides on both sides of the flag would be refused
    flags = [word for word in sys.argv[1:] if word in ("-m", "--multirun")]
    sys.argv[1:] = [*flags, *(word for word in sys.argv[1:] if word not in flags)]
    end_by_signals()
    try:
        os.getcwd()
    except FileNotFoundError:
        sys.exit("error: the working directory was deleted; call the command from another")
    try:
        with _scratch() if _command in NO_RUNS else nullcontext():
            _run()
        if Sweep.current is not None:
            Sweep.current.finish()
    except Ended as ended:
        deaf()
        Sweep.close(exiting=True)
        leave(ended.number)
    except Exception as error:
        sys.exit(told(error))
    finally:
        Sweep.close()


@contextmanager
def _scratch() -> Iterator[None]:
    """A folder for what a command that is no run writes, and Hydra of it; it is removed."""
    if sys.argv[1:2] and sys.argv[1] in ("-m", "--multirun"):
        sys.exit(f"error: rlhf {_command} is no sweep: leave -m out")
    with tempfile.TemporaryDirectory(prefix=f"rlhf-{_command}-") as folder:
        # beside the other overrides: those on both sides of a flag would be refused
        places = [i for i, word in enumerate(sys.argv) if i and "=" in word and not word.startswith("-")]
        at = places[0] if places else len(sys.argv)
        sys.argv[at:at] = [f"hydra.run.dir={folder}", "~hydra.callbacks.sweep"]
        yield


def _default_output() -> str:
    """`outputs` here; in a submitted job, whose working directory is a temporary copy, in the home directory."""
    return str(Path.home() / "rlhf-outputs") if IN_JOB in os.environ else "outputs"


# By place: as a package, `conf` would be a folder of that name where the command is called.
@hydra.main(version_base=None, config_path=str(CONFIGURATION), config_name="config")
def _run(values: DictConfig) -> None:
    folder = Path(HydraConfig.get().runtime.output_dir).absolute()
    session = Session()
    try:
        config = typed(values, _command == "serve")
        if _command and Sweep.current is not None:
            raise ValueError(f"rlhf {_command} is no sweep: leave -m out")
        if _command == "doctor":
            from actors.doctor.command import examine
            from rlhf.progress import View

            sys.exit(0 if examine(config, folder, View("plain").line) else 1)
        if _command == "plan":
            plan(config, session)
        elif Sweep.current is None:
            run(config, folder, OmegaConf.to_yaml(values, resolve=True), session)
        else:
            Sweep.current.job(config, folder, OmegaConf.to_yaml(values, resolve=True), run)
    except Exception as error:  # here, where Ray is still there to read it; Hydra would add words of its own
        keep()
        sys.exit(told(error))
    except Ended:
        deaf()
        session.stop(exiting=True)
        raise
    finally:
        session.stop()


def plan(config: Config, session: Session) -> None:
    """Says what a run of this configuration needs.

    Raises:
        ValueError: the configuration cannot work.
    """
    from actors.plan import tell_plan
    from rlhf.progress import View
    from rlhf.store import Store

    view = View("plain")  # what it says is all that it does
    root = Path(config.output_dir).expanduser().absolute()
    tell_plan(config, Store(root / "store", view.line), session, view.line)


def run(config: Config, folder: Path, resolved: str, session: Session) -> None:
    """One run, into `folder`. The session, and with it Ray, goes on.

    Raises:
        ValueError: what the user gave cannot work; most of it is found before Ray starts.
    """
    from actors.preflight import check_outlets, preflight
    from actors.resources import check_port
    from actors.stages.align import Align
    from actors.stages.stage import Stages
    from rlhf.files import link, write_atomic
    from rlhf.progress import View
    from rlhf.publish.hub import push
    from rlhf.shown import redacted
    from rlhf.store import Store
    from rlhf.versions import versions

    started, serving = time.perf_counter(), _command == "serve"
    view = View(config.logging.live)
    root = Path(config.output_dir).expanduser().absolute()
    view.line(f"run {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.yaml", redacted(resolved))
    write_atomic(folder / "versions.json", json.dumps(versions(), indent=1))
    store = Store(root / "store", view.line)
    store.sweep()
    if serving:
        check_port("serve.port", config.serve.port, config.serve.host)
        config = to_serve(config)
    stages = Stages(config, preflight(config, store, serving), store)
    if not serving:
        check_outlets(stages, view.line)
    if serving or not stages.complete():
        session.start(config)
    from actors.stages.job import Job  # seconds of imports, while Ray starts

    job = Job(stages, session, folder, view, started)
    if serving:
        from actors.serve import serve_rewards

        serve_rewards(job, folder)
    else:
        job.execute()
        link(root / "latest", folder)
        if config.hub.repo is not None:
            view.line(f"hub: {push(stages.of(Align).policy_path, config.hub)}")
