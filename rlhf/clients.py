"""Rewards of `rlhf serve` for other trainers: TRL's `reward_funcs`, verl's `compute_score`. Neither torch nor Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import requests

URL, TOKEN = "RLHF_SERVE_URL", "RLHF_SERVE_TOKEN"
AGAIN = (429, 502, 503, 504)  # answers after which the call is made again


class RewardFunction:
    """A reward function for TRL's trainers: `GRPOTrainer(..., reward_funcs=RewardFunction("http://127.0.0.1:8008"))`.

    Args:
        url: of the server; None: the environment variable RLHF_SERVE_URL.
        token: the environment variable that holds the token.
        value: what of the answer is the reward: "combined" (the utility that `rlhf` maximises), or "raw.NAME",
            "utility.NAME", "p_good.NAME" of one reward.
        columns: of the data set, that the server's functions and judges read.
        timeout: seconds of one call.
        retries: further calls if the server does not answer, or is not ready.

    Raises:
        ValueError: by a call: the server refuses it, or stays away; it says why.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str = TOKEN,
        value: str = "combined",
        columns: Sequence[str] = (),
        timeout: float = 300.0,
        retries: int = 5,
    ) -> None:
        self.__name__ = f"rlhf {value}"  # as TRL logs it
        self._url, self._token = (url or _environment(URL)).rstrip("/"), token
        self._value, self._columns = value.split("."), tuple(columns)
        self._timeout, self._retries = timeout, retries

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        """One number for each completion; None where the reward does not apply."""
        conversations = []
        rows = list(range(len(prompts)))
        for _, group in groupby(
            rows, key=lambda i: (repr(prompts[i]), *(repr(columns[c][i]) for c in self._columns))
        ):
            same = list(group)
            conversations.append(
                {
                    "prompt": prompts[same[0]],
                    "responses": [_text(completions[i]) for i in same],
                    "columns": {name: columns[name][same[0]] for name in self._columns},
                }
            )
        results = self.ask(conversations)
        return [value for result in results for value in self._chosen(result)]

    def ask(self, conversations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The server's own answer for conversations: raw, reference, utility, p_good, combined of each."""
        raw_only = self._value[0] == "raw"
        headers = {"Authorization": f"Bearer {_environment(self._token)}"}
        body: Any = {"conversations": list(conversations), "raw_only": raw_only}
        for attempt in range(self._retries + 1):
            if attempt:
                time.sleep(min(60.0, 2.0**attempt))
            try:
                answer = requests.post(
                    f"{self._url}/v1/rewards", json=body, headers=headers, timeout=self._timeout
                )
            except requests.RequestException as error:
                why = type(error).__name__
                continue
            if answer.status_code in AGAIN:
                why = f"status {answer.status_code}"
                continue
            if not answer.ok:
                raise ValueError(f"{self._url} refused the call ({answer.status_code}): {answer.text[:500]}")
            return answer.json()["results"]
        raise ValueError(
            f"{self._url} gave no rewards after {self._retries + 1} calls ({why}): is it running?"
        )

    def _chosen(self, result: Mapping[str, Any]) -> list[float | None]:
        kind, *name = self._value
        found = result.get(kind)
        if name and isinstance(found, Mapping):
            found = found.get(".".join(name))
        if not isinstance(found, list):
            raise ValueError(
                f"{self._url} has no '{'.'.join(self._value)}': it gives {', '.join(result['raw'])}"
            )
        return found


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    **_: Any,
) -> dict[str, float]:
    """A custom reward function for verl (custom_reward_function.path=.../rlhf/clients.py, name=compute_score).

    The server is that of RLHF_SERVE_URL, with the token of RLHF_SERVE_TOKEN. The prompt is `extra_info["prompt"]`, text
    or messages; `ground_truth` and `data_source` reach the server's functions as columns. Returns "score", the combined
    utility, and the raw reward of each source by its name.

    Raises:
        ValueError: there is no prompt, or the server refuses the call or stays away.
    """
    prompt = (extra_info or {}).get("prompt")
    if prompt is None:
        raise ValueError("extra_info has no 'prompt', which rewards are of: add that column to the data")
    columns = {"ground_truth": ground_truth, "data_source": data_source}
    (found,) = RewardFunction().ask([{"prompt": prompt, "responses": [solution_str], "columns": columns}])
    raw = {name: values[0] for name, values in found["raw"].items() if values[0] is not None}
    return {"score": found["combined"][0], **raw}


def _text(completion: Any) -> str:
    """Of a text, or of messages what the last says."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _environment(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise ValueError(f"the environment variable {name} is not set")
    return value
