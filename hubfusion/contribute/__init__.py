"""The contributor's side: finetune the current base, tag the result, push it."""

from __future__ import annotations

from hubfusion.contribute.offer import Contributed, Job, Offer, contribute, offer_metadata, tag, with_metadata

__all__ = ["Contributed", "Job", "Offer", "contribute", "offer_metadata", "tag", "with_metadata"]
