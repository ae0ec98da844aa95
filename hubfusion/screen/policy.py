"""What a maintainer accepts: licenses, authors, sizes and limits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Policy:
    """What a maintainer allows; every field has a default that is safe for untrusted models (TOML or JSON: same names).

    ``licenses`` are the Hub's ids; empty means the permissive ones and the base's own. With ``check_dataset_licenses``
    the declared training datasets must have one of them, too, by their cards now. ``authors_allowed`` empty
    means everybody. Sizes are bytes; caps count contributions of one iteration.
    """

    licenses: tuple[str, ...] = ()
    authors_allowed: tuple[str, ...] = ()
    authors_blocked: tuple[str, ...] = ()
    opt_out_tags: tuple[str, ...] = ("cold-fusion-opt-out", "no-merge")
    check_dataset_licenses: bool = False
    require_declared_base: bool = True
    any_float_dtype: bool = True
    max_files: int = 500
    max_file_bytes: int = 20 << 30
    max_shards: int = 64
    max_config_bytes: int = 32 << 10
    max_header_bytes: int = 64 << 10
    max_datasets: int = 50
    max_per_author: int = 3
    max_per_dataset: int = 8
    max_contributions: int = 64
