"""Seals: the checksum that a JSON object of a run folder ends with, so that damage is seen.

One changed digit of a number is still JSON. An object without a seal, written by hand or by an
older version, is taken as it is.
"""

import zlib

_KEY = "crc32"
_MARK = b'"crc32": "'


def sealed(text: str) -> str:
    """The text of a JSON object that is not empty, with the CRC-32 of what precedes it as its end.

    Args:
        text: On one line, or indented by two spaces.
    """
    body = text[:-1].rstrip()
    space = text[len(body) : -1]
    begun = f"{body},{space}  " if space else f"{body}, "
    return f'{begun}"{_KEY}": "{zlib.crc32(begun.encode()):08x}"{space}}}'


def is_whole(text: bytes) -> bool:
    """Whether the bytes before a seal are those that were sealed; true where there is none."""
    body, mark, seal = text.rpartition(_MARK)
    return not mark or seal[:8] == b"%08x" % zlib.crc32(body)


def without_seal(content: dict[str, object]) -> dict[str, object]:
    """A parsed object without its seal."""
    return {name: value for name, value in content.items() if name != _KEY}
