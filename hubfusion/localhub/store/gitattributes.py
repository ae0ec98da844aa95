"""Which paths `.gitattributes` sends to large file storage, and what a new repository's file says."""

from __future__ import annotations

import re

_BINARY = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx "
    "*.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz "
    "*.wasm *.xz *.zip *.zst *tfevents*"
)
INITIAL = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in _BINARY.split())


def line_for(path: str) -> str:
    """The line that sends exactly this path to large file storage."""
    pattern = re.sub(r"([*?[])", r"[\1]", path).replace(" ", "[[:space:]]")
    return f"{pattern if '/' in path else '/' + pattern} filter=lfs diff=lfs merge=lfs -text\n"


class LfsPatterns:
    """The patterns of one `.gitattributes` that set or unset `filter=lfs`; the last that fits decides."""

    def __init__(self, text: str) -> None:
        self._rules: list[tuple[re.Pattern[str], bool]] = []
        for line in text.splitlines():
            pattern, *attributes = line.split() or ["#"]
            if not pattern.startswith("#"):
                for attribute in attributes:
                    if attribute.startswith("filter=") or attribute in ("-filter", "!filter"):
                        self._rules.append((_translate(pattern), attribute == "filter=lfs"))

    def has(self, path: str) -> bool:
        """Whether a file at this path is stored as a large file."""
        decided = False
        for pattern, lfs in self._rules:
            if pattern.fullmatch(path):
                decided = lfs
        return decided


def _translate(pattern: str) -> re.Pattern[str]:
    """A gitattributes pattern as a regular expression over the whole path."""
    anywhere = "/" not in pattern
    pattern = pattern.lstrip("/").replace("[[:space:]]", " ")
    out, at = "(?:.*/)?" if anywhere else "", 0
    while at < len(pattern):
        if pattern.startswith("**/", at):
            out, at = out + "(?:.*/)?", at + 3
        elif pattern.startswith("**", at):
            out, at = out + ".*", at + 2
        elif pattern[at] == "*":
            out, at = out + "[^/]*", at + 1
        elif pattern[at] == "?":
            out, at = out + "[^/]", at + 1
        elif pattern[at] == "[" and (end := pattern.find("]", at + 2)) > 0:
            inside = pattern[at + 1 : end].replace("\\", "\\\\")
            out, at = out + f"[{'^' + inside[1:] if inside[0] in '!^' else inside}]", end + 1
        else:
            out, at = out + re.escape(pattern[at]), at + 1
    return re.compile(out, re.DOTALL)
