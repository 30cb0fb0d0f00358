"""Names that every docstring example may use; nothing a test loads is cached outside its run."""

import os
import tempfile

import pytest
import torch
from torch import nn

import normprop

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="normprop-tests-")


@pytest.fixture(autouse=True)
def _seeded(doctest_namespace: dict[str, object]) -> None:
    doctest_namespace.update(normprop=normprop, torch=torch, nn=nn)
    torch.manual_seed(0)
