"""What the server is asked and answers: our own batch call, and what clients of others already send."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, field_validator

from rlhf.types import Content


class Message(BaseModel):
    """One turn; other keys that a chat template reads may follow."""

    model_config = ConfigDict(extra="allow")
    role: Annotated[str, StringConstraints(pattern=r"^(system|developer|user|assistant|tool)$")]
    content: str


class Conversation(BaseModel):
    """A prompt and responses to it."""

    model_config = ConfigDict(extra="forbid")
    prompt: str | Annotated[list[Message], Field(min_length=1)]
    responses: list[str]
    columns: dict[str, JsonValue] = Field(
        default_factory=dict, description="what functions and judges read of a row"
    )

    @field_validator("prompt")
    @classmethod
    def _asks(cls, prompt: str | list[Message]) -> str | list[Message]:
        if not isinstance(prompt, str) and all(m.role == "assistant" for m in prompt):
            raise ValueError("nobody asks anything in it")
        return prompt

    @property
    def content(self) -> Content:
        return self.prompt if isinstance(self.prompt, str) else [m.model_dump() for m in self.prompt]


class RewardsRequest(BaseModel):
    """Several prompts, each with several responses."""

    model_config = ConfigDict(extra="forbid")
    conversations: list[Conversation]
    raw_only: bool = Field(
        default=False, description="only the sources' numbers: no reference is needed for them"
    )


class ModelInfo(BaseModel):
    """A reward: where it comes from and what its numbers mean."""

    kind: str
    scale: str
    temperature: float
    error_rate: float
    weight: float
    fingerprint: str


Numbers = dict[str, list[float | None]]


class ConversationRewards(BaseModel):
    """By reward, for each response; null where a reward does not apply to the prompt."""

    raw: Numbers
    reference: dict[str, float | None] | None = Field(default=None, description="r_ref of the prompt")
    utility: Numbers | None = Field(default=None, description="transformed, calibrated")
    p_good: Numbers | None = Field(default=None, description="null too for a scale without a probability")
    combined: list[float] | None = Field(default=None, description="what a learner would maximise")


class RewardsResponse(BaseModel):
    models: dict[str, ModelInfo]
    results: list[ConversationRewards]


class GetRewardRequest(BaseModel):
    """OpenRLHF's: `query` is the whole text, prompt and response; `prompts` what it begins with."""

    query: list[str]
    prompts: list[str]
    labels: list[JsonValue] | None = None


class GetRewardResponse(BaseModel):
    rewards: list[float]
    scores: list[float]
    extra_logs: Numbers


class SampleRequest(BaseModel):
    """slime's: one response."""

    prompt: str | Annotated[list[Message], Field(min_length=1)]
    response: str
    label: JsonValue = None


class ClassifyRequest(BaseModel):
    """vLLM's: texts, or one conversation, whose last message is the response."""

    model: str | None = None
    input: str | list[str] | None = None
    messages: list[Message] | None = None


class Class(BaseModel):
    index: int
    label: str
    probs: list[float | None]
    num_classes: int


class ClassifyResponse(BaseModel):
    id: str
    object: str = "list"
    created: int
    model: str
    data: list[Class]


class Health(BaseModel):
    status: str
    models: list[str]


class Fault(BaseModel):
    detail: Any


class Unavailable(Exception):
    """What scores is not there now; it may be later."""


class Scorer(Protocol):
    """What stands behind the application."""

    models: dict[str, ModelInfo]

    async def ready(self) -> bool:
        """Whether it can score now."""

    async def score(self, conversations: Sequence[Conversation], raw_only: bool) -> list[ConversationRewards]:
        """
        Raises:
            ValueError: of what was asked something cannot be scored; it says what.
            Unavailable: it cannot score now.
        """


def response_of(query: str, prompt: str, strip: Sequence[str]) -> str:
    """What follows the prompt in a text, without what ends it.

    >>> response_of("<s>Hi?Yes.</s>", "<s>Hi?", ["</s>"])
    'Yes.'

    Raises:
        ValueError: the text does not begin with the prompt.
    """
    if not query.startswith(prompt):
        raise ValueError(f"query {query[:60]!r} does not begin with its prompt {prompt[:60]!r}")
    response = query[len(prompt) :]
    for end in strip:
        if end and response.endswith(end):
            return response.removesuffix(end)
    return response
