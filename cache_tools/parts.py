"""Which builder owns which shards: arithmetic, so that builders cannot meet in one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from fd3d.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Part:
    """Part `number` of `of`, counted from 1; it owns every `of`-th shard. Numbers that make no
    part raise `UsageError`."""

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise UsageError(f"--part {self} is not possible: use 1/{max(self.of, 1)} and so on")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def whole(self) -> bool:
        """True for the one part that owns every shard."""
        return self.of == 1

    def owns(self, shard: int) -> bool:
        return shard % self.of == self.number - 1

    def meets(self, other: Part) -> bool:
        """True where some shard number belongs to both, as with 1/2 and 3/4 but not 2/4."""
        return (self.number - other.number) % math.gcd(self.of, other.of) == 0


WHOLE = Part()


def parse_part(text: str) -> Part:
    """The part that "3/20" names; anything else raises `UsageError`."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
    if found is None:
        raise UsageError(f"--part {text} is not a part: write it as 1/4, 2/4, 3/4 or 4/4")
    return Part(number=int(found[1]), of=int(found[2]))
