"""Pushes the aligned policy to the Hugging Face hub. The token is the environment's, or the one kept by a login."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf.config import HubConfig

ADVICE = "set HF_TOKEN, or call hf auth login"


def check_hub(hub: HubConfig, stages: list[str]) -> None:
    """What can be refused before the run, which may take days.

    Raises:
        ValueError: names the key, and says what to do.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    key = f"hub.repo={hub.repo}"
    try:
        validate_repo_id(hub.repo)
    except HFValidationError as error:
        raise ValueError(f"{key} is no name of a repository: {error}") from None
    owner, slash, _ = str(hub.repo).partition("/")
    if not slash:
        raise ValueError(f"{key} must be OWNER/NAME")
    if "report" not in stages:
        raise ValueError(f"{key} needs the stage report, whose figures the model card has: add it to stages")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"{key} cannot be pushed to, for HF_HUB_OFFLINE is set; unset it, or set hub.repo=null"
        )
    if get_token() is None:
        raise ValueError(f"{key} needs a token: {ADVICE}")
    try:
        user = HfApi().whoami()
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ValueError(f"{key}: the token is not accepted: {ADVICE}") from None
        raise ValueError(f"{key}: the hub cannot be used ({_short(error)})") from None
    except Exception as error:  # whatever its client raises of a connection
        raise ValueError(f"{key}: {_endpoint()} cannot be reached ({_short(error)})") from None
    if owner not in {user["name"], *(one["name"] for one in user.get("orgs", []))}:
        raise ValueError(f"{key}: the token is {user['name']}'s, who is no member of {owner}")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"{key}: the token may only read: give one that may write")


def push(policy: Path, hub: HubConfig) -> str:
    """Uploads the folder: policy, tokenizer, card, and an adapter apart. The address of what is there then.

    Raises:
        ValueError: it was not; it says why, and that the same command tries again.
    """
    from huggingface_hub import HfApi

    assert hub.repo is not None
    api = HfApi()
    try:
        repo = api.create_repo(hub.repo, private=hub.private, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repo, folder_path=policy, commit_message="Aligned policy", ignore_patterns=[".*"]
        )
    except Exception as error:  # whatever its client raises of a connection or of a refusal
        raise ValueError(
            f"hub.repo={hub.repo}: the policy was not pushed ({_short(error)}); all else is done, and the same command "
            "tries again"
        ) from error
    return f"{_endpoint()}/{repo}"


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
