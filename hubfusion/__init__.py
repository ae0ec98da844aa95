"""Recycle finetuned models: crawl → screen → fuse → evaluate → gate → publish → rank → notify.

The stages of the pipeline and the frozen values between them. The library does not depend on the date, the machine or
earlier runs; `bot` keeps track of those.
"""

__version__ = "0.1.0"

PACKAGE = "."  # what pip installs; at the first release on PyPI: "hubfusion"


def install_command(extra: str = "") -> str:
    """The command that installs hubfusion, with one of its extras if named, as cards, errors and docs give it.

    >>> install_command("sign")
    "pip install '.[sign]'"
    """
    return f"pip install '{PACKAGE}[{extra}]'" if extra else f"pip install {PACKAGE}"
