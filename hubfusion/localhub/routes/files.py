"""Reading files: downloads with ranges, trees, path infos."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from starlette.responses import Response, StreamingResponse

from hubfusion.localhub.access import commit_of, readable_repo, snapshot_of, visible_repo
from hubfusion.localhub.cards import parse_json_object
from hubfusion.localhub.facts import tensor_header, when
from hubfusion.localhub.info import page_of
from hubfusion.localhub.refusal import Refusal, missing_entry
from hubfusion.localhub.store.git import Commit, Entry, Snapshot
from hubfusion.localhub.store.objects import read_blocks
from hubfusion.localhub.store.repos import Repo
from hubfusion.localhub.web import Call, Routes, answer

routes = Routes()
_HERE = "/api/{kind:models|datasets|spaces}/{ns}/{name}"
_PATHS_MAX = 10_000


@routes.add("GET", "/{ns}/{name}/{how:resolve|raw}/{rev}/{path*}")
@routes.add("GET", "/{kind:datasets|spaces}/{ns}/{name}/{how:resolve|raw}/{rev}/{path*}")
def download(call: Call) -> Response:
    """A file, whole or one range of it; `raw` gives the pointer of a large file."""
    repo = readable_repo(call)
    git = call.hub.repos.git(repo)
    sha = commit_of(git, call.params["rev"])
    entry = git.snapshot(sha).files.get(call.params["path"])
    commit = {"X-Repo-Commit": sha}
    if entry is None:
        raise missing_entry(call.params["path"], commit)
    large = entry.pointer if call.params["how"] == "resolve" else None
    etag = f'"{large.sha256 if large else entry.oid}"'
    headers = {
        **commit,
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Content-Disposition": _disposition(entry.path),
        "Content-Type": "text/plain; charset=utf-8" if not large else "application/octet-stream",
        "X-Content-Type-Options": "nosniff",
        "Content-Security-Policy": "default-src 'none'; sandbox",
        "Access-Control-Expose-Headers": "X-Repo-Commit,X-Linked-Size,X-Linked-ETag,ETag,Accept-Ranges,Content-Range",
    }
    if large:
        headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(large.size)}
    content = None if large else git.blob(entry.oid)
    size = large.size if large else len(content or b"")
    start, end = 0, size
    if (asked := call.headers.get("range")) and call.headers.get("if-range", etag) == etag:
        if span := parse_range(asked, size):
            start, end = span
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
    headers["Content-Length"] = str(end - start)
    status = 206 if "Content-Range" in headers else 200
    if call.method == "HEAD":
        return Response(None, status, headers)
    if content is not None:
        return Response(content[start:end], status, headers)
    assert large is not None
    path = call.hub.objects.path(large.sha256)
    if call.hub.objects.size(large.sha256) != large.size:
        raise Refusal(500, f"object {large.sha256[:12]} is not whole in this store")
    return StreamingResponse(read_blocks(path, start, end - start), status, headers)


def _disposition(path: str) -> str:
    name = re.sub(r'[^\x20-\x7e]|["\\]', "_", path.rpartition("/")[2])
    return f'inline; filename="{name}"'


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """The half-open span of a single byte range, None for what is not one (then all is sent), 416 beyond the end."""
    match = re.fullmatch(r"bytes=([0-9]{0,18})-([0-9]{0,18})", text.replace(" ", ""))
    if not match or not (match[1] or match[2]):
        return None
    if match[1]:
        start, end = int(match[1]), min(int(match[2]) + 1 if match[2] else size, size)
        if match[2] and int(match[2]) < start:
            return None
    else:
        start, end = max(size - int(match[2]), 0), size
    if start >= end:
        raise Refusal(
            416, f"range {text[:60]} is not within {size} bytes", headers={"Content-Range": f"bytes */{size}"}
        )
    return start, end


@routes.add("GET", _HERE + "/tree/{rev}")
@routes.add("GET", _HERE + "/tree/{rev}/{path*}")
def tree(call: Call) -> Response:
    """The files and folders of a revision, or of one folder in it."""
    repo = visible_repo(call)
    snapshot = snapshot_of(call, repo)
    folder = call.params.get("path", "").strip("/")
    if folder and folder not in snapshot.folders:
        raise missing_entry(folder, {"X-Repo-Commit": snapshot.sha})
    start = f"{folder}/" if folder else ""
    deep = call.flag("recursive")
    paths = sorted(
        path
        for path in [*snapshot.files, *snapshot.folders]
        if path.startswith(start) and (deep or "/" not in path[len(start) :])
    )
    page, link = page_of(call, [{"path": path} for path in paths], 1000)
    shown = [item["path"] for item in page]
    return answer(
        _show_paths(call, repo, snapshot, shown, call.flag("expand")), headers=link | {"X-Repo-Commit": snapshot.sha}
    )


@routes.add("POST", _HERE + "/paths-info/{rev}")
def paths_info(call: Call) -> Response:
    """The same entries for the paths of a form; those that are not there are left out."""
    repo = visible_repo(call)
    snapshot = snapshot_of(call, repo)
    form = call.form()
    paths = [value.strip("/") for key, value in form if key in ("paths", "paths[]")]
    if len(paths) > _PATHS_MAX:
        raise Refusal(413, f"at most {_PATHS_MAX} paths at once, got {len(paths)}")
    expand = any(key == "expand" and value.lower() in ("true", "1") for key, value in form)
    there = [path for path in dict.fromkeys(paths) if path in snapshot.files or path in snapshot.folders]
    return answer(_show_paths(call, repo, snapshot, there, expand))


def _show_paths(call: Call, repo: Repo, snapshot: Snapshot, paths: Iterable[str], expand: bool) -> list[dict[str, Any]]:
    last = call.hub.repos.git(repo).last_commits(snapshot.sha, paths) if expand else {}
    shown = []
    for path in paths:
        entry = snapshot.files.get(path)
        item = _show_file(entry) if entry else _show_folder(path, snapshot.folders[path])
        if expand and path in last:
            item["lastCommit"] = _show_commit(last[path])
        shown.append(item)
    return shown


def _show_file(entry: Entry) -> dict[str, Any]:
    item: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": entry.path}
    if entry.pointer:
        size = len(entry.pointer.text())
        item["lfs"] = {"oid": entry.pointer.sha256, "size": entry.size, "pointerSize": size}
    return item


def _show_folder(path: str, oid: str) -> dict[str, Any]:
    return {"type": "directory", "oid": oid, "size": 0, "path": path}


def _show_commit(commit: Commit) -> dict[str, Any]:
    return {"id": commit.sha, "title": commit.title, "date": when(commit.at)}


@routes.add("GET", "/api/models/{ns}/{name}/safetensors-metadata/{path*}")
def safetensors_metadata(call: Call) -> Response:
    """The index of a sharded checkpoint with the header of each shard."""
    repo = readable_repo(call)
    git = call.hub.repos.git(repo)
    snapshot = snapshot_of(call, repo)
    index = snapshot.files.get(call.params["path"])
    if index is None or index.pointer or index.size > 64 << 20:
        raise missing_entry(call.params["path"])
    table = parse_json_object(git.blob(index.oid))
    names = table.get("weight_map")
    if not isinstance(names, dict):
        raise Refusal(400, f"{index.path} has no weight_map")
    headers = {}
    for name in sorted(set(map(str, names.values()))):
        header = tensor_header(call.hub, git, snapshot.files.get(name))
        if header is None:
            raise Refusal(400, f"{name} is not a safetensors file of this revision")
        headers[name] = header
    return answer({"index": table, "headers": headers})
