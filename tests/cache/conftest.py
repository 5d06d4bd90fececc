"""What the tests of the cache share: five pictures in three chunks, and a note of what is decoded."""

import pytest

from src.datasets import cache
from src.datasets.view import decode
from tests.cache.pictures import picture


@pytest.fixture
def paths(tmp_path):
    """Five pictures, which are three chunks."""
    return [picture(tmp_path / f"{i % 2}" / f"{i}.png", i) for i in range(5)]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "cache" / "train.bin"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(cache, "CHUNK", 2)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that were decoded, in order."""
    names = []

    def noted(path, view):
        names.append(path.name)
        return decode(path, view)

    monkeypatch.setattr(cache, "decode", noted)
    return names
