"""Answer each contributor once: accepted into vN, or the reason for the rejection and what to do.

An answer is a discussion whose title names the finetune's commit. The bot looks for it before opening it and records it
in the ledger afterwards, so a crash in between does not cause a second answer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from markupsafe import Markup

from bot.ledger import Accepted, Judged, Ledger, Promoted, Refused, Said
from hubfusion.errors import Forbidden, HubError, NotFound
from hubfusion.hub import Hub
from hubfusion.lineage import Reason, Revision
from hubfusion.release.card import render

log = logging.getLogger(__name__)

FIX: Mapping[Reason, str] = {
    Reason.NOT_A_FINETUNE: "declare the base as base_model with base_model_relation: finetune (hubfusion tag does it).",
    Reason.BAD_CARD: "correct the metadata at the top of README.md, or let hubfusion tag write it.",
    Reason.UNDECLARED_BASE: "run hubfusion tag with the version of the base that you finetuned; the Hub does not say.",
    Reason.STALE_BASE: "finetune the current version of the base (hubfusion contribute takes it by itself).",
    Reason.UNKNOWN_BASE: "run hubfusion tag with the exact base revision that you started from.",
    Reason.LICENSE: "choose a license that is compatible with the base's, for the model and its data.",
    Reason.GATED: "make the repository public and ungated, so that everybody can check what went in.",
    Reason.GONE: "keep the files of a pushed commit in place until the next iteration has looked at them.",
    Reason.FLAGGED: "see what the Hub's scanners say on your repository's page and remove the files that they name.",
    Reason.CUSTOM_CODE: "upload a model that needs no code of its own (no auto_map, no .py files).",
    Reason.NO_SAFETENSORS: "save the whole model with save_pretrained; merge an adapter first (merge_and_unload).",
    Reason.BAD_FILES: "upload only what save_pretrained writes: one model.safetensors, or shards with their index.",
    Reason.TOO_LARGE: "upload the weights alone, in the base's precision, without optimizer state.",
    Reason.BAD_HEADER: "save the weights again with save_pretrained and upload the file unchanged.",
    Reason.BAD_INDEX: "save the weights again with save_pretrained and upload shards and index together.",
    Reason.BAD_CONFIG: "upload the config.json that save_pretrained writes.",
    Reason.ARCHITECTURE: "finetune the base itself: every parameter keeps its name, shape and type, heads may differ.",
    Reason.ADAPTER: "merge the adapter into the model with peft's merge_and_unload, and push the whole model.",
    Reason.BLOCKED: "nothing: the maintainers of the base do not take contributions from this account.",
    Reason.OPTED_OUT: "nothing, if that is what you want; else take the opt-out tag off your card.",
    Reason.CAP: "wait: one iteration takes a limited number from each owner; offer it again for the next version.",
    Reason.CORRUPT: "upload the weights again; the bytes on the Hub do not have the hash that it lists.",
    Reason.NOT_FINITE: "train again with a lower learning rate or in float32; the weights hold NaN or infinity.",
    Reason.UNCHANGED: "train before you upload; these are the base's own weights.",
    Reason.BUFFERS: "leave the integer buffers as they are in the base; save_pretrained does.",
    Reason.DUPLICATE: "offer weights of your own; the same ones came from another repository first.",
    Reason.INVERSE: "train by descending the loss; this update is the opposite of another one.",
    Reason.WRONG_BASE: "finetune the current version of the base; these weights come from another model.",
    Reason.OUTLIER: "train with a lower learning rate or for fewer steps; the change is far larger than others'.",
    Reason.CONCENTRATED: "train the model as a whole; nearly all of this change is in a few entries or one tensor.",
    Reason.HARMFUL: "look at your labels and training: the new base is worse with your model, and not without it.",
    Reason.REFUSED: "finetune the base again, longer or on other data; your model itself may well be fine.",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to one owner."""

    finetune: Revision
    title: str
    body: str


def pending_answers(ledger: Ledger, base: str, endpoint: str) -> Iterator[Answer]:
    """Answers still to be sent: one for every finetune that was judged and not answered yet."""
    for event in ledger.events:
        match event:
            case Promoted():
                answers = [_accepted(each, event.version, base, endpoint) for each in event.contributions]
            case Judged():
                answers = [_rejected(event.finetune, event.reason, event.detail, base, endpoint)]
            case Refused():
                said = [*event.objections]
                if event.trials:
                    said.append(f"{len(event.trials)} smaller sets were tried; no single model is to blame.")
                detail = f"iteration {event.iteration}: {' '.join(said)}"
                answers = [_rejected(f, Reason.REFUSED, detail, base, endpoint) for f in event.contributions]
            case _:
                answers = []
        yield from (a for a in answers if a.finetune not in ledger.said)


def deliver(hub: Hub, answers: list[Answer]) -> tuple[Said, ...]:
    """Open the discussions; owners who allow none or are gone count as answered, unreachable ones wait."""
    said = []
    for answer in answers:
        try:
            said.append(Said(answer.finetune, hub.discuss(answer.finetune.repo, answer.title, answer.body)))
        except (Forbidden, NotFound) as error:
            log.warning("notify: %s cannot be answered: %s", answer.finetune, error)
            said.append(Said(answer.finetune, None))
        except HubError as error:
            log.warning("notify: %s is answered by a later run: %s", answer.finetune, error)
    return tuple(said)


def _accepted(accepted: Accepted, version: str, base: str, endpoint: str) -> Answer:
    names = {"base": base, "code_base": Markup(base), "version": version, "endpoint": endpoint}
    finetune, gain = accepted.finetune, accepted.leave_one_out_gain
    body = render("accepted.md.j2", None, finetune=finetune, leave_one_out_gain=gain, **names)
    return Answer(finetune, f"Part of {base} {version} (commit {finetune.sha[:12]})", body)


def _rejected(finetune: Revision, reason: Reason, detail: str, base: str, endpoint: str) -> Answer:
    body = render(
        "rejected.md.j2", finetune=finetune, base=base, reason=reason, detail=detail, fix=FIX[reason], endpoint=endpoint
    )
    return Answer(finetune, f"Not fused into {base}: {reason} (commit {finetune.sha[:12]})", body)
