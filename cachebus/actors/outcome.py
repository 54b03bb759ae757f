"""What a batch of which something failed says about its backend."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from cachebus.messages import CacheConnectionError, CacheError, Failed, Reply, error_class


class Outcome(Enum):
    """What a batch says about its backend: it did its work, it did nothing of it, or the replies say nothing about that."""

    SUCCESS = auto()
    FAILURE = auto()
    IGNORED = auto()


SUCCESS, FAILURE, IGNORED = Outcome


def outcome_of(replies: Sequence[Reply], excluded: tuple[type[CacheError], ...]) -> tuple[Outcome, str | None]:
    """What a batch of which something failed says about the backend, and why it cannot be reached, if that is so.

    It has failed if it answered nothing of the batch, and for a reason that may pass. Errors of `excluded` classes count
    neither way, and neither does a refusal, such as that of a password: nobody has looked at the request.
    """
    failures = [(error_class(each.code), each.detail) for each in replies if isinstance(each, Failed)]
    counting = [(kind, detail) for kind, detail in failures if kind.transient and not issubclass(kind, excluded)]
    lost = next((detail for kind, detail in counting if issubclass(kind, CacheConnectionError)), None)
    if len(failures) < len(replies):
        return SUCCESS, lost
    if counting:
        return FAILURE, lost
    if all(kind.transient or issubclass(kind, excluded) or _is_refusal(kind) for kind, _ in failures):
        return IGNORED, lost
    return SUCCESS, lost


def _is_refusal(kind: type[CacheError]) -> bool:
    return kind.code in ("configuration", "closed")
