"""Parts of a source: the first thousand, all but the last five percent."""

import re

from mllm_jax.config import ConfigError
from mllm_jax.types import Example


class Slice:
    """The records `numbers` of a source; `Slice(source, cut_range("-500:", len(source)))` holds out its last 500."""

    def __init__(self, source, numbers: range):
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self.numbers):
            raise IndexError(f"record {index} of {len(self.numbers)}")
        return self.source[self.numbers[index]]


def cut_range(text: str, count: int, whole: str = "") -> range:
    """The numbers of `10:15`, `:5%`, `-500:` or "" (all) out of `count`; percentages are rounded to the nearest record.

    Raises:
      ConfigError: `text` is none of these; the message shows `whole`, what the user wrote.
    """
    match = re.fullmatch(r"(-?\d+)?(%)?(:)?(-?\d+)?(%)?", text)
    if not match or (text and not match[3]) or (match[2] and not match[1]) or (match[5] and not match[4]):
        hint = "write begin:end, in records or percent (10:15, :5%)"
        raise ConfigError(f"{whole or text!r} is not a part of a source; {hint}")
    place = lambda number, percent: int(number) if not percent else round(count * int(number) / 100)
    begin = place(match[1], match[2]) if match[1] else None
    end = place(match[4], match[5]) if match[4] else None
    return range(count)[begin:end]
