"""All commands of `hubfusion`: importing the modules of each area adds them to the application."""

from __future__ import annotations

from hubfusion.cli import compare, contribute, evaluate, hub, methods, trust
from hubfusion.cli.app import app

__all__ = ["app", "compare", "contribute", "evaluate", "hub", "methods", "trust"]
