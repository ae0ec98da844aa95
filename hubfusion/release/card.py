"""Render texts from ``model_card_templates/``: model cards, the ranking's page, answers to contributors.

Inserted values are escaped for Markdown and HTML unless our own code marks them as markup, so an untrusted repository
name or dataset id is shown and never interpreted. Metadata goes through a YAML dumper.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import BaseLoader, Environment, StrictUndefined
from markupsafe import Markup

from hubfusion import PACKAGE, install_command
from hubfusion.evaluate.scores import compare
from hubfusion.release.manifest import Manifest

SHOWN = ("revision", "author", "license", "datasets", "examples")
SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#|!~&$\"'])")


def visible(text: str) -> str:
    """``text`` on one line, without control, bidirectional and other invisible characters: safe on a terminal."""
    return "".join(c for c in " ".join(text.split()) if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co"))


def escape(text: str) -> str:
    """The visible part of ``text``, with a backslash or an entity for all that Markdown or HTML could act on.

    >>> escape("[x](http://evil) <b>")
    '\\\\[x\\\\]\\\\(http:\\u200b//evil\\\\) &lt;b&gt;'
    """
    escaped = SPECIAL.sub(r"\\\1", visible(text)).replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")
    # A zero-width space keeps a bare address from becoming a link, and a handle from calling somebody.
    return escaped.replace("://", ":\u200b//").replace("@", "@\u200b")


def _finalize(value: Any) -> Any:
    if isinstance(value, Markup):
        return value
    if isinstance(value, float):
        return "?" if math.isnan(value) else f"{value:.2f}"
    return escape(str(value))


class _Templates(BaseLoader):
    def get_source(self, environment: Environment, template: str) -> tuple[str, str | None, Any]:
        path = files("model_card_templates") / template
        return path.read_text(encoding="utf-8"), str(path), lambda: True


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=_Templates(), undefined=StrictUndefined, finalize=_finalize, trim_blocks=True, lstrip_blocks=True
    )
    clone = "  # in a clone of hubfusion's repository" if PACKAGE == "." else ""
    environment.globals["install"] = Markup(install_command() + clone)
    environment.filters["signed"] = lambda x: Markup(f"{x:+.2f}")
    environment.filters["short"] = lambda sha: Markup(sha[:12])
    environment.filters["link"] = model_link
    return environment


def model_link(repo: str, endpoint: str, prefix: str = "") -> Markup:
    """A Markdown link to a repository; ``repo`` has been through `hubfusion.lineage.Revision`, so its form is known."""
    return Markup(f"[{escape(repo)}]({endpoint}/{prefix}{repo})")


def render(template: str, metadata: Mapping[str, Any] | None = None, **values: Any) -> str:
    """Fill ``model_card_templates/<template>``; ``metadata`` becomes the YAML front matter when given.

    A value that the template names and nobody gave is an error, never an empty place.
    """
    body = _environment().get_template(template).render(**values)
    if metadata is None:
        return body
    matter = yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{matter}---\n\n{body}"


def merge_metadata(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """``old`` with the keys of ``new`` over it; two lists become one, in order, each entry once.

    >>> merge_metadata({"license": "mit", "tags": ["a"]}, {"tags": ["b", "a"]})
    {'license': 'mit', 'tags': ['a', 'b']}
    """
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        if isinstance(before, list) and isinstance(value, list):
            value = before + [v for v in value if v not in before]
        merged[key] = value
    return merged


def base_card(old: Mapping[str, Any], manifest: Manifest, repo: str, endpoint: str) -> str:
    """The card of a new version: the base's own metadata with our tags and this version's data, tables, recipe."""
    data = sorted({d for c in manifest.contributions for d in c.contribution.datasets})
    metadata = merge_metadata(old, {"tags": ["cold-fusion", "model-recycling"], "datasets": data})
    rows = [
        {
            "dataset": gain.dataset,
            "fold": "seen" if gain.dataset in manifest.seen else "unseen",
            "protocol": gain.protocol,
            "metric": gain.metric,
            "base": gain.base,
            "candidate": gain.candidate,
            "gain": gain.mean,
            "stderr": gain.stderr,
        }
        for gain in compare(manifest.candidate_scores, manifest.base_scores).gains
    ]
    coefficients = {each.model: each.coefficient for each in manifest.recipe.inputs}
    contributions = [
        {
            **{name: getattr(each.contribution, name) for name in SHOWN},
            "coefficient": coefficients[each.revision.pinned],
            "leave_one_out_gain": each.leave_one_out_gain,
        }
        for each in manifest.contributions
    ]
    return render(
        "base.md.j2",
        metadata,
        repo=repo,
        code_repo=Markup(repo),
        code_version=Markup(manifest.version),
        version=manifest.version,
        parent_version=manifest.parent_version,
        iteration=manifest.iteration,
        seeds=", ".join(map(str, manifest.candidate_scores.entries[0].seeds)),
        decision_summary=manifest.decision.summary,
        rows=rows,
        contributions=contributions,
        is_probed=any(each.leave_one_out_gain is not None for each in manifest.contributions),
        trials=len(manifest.trials),
        report=manifest.report,
        method=manifest.recipe.method,
        options=", ".join(f"{name} = {value}" for name, value in manifest.recipe.options),
        endpoint=endpoint,
    )
