"""Running processes, kept for as long as they fit: the jobs of a sweep share them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from actors.fault import Fault

if TYPE_CHECKING:
    from actors.cluster import Births, Cluster
    from rlhf.config import Config


class Session:
    """A Ray connection and the roles on it, each with what it was made from.

    A role is made again when it is asked for with another `key`; the one before ends then. Ray is started in a thread
    that lives as long as the session: its processes end with the thread that started them.
    """

    def __init__(self) -> None:
        self._background = ThreadPoolExecutor(1)
        self._starting: Future[Cluster] | None = None
        self._births: Births | None = None  # of the start that is under way
        self._renewed = False  # whether there was a Ray before
        self._roles: dict[str, tuple[str, Any]] = {}

    def start(self, config: Config) -> None:
        """Starts Ray, or the connection to it, in the background, unless that was done."""
        if self._starting is None:
            from actors.cluster import Births, Cluster

            self._births = Births()
            self._starting = self._background.submit(Cluster, config)

    def hold(self, cluster: Cluster) -> None:
        """Takes a connection that is there already."""
        self._starting = Future()
        self._starting.set_result(cluster)

    @property
    def cluster(self) -> Cluster:
        """
        Raises:
            ValueError: there is none, and none starts.
            Fault: the one before has ended, and no other starts; or a process that the start has made has ended.
        """
        assert self._starting is not None
        try:
            return self._starting.result()
        except ValueError as error:
            if self._renewed or (self._births is not None and self._births.ended()):
                raise Fault(str(error)) from error
            raise

    @property
    def stuck(self) -> bool:
        """Whether a Ray does not come up in this process any more."""
        starting = self._starting
        return starting is not None and (not starting.done() or starting.exception() is not None)

    def role(self, name: str, key: str, make: Callable[[], Any]) -> Any:
        """The running role of this name, made if there is none of this key."""
        if name in self._roles and self._roles[name][0] != key:
            _, old = self._roles.pop(name)
            old.stop()
        if name not in self._roles:
            self._roles[name] = (key, make())
        return self._roles[name][1]

    def release(self) -> None:
        """Ends the roles, and so gives their CPUs and GPUs back; the connection stays.

        Raises:
            Fault: one of them could not be ended; the others are.
        """
        roles, self._roles = self._roles, {}
        faults = []
        for _, role in roles.values():
            try:
                role.stop()
            except Fault as fault:
                faults.append(fault)
        if faults:
            raise faults[0]

    def fault(self) -> str | None:
        """What of a Ray of this session's own has ended; None: nothing, as far as is known."""
        starting = self._starting
        if starting is None:
            return None
        if not starting.done():
            return None if self._births is None else self._births.dead()
        return None if starting.exception() is not None else starting.result().fault()

    def renew(self, config: Config, entirely: bool) -> None:
        """Ends the roles, whatever state they are in, so that they are made anew; `entirely`, or when it does not
        answer, a Ray of this session's own too."""
        cluster = self.cluster
        entirely = cluster.own and (entirely or cluster.fault() is not None)
        if not entirely:
            try:
                return self.release()
            except Fault:
                if not cluster.own:
                    raise
        self._roles = {}
        cluster.stop(by_force=True)
        self._starting, self._renewed = None, True
        return self.start(config)

    def stop(self, exiting: bool = False) -> None:
        """Ends what was started: on a cluster that was there, its roles; else Ray itself. A process that is `exiting`
        at once waits for no Ray of its own, which may still be starting: that ends with the process."""
        starting, self._starting = self._starting, None
        if starting is not None and (starting.done() or not exiting) and starting.exception() is None:
            cluster = starting.result()
            if not cluster.own:
                self.release()
            if not exiting:
                cluster.stop()
        self._roles = {}
        self._background.shutdown(wait=not exiting)
