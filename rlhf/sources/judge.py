"""A judge: a language model that reads a rubric with a prompt and a response, behind a chat endpoint of OpenAI's form.

A response that asks its judge for a good grade may get one, and one that spells the control tokens of the judge's
template is read as them: a judge is a reward like others, to be watched and combined.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jinja2 import Template, TemplateError
from jinja2.meta import find_undeclared_variables

from rlhf.config_numbers import POSITIVE, Range
from rlhf.sources.answers import named
from rlhf.sources.client import Client, Request, told
from rlhf.sources.remote import RemoteSource
from rlhf.sources.source import Batch, Place, RewardSource, Rows
from rlhf.sources.text import conversation, environment, given_text, spoken
from rlhf.types import Content, Response
from rlhf.utility.scales import LOG_ODDS, NUMBER, PROBABILITY, VERDICT

if TYPE_CHECKING:
    from rlhf.types import Prompt

log = logging.getLogger(__name__)

SCALES = {"log_odds": (LOG_ODDS,), "verdict": (VERDICT,), "grade": (NUMBER, PROBABILITY)}  # of each answer
UNKNOWN = -9999.0  # a log-probability that servers give where they have none
ROUNDING = 1e-3  # by which one may be above 0


@dataclass(kw_only=True)
class JudgeSource(RemoteSource):
    """The settings of a judge."""

    model: str | None
    rubric: str  # Jinja text, or a file: prompt, response, messages, and the columns by name
    system: str | None
    answer: str  # log_odds | verdict | grade
    accept: str
    reject: str
    grade_max: float
    top_logprobs: int
    max_tokens: int  # of a verdict or a grade

    ranges: ClassVar[Mapping[str, Range]] = {
        **RemoteSource.ranges,
        "grade_max": POSITIVE,
        "top_logprobs": Range(2),
        "max_tokens": POSITIVE,
    }

    def check(self, key: str) -> None:
        super().check(key)
        if self.answer not in SCALES:
            raise ValueError(f"{key}.answer={self.answer} is not one of {', '.join(SCALES)}")
        if self.scale not in SCALES[self.answer]:
            raise ValueError(
                f"{key}.scale={self.scale} does not fit {key}.answer={self.answer}; set scale to "
                f"{' or '.join(SCALES[self.answer])}"
            )
        if self.answer == "grade" and self.scale == PROBABILITY and self.error_rate == 0:
            raise ValueError(
                f"{key}.error_rate=0: the least and the best grade would be a probability of 0 and of 1, whose log, or "
                "that of its complement, is infinite; give the share of its grades that are wrong"
            )
        for name, word in {"accept": self.accept, "reject": self.reject}.items():
            if not _plain(word):
                raise ValueError(f"{key}.{name} is empty: give the word with which that answer begins")
        if _plain(self.accept)[0] == _plain(self.reject)[0]:
            raise ValueError(
                f"{key}.accept={self.accept} and {key}.reject={self.reject} begin alike: the first token of an answer "
                "could be of either; choose words with different first letters"
            )
        if self.model is None:
            raise ValueError(f"{key}.model is missing: give the name by which the server knows the judge")
        self._check_rubric(f"{key}.rubric")

    def _check_rubric(self, key: str) -> None:
        try:
            used = find_undeclared_variables(environment().parse(given_text(key, self.rubric)))
        except TemplateError as error:
            raise ValueError(f"{key} is no Jinja text: {error}") from error
        if "response" not in used:
            raise ValueError(
                f"{key} does not show the response: write {{{{ response }}}} where it is to stand"
            )

    def identity(self) -> Any:
        return super().identity() | {"rubric": given_text("rubric", self.rubric)}

    def preflight(self, key: str, prompts: Sequence[Prompt]) -> None:
        super().preflight(key, prompts)
        rubric = Rubric(f"{key}.rubric", self.rubric)
        taken = {"prompt", "response", "messages"} & {name for p in prompts for name in p.meta}
        if taken:
            raise ValueError(
                f"{key}.rubric: the prompts' data set has a column '{min(taken)}', which is the name of what "
                "every rubric may use; rename the column"
            )
        for prompt in prompts:
            rubric.text(prompt.content, "", prompt.meta, prompt.source)

    def open(self, name: str, place: Place) -> RewardSource:
        return Judge(self, Client(self.server(name, "/chat/completions")))


class Rubric:
    """What the judge is asked of a response, by the rubric's text."""

    def __init__(self, key: str, given: str) -> None:
        self.key = key
        self._template: Template = environment(strict=True).from_string(given_text(key, given))

    def text(self, content: Content, response: Response, columns: Mapping[str, Any], where: str) -> str:
        """
        Raises:
            ValueError: it cannot be written for this prompt; it names `where`.
        """
        turns = conversation(content, response)
        asked, answered = turns[: -_own(response)], turns[-_own(response) :]
        known = {"prompt": spoken(asked), "response": spoken(answered), "messages": asked}
        try:
            return self._template.render({**columns, **known})
        except Exception as error:  # what the sandbox refuses, and all that its operations raise
            names = ", ".join([*known, *columns])
            raise ValueError(f"{self.key}: {error}, for {where}; it may use {names}") from None


