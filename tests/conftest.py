"""Settings that every test shares."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("project", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def _explicit_randomness():
    """Layers are initialised from the global generator; a fixed start keeps every test repeatable alone and in company."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
