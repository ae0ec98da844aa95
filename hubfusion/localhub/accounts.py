"""Who may ask: users by token, organizations by member, signed links, and how often they may ask."""

from __future__ import annotations

import hashlib
import hmac
import re
import threading
import time
from collections.abc import Mapping, Sequence

from hubfusion.errors import HubError
from hubfusion.localhub.refusal import Refusal

_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9]([A-Za-z0-9._-]{0,94}[A-Za-z0-9])?")
RESERVED = frozenset({"api", "models", "datasets", "spaces", "oauth", "kernels", "buckets", "jobs", "settings"})
WINDOW = 300
"""Seconds over which requests are counted, as on the Hub."""


def is_name(text: str) -> bool:
    """Whether this may name a user, an organization or a repository."""
    return bool(_NAME.fullmatch(text)) and not text.endswith((".git", ".ipynb", ".lock"))


class Accounts:
    """Users with their tokens, and organizations with the users that may write to them."""

    def __init__(self, users: Mapping[str, str], orgs: Mapping[str, Sequence[str]]) -> None:
        self.users = tuple(users)
        self.orgs = {name: tuple(members) for name, members in orgs.items()}
        self._by_token = {_digest(token): name for name, token in users.items()}
        for name in [*users, *orgs]:
            if not is_name(name) or name in RESERVED:
                raise HubError(f"user {name!r}: a name has letters, digits, '.', '_' and '-', and is not reserved")
        for name, token in users.items():
            if not re.fullmatch(r"[\x21-\x39\x3b-\x7e]{3,200}", token):
                raise HubError(f"user {name}: a token has 3 to 200 printable characters without space or ':'")
        if len(self._by_token) != len(users):
            raise HubError("two users have the same token")
        if both := set(users) & set(orgs):
            raise HubError(f"{min(both)} is both a user and an organization")
        for name, members in self.orgs.items():
            if strangers := set(members) - set(users):
                raise HubError(f"organization {name}: no user {min(strangers)}")

    def identify(self, token: str | None) -> str | None:
        """The user of a token, None without one; a wrong token is refused with 401."""
        if token is None:
            return None
        user = self._by_token.get(_digest(token))
        if user is None:
            raise Refusal(401, "Invalid user token.", headers={"WWW-Authenticate": 'Basic realm="hub"'})
        return user

    def owns(self, user: str | None, namespace: str) -> bool:
        """Whether a user may write to this namespace."""
        return user is not None and (user == namespace or user in self.orgs.get(namespace, ()))

    def namespaces(self, user: str) -> list[str]:
        """The user's own namespace and those of the user's organizations."""
        return [user, *(org for org, members in self.orgs.items() if user in members)]

    def exists(self, namespace: str) -> bool:
        """Whether there is such a user or organization."""
        return namespace in self.users or namespace in self.orgs

    def avatar(self, name: str, base: str) -> dict[str, object]:
        """A user or organization as it appears inside other answers."""
        kind = "org" if name in self.orgs else "user"
        return {"name": name, "fullname": name, "type": kind, "avatarUrl": f"{base}/avatars/{name}.svg", "_id": name}


class Seal:
    """Signs short texts with a secret of this store: links and access tokens that need no table."""

    def __init__(self, secret: str) -> None:
        self._secret = secret.encode()

    def sign(self, purpose: str, *parts: object) -> str:
        """Hex digits that only this store can make."""
        text = "\n".join([purpose, *map(str, parts)])
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

    def check(self, signature: str, purpose: str, *parts: object) -> None:
        """Refuse with 403 what this store did not sign."""
        if not hmac.compare_digest(signature.encode(), self.sign(purpose, *parts).encode()):
            raise Refusal(403, f"{purpose}: the signature does not fit")

    def issue(self, purpose: str, subject: str, seconds: int) -> str:
        """A token for a subject, valid for some seconds."""
        text = f"{subject}.{int(time.time()) + seconds}"
        return f"{text}.{self.sign(purpose, text)}"

    def open(self, purpose: str, token: str) -> str:
        """The subject of a token; 401 when it is forged or over."""
        text, _, signature = token.rpartition(".")
        subject, _, until = text.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self.sign(purpose, text).encode()) or int(until) < time.time():
            raise Refusal(401, f"{purpose}: the token is not valid or is over")
        return subject


class Limits:
    """Counts requests per caller over fixed windows of 5 minutes and says so in `RateLimit` headers.

    `quota` requests are allowed to /api, and five times as many to everything else, as on the Hub.
    """

    def __init__(self, quota: int) -> None:
        self._quota = quota
        self._lock = threading.Lock()
        self._window = 0
        self._counts: dict[tuple[str, str], int] = {}

    def count(self, caller: str, path: str) -> dict[str, str]:
        """Headers of the answer; over the quota a refusal with 429."""
        name = "api" if path.startswith("/api/") else "resolvers"
        quota = self._quota if name == "api" else 5 * self._quota
        now = int(time.time())
        with self._lock:
            if now // WINDOW != self._window:
                self._window = now // WINDOW
                self._counts.clear()
            used = self._counts[caller, name] = self._counts.get((caller, name), 0) + 1
        left = WINDOW - now % WINDOW
        headers = {
            "RateLimit": f'"{name}";r={max(quota - used, 0)};t={left}',
            "RateLimit-Policy": f'"fixed window";"{name}";q={quota};w={WINDOW}',
        }
        if used > quota:
            raise Refusal(429, "We had to rate limit you, try again later.", headers=headers)
        return headers


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
