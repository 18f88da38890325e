"""What the hub's answers mean: errors of its client as errors of ours, with the next step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from zoo.errors import GatedRepo, Offline, RepoNotFound, SourceError, ZooError


class Asked(Protocol):
    """What was asked of the hub."""

    repo: str
    revision: str
    token: str | bool | None
    cache_dir: Path | None


def is_absent(error: Exception) -> bool:
    """Whether an error of the client means that the repository lacks the file."""
    from huggingface_hub import errors

    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        return False
    return isinstance(error, errors.RemoteEntryNotFoundError) or _status(error) == 404


def explain(error: Exception, hub: Asked) -> ZooError:
    """Return the error of ours for one of the client's: what happened, and the next step."""
    from huggingface_hub import constants, errors, get_token

    if isinstance(error, ZooError):
        return error
    page = f"{constants.ENDPOINT}/{hub.repo}"
    if isinstance(error, errors.GatedRepoError):
        token = hub.token if isinstance(hub.token, str) else get_token()
        return GatedRepo(
            f"{hub.repo} is gated: accept its license at {page}, then "
            + ("use a token of the account that did" if token else "set HF_TOKEN or pass token=")
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return RepoNotFound(f"{hub.repo} has no revision {hub.revision!r}: see {page}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return RepoNotFound(
            f"{hub.repo}: no such repository, or a private one: check the spelling, "
            "or set HF_TOKEN to a token that may read it"
        )
    if isinstance(error, errors.HFValidationError):
        return RepoNotFound(f"{hub.repo}: {error}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return offline(hub, "HF_HUB_OFFLINE is set")
    status = _status(error)
    if status in (401, 403):
        return RepoNotFound(f"{hub.repo}: the hub refused the token ({status}): renew HF_TOKEN")
    if status is not None:
        return offline(hub, f"{constants.ENDPOINT} answered {status}")
    for cause in _causes(error):
        # the hub's HTTP client, and with it the root of its errors, changes with its version
        network = type(cause).__module__.startswith("httpx")
        if network or isinstance(cause, ConnectionError | TimeoutError):
            reason = " ".join(str(cause).split()) or type(cause).__name__
            return offline(hub, f"{constants.ENDPOINT} cannot be reached ({reason})")
    if isinstance(error, OSError) and error.errno is not None:
        return SourceError(f"{hub.repo}: the cache {_cache(hub)} cannot be used: {error}")
    # whatever else the client makes of an answer that is not as a hub's are
    answer = " ".join(f"{type(error).__name__}: {error}".split())
    answer = answer if len(answer) <= 300 else f"{answer[:300]} …"
    return SourceError(
        f"{hub.repo}: {constants.ENDPOINT} gave an answer that cannot be used ({answer}). "
        "Run the command again; if HF_ENDPOINT is set, check that it is a model hub's address"
    )


def _cache(hub: Asked) -> Path:
    from huggingface_hub import constants

    return hub.cache_dir or Path(constants.HF_HUB_CACHE)


def offline(hub: Asked, reason: str) -> Offline:
    """Return the error that the cache alone can be used, and lacks something."""
    return Offline(
        f"{hub.repo}@{hub.revision} is not, or not wholly, in the cache {_cache(hub)}, "
        f"and {reason}: fetch it once with the network on, or pass a directory"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error of huggingface_hub, which may wrap one in another."""
    responses = (getattr(cause, "response", None) for cause in _causes(error))
    return next((int(r.status_code) for r in responses if r is not None), None)
