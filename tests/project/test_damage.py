"""A sample of `benchmarks.damage`: damaged and foreign files of a run are named, or harmless."""

import itertools

import numpy as np
import pytest
from benchmarks import damage


@pytest.fixture(scope="module")
def reader(tmp_path_factory, quick_compile):
    return damage.Reader(damage.make_run(tmp_path_factory.mktemp("damage") / "run"))


def judged(changes, judge):
    tally, faults = damage.sweep(changes, judge)
    assert not faults, faults[0]
    return tally


def test_changed_and_cut_text_files_are_named_or_harmless(reader):
    changes = damage.every_byte(reader.run, np.random.default_rng(0))
    tally = judged(itertools.islice(changes, 0, None, 151), reader.judge)
    assert tally["named"] > 50


def test_random_changes_of_any_file_are_named_or_harmless(reader):
    tally = judged(damage.at_random(reader.run, 60, np.random.default_rng(1)), reader.judge)
    assert tally["named"] > 10 and tally["harmless"] > 10


def test_values_of_a_foreign_kind_are_named_or_shown(reader):
    run = reader.run
    changes = itertools.islice(damage.foreign(run), 0, None, 61)
    judged(changes, lambda path: damage.read_foreign(run, path))


def test_a_damaged_reading_is_seen(reader):
    """The sweep itself: another figure under a whole seal is a fault."""
    text = reader.run.results.read_text().replace('"images": 4', '"images": 5', 1)
    unsealed = text[: text.rindex(",")] + "\n}"
    tally, faults = damage.sweep([("", reader.run.results, unsealed.encode())], reader.judge)
    assert tally["FAULT"] == 1 and "other figures" in faults[0]