class Judge:
    """A reward for each response, by one question to the judge each.

    log_odds: the log of the probability that the answer begins as `accept` does, less the log of that of `reject`,
    over the likeliest first tokens. A side that is not among them has at most the probability of the least likely of
    them, and is given it: the reward is then nearer to 0 than the judge's own, which `notes` count.
    """

    alone = False

    def __init__(self, settings: JudgeSource, client: Client) -> None:
        self.notes: list[str] = []
        self.settings, self.client, self.who = settings, client, client.server.name
        self._rubric = Rubric(f"{self.who}: rubric", settings.rubric)
        self._bounds, self._answers, self._lock = 0, 0, threading.Lock()  # answers with one side only, all
        self._accept, self._reject = _plain(settings.accept), _plain(settings.reject)

    def score(self, batch: Batch) -> Rows:
        return [[*self.client.ask([self._request(batch, row) for row in range(len(batch))])]]

    def _request(self, batch: Batch, row: int) -> Request[float]:
        given, about = self.settings, named(batch, row)
        columns = {name: values[row] for name, values in batch.columns.items()}
        question = self._rubric.text(batch.prompts[row], batch.responses[row], columns, about)
        system = [] if given.system is None else [{"role": "system", "content": given.system}]
        fields = {
            "model": given.model,
            "messages": [*system, {"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": given.max_tokens,
        }
        if given.answer == "log_odds":
            fields |= {"max_tokens": 1, "logprobs": True, "top_logprobs": given.top_logprobs}
        read = {"log_odds": self._log_odds, "verdict": self._verdict, "grade": self._grade}[given.answer]
        return Request(given.body(fields), about, lambda answer: read(self._choice(answer, about), about))

    def _choice(self, answer: Any, about: str) -> dict[str, Any]:
        choices = answer.get("choices") if isinstance(answer, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict) or not isinstance(choice.get("message"), dict):
            raise ValueError(
                f"{self.who} returned {told(answer)} for {about}: no answer of a chat endpoint; check url"
            )
        return choice

    def _log_odds(self, choice: dict[str, Any], about: str) -> float:
        tokens = self._tokens(choice, about)
        likely = {"accept": self._accept, "reject": self._reject}
        sides = {side: _log_sum(p for t, p in tokens if _begins(t, word)) for side, word in likely.items()}
        missing = [side for side, value in sides.items() if value == -math.inf]
        if len(missing) == 2:
            came = ", ".join(f"{token!r} {math.exp(p):.2g}" for token, p in tokens[:5])
            raise ValueError(
                f"{self.who}: neither {self.settings.accept!r} nor {self.settings.reject!r} is among the "
                f"{len(tokens)} likeliest beginnings of the judge's answer for {about}; they are {came}; "
                "ask for it more clearly in the rubric, or set answer=verdict and scale=verdict"
            )
        self._count(len(missing))
        for side in missing:
            sides[side] = min(p for _, p in tokens)
        return sides["accept"] - sides["reject"]

    def _tokens(self, choice: dict[str, Any], about: str) -> list[tuple[str, float]]:
        """The likeliest first tokens with their log-probabilities, the likeliest first."""
        try:
            first = choice["logprobs"]["content"][0]
            listed = list(first.get("top_logprobs") or [])
            if all(entry["token"] != first["token"] for entry in listed):
                listed.append(first)
            pairs = [(entry["token"], entry["logprob"]) for entry in listed]
        except (TypeError, KeyError, IndexError, AttributeError):
            raise ValueError(
                f"{self.who} returned no log-probabilities of the answer's first token for {about}; set "
                "answer=verdict and scale=verdict (with an error_rate), or answer=grade"
            ) from None
        known = [(token, p) for token, p in pairs if p is not None]
        if not all(isinstance(token, str) and _is_log_probability(p) for token, p in known):
            raise ValueError(
                f"{self.who} returned {told(pairs)} as log-probabilities for {about}; they must be numbers up to 0"
            )
        known = [(token, p) for token, p in known if p > UNKNOWN]
        if not known:
            raise ValueError(f"{self.who} returned {told(pairs)} for {about}: no log-probability is known")
        return sorted(known, key=lambda pair: -pair[1])

    def _count(self, missing: int) -> None:
        with self._lock:
            self._bounds, self._answers = self._bounds + missing, self._answers + 1
            if not self._bounds:
                return
            self.notes[:] = [
                f"{self._bounds} of {self._answers} answers of {self.who} had only one of {self.settings.accept!r} and "
                f"{self.settings.reject!r} among their likeliest beginnings: their log-odds are bounds"
            ]
            if self._bounds == missing == 1:
                log.warning("%s", self.notes[0])

    def _verdict(self, choice: dict[str, Any], about: str) -> float:
        said = self._said(choice, about)
        for word, verdict in {self._accept: 1.0, self._reject: 0.0}.items():
            if re.match(rf"{re.escape(word)}(?!\w)", _plain(said)):
                return verdict
        raise ValueError(
            f"{self.who} answered {told(said)!r} for {about}: that begins with neither {self.settings.accept!r} nor "
            f"{self.settings.reject!r}; ask for it more clearly in the rubric"
        )

    def _grade(self, choice: dict[str, Any], about: str) -> float:
        said, most = self._said(choice, about), self.settings.grade_max
        found = re.search(r"-?\d+(?:\.\d+)?", said)
        grade = float(found[0]) if found else math.nan
        if not 0 <= grade <= most:
            raise ValueError(
                f"{self.who} answered {told(said)!r} for {about}: there must be a grade from 0 to {most:g}; "
                "ask for it more clearly in the rubric"
            )
        return grade / most if self.settings.scale == PROBABILITY else grade

    def _said(self, choice: dict[str, Any], about: str) -> str:
        said = choice["message"].get("content")
        if not isinstance(said, str) or not said.strip():
            raise ValueError(
                f"{self.who} answered no text for {about} (finish_reason {choice.get('finish_reason')!r}); raise "
                "max_tokens, or choose a judge that answers at once"
            )
        return said


def _own(response: Response) -> int:
    """How many turns at the end are the response's."""
    return 1 if isinstance(response, str) else len(response)


def _plain(token: str) -> str:
    """A token or a word as it is compared: tokenizers spell a space before it in several ways."""
    return token.strip(" \t\r\n▁Ġ").casefold()


def _begins(token: str, word: str) -> bool:
    """Whether an answer whose first token is this one may begin with the word.

    >>> [_begins(token, "yes") for token in ("Yes", " Y", "yes,", "yesterday", "", "no")]
    [True, True, True, False, False, False]
    """
    token = _plain(token)
    return bool(token) and (word.startswith(token) or bool(re.match(rf"{re.escape(word)}(?!\w)", token)))


def _log_sum(logs: Iterator[float]) -> float:
    values = [*logs]
    most = max(values, default=-math.inf)
    return most if most == -math.inf else most + math.log(sum(math.exp(value - most) for value in values))


def _is_log_probability(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value <= ROUNDING
