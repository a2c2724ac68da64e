"""Seals: any changed byte is seen, and what has no seal is taken as it is."""

import json
import zlib

import pytest

from vlae_jax.runs.seals import is_whole, sealed, without_seal

CONTENT = {"step": 3, "elbo": -81.25, "name": 'a "crc32": "00000000"', "none": None}


@pytest.mark.parametrize("indent", [None, 2])
def test_a_sealed_text_is_the_same_object_with_the_checksum_of_what_precedes_it(indent):
    text = sealed(json.dumps(CONTENT, indent=indent))
    content = json.loads(text)
    before, _, seal = text.rpartition('"crc32": "')
    assert int(seal[:8], 16) == zlib.crc32(before.encode())
    assert without_seal(content) == CONTENT and list(content)[-1] == "crc32"
    assert is_whole(text.encode()) and is_whole(f"{text}\n".encode())


def test_every_changed_byte_is_seen_or_changes_nothing():
    text = sealed(json.dumps(CONTENT)).encode()
    for place, byte in enumerate(text):
        for other in {byte ^ 1, byte ^ 128, ord("0"), ord(" ")} - {byte}:
            changed = text[:place] + bytes([other]) + text[place + 1 :]
            try:
                found = json.loads(changed) if is_whole(changed) else None
            except ValueError:
                continue
            # Where the name of the seal itself is damaged, the rest is what it was.
            assert found is None or found | CONTENT == found


def test_an_object_without_a_seal_is_whole():
    assert is_whole(json.dumps(CONTENT).encode()) and is_whole(b"")
