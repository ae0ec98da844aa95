"""Settings that must stand before any client library is imported, and the embedded Hub that tests talk to."""

from __future__ import annotations

import os
import tempfile

for _name in [n for n in os.environ if n.startswith(("HF_", "HUGGING"))]:
    del os.environ[_name]
os.environ |= {
    "HF_HOME": tempfile.mkdtemp(prefix="hubfusion-tests-"),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
