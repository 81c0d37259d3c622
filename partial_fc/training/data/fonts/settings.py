"""Settings of `partial-fc data glyphs`."""

from __future__ import annotations

from dataclasses import dataclass, field

from partial_fc.training.errors import UserError


@dataclass
class GlyphSettings:
    """Which data set to draw, and where."""

    fonts: list[str]
    """Folders with font files."""
    out: str
    scripts: str = "han,hangul"
    size: int = 32
    min_designs: int = 4
    holdout_identities: int = 0
    holdout_designs: list[str] = field(default_factory=list)
    """Beginnings of family names; or one number: how many designs the seed draws."""
    seed: int = 0
    on_error: str = "skip"

    def check(self) -> None:
        minimum = {"size": 8, "min_designs": 2, "holdout_identities": 0, "seed": 0}
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name} is {getattr(self, name)}; give at least {least}")
        if self.size > 256:
            raise UserError(f"--size is {self.size}; give at most 256 pixels")
        if self.holdout_identities == 1:
            raise UserError("--holdout_identities is 1, so there is no pair to reject; give at least 2, or 0")
        if self.holdout_designs and not self.holdout_identities:
            raise UserError("--holdout_designs has no effect without --holdout_identities; give both")
