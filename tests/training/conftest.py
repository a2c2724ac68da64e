"""Fixtures by which the training tests share compiled steps."""

import builders
import pytest


@pytest.fixture(scope="module")
def make_trainer(quick_compile):
    """The trainer of a model and its images, one for each configuration, also for `fit`."""
    with builders.one_trainer_a_configuration() as trainer:
        yield trainer
