"""Names that every docstring example may use."""

import pytest
import torch
from torch import nn

import normprop


@pytest.fixture(autouse=True)
def _seeded(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(normprop=normprop, torch=torch, nn=nn)
    torch.manual_seed(0)
