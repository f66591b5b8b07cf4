"""What all GPU tests share: they need a GPU, and their float32 products are exact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from genfast import _verify

WITHOUT = None if torch.cuda.is_available() else pytest.mark.skip(reason="needs a CUDA GPU: none is visible")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """They are collected everywhere, so that they at least import; without a GPU one of each function stands for
    all."""
    kept, seen = [], set()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            name = item.path, getattr(item, "originalname", item.name)
            if WITHOUT is not None:
                if name in seen:
                    continue
                seen.add(name)
                item.add_marker(WITHOUT)
        kept.append(item)
    items[:] = kept


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """No TF32, in products or in convolutions."""
    with _verify.exact_products():
        yield
