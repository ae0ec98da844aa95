"""The contributor's side: finetune the current base, tag the result, push it."""

from __future__ import annotations

from hubfusion.contribute.offer import (
    FinetunePlan,
    Offer,
    PushedContribution,
    contribute,
    offer_metadata,
    tag,
    with_metadata,
)

__all__ = ["PushedContribution", "FinetunePlan", "Offer", "contribute", "offer_metadata", "tag", "with_metadata"]
