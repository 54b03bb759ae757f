"""What the replies to a batch say about the backend that gave them."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum, auto

from cachebus.messages import CacheConnectionError, CacheError, Failed, Reply, error_class


class Verdict(Enum):
    """`WELL`: it did its work. `ILL`: it did nothing of it. `UNKNOWN`: the replies say nothing about its health."""

    WELL = auto()
    ILL = auto()
    UNKNOWN = auto()


def judge(replies: Sequence[Reply], excluded: tuple[type[CacheError], ...]) -> tuple[Verdict, str | None]:
    """The verdict, and why the backend cannot be reached, if that is so.

    It is ill if it answered nothing of the batch, and for a reason that may pass. Errors of `excluded` classes count
    neither way, and neither does a refusal, such as that of a password: nobody has looked at the request.
    """
    failures = [(error_class(each.code), each.detail) for each in replies if isinstance(each, Failed)]
    counting = [(kind, detail) for kind, detail in failures if kind.transient and not issubclass(kind, excluded)]
    lost = next((detail for kind, detail in counting if issubclass(kind, CacheConnectionError)), None)
    if not failures or len(failures) < len(replies):
        return Verdict.WELL, lost
    if counting:
        return Verdict.ILL, lost
    if all(kind.transient or issubclass(kind, excluded) or _is_refusal(kind) for kind, _ in failures):
        return Verdict.UNKNOWN, lost
    return Verdict.WELL, lost


def _is_refusal(kind: type[CacheError]) -> bool:
    return kind.code in ("configuration", "closed")
