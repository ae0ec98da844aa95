"""The embedded Hub: a server on bare git repositories that the real Hugging Face clients talk to."""

from hubfusion.localhub.faults import LOST, Fault, FaultRequest
from hubfusion.localhub.server import LocalHub
from hubfusion.localhub.state import Rules

__all__ = ["LOST", "Fault", "FaultRequest", "LocalHub", "Rules"]
