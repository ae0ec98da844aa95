"""The Hub: the calls we make (`Hub`), the client that makes them (`connect`), and parsing of model cards.

Only `connect` opens network connections.
"""

from __future__ import annotations

from hubfusion.hub.append import Files, append
from hubfusion.hub.protocol import Change, Commit, Hub, HubJob, JobState, Listing, OnBytes, RepoKind

__all__ = [
    "Change",
    "Commit",
    "Files",
    "Hub",
    "HubJob",
    "JobState",
    "RepoKind",
    "Listing",
    "OnBytes",
    "append",
    "connect",
]


def connect(endpoint: str, token: str | None = None, *, tries: int = 5) -> Hub:
    """A Hub behind ``endpoint`` (``http(s)://host[:port]``); without a token it reads as anybody may.

    Only the endpoint differs between the real Hub and the embedded one.
    """
    from hubfusion.hub.client import HubClient  # only here: the client's libraries take 0.3 s to import

    return HubClient(endpoint, token, tries=tries)
