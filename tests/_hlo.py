"""What the devices of a compiled program exchange, read from its HLO text."""

import re
from typing import NamedTuple


class Collective(NamedTuple):
  """One array of a collective: what is done to it, its dtype and its shape where it is largest."""

  kind: str
  dtype: str
  shape: tuple[int, ...]


_CALL = re.compile(
  r"= (?P<type>\(.*?\)|\S+) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all)"
  r"(?P<start>-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+[0-9]+)\[([0-9,]*)\]")


def collectives(text: str) -> list[Collective]:
  """The collectives of a compiled program; those of several arrays count once for each."""
  return [
    Collective(call["kind"], dtype, tuple(int(n) for n in shape.split(",") if n))
    for call in _CALL.finditer(text)
    for dtype, shape in _ARRAY.findall(call["type"])
  ]
