"""Where there is no GPU the Triton kernels run under Triton's interpreter; it must be asked for before Triton is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest first: begun in its turn it keeps one worker busy for a minute and a half after the other has done all else."""
    items.sort(key=lambda item: item.path.stem != "test_triton")


@pytest.fixture
def device() -> torch.device:
    """The device on which Triton kernels run here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def default_model():
    """The embedded default model; its first use converts the weights (about 30 s) into the user's cache."""
    from reflective import ReflectiveModel

    return ReflectiveModel.default()


@pytest.fixture(scope="module")
def letters():
    """A server on letters, of which one in five ends a step."""
    from served import live
    from test_search import reflective_model

    with live(reflective_model(prompt=None)) as server:
        yield server


@pytest.fixture(scope="module")
def alone():
    """The same model, of which no engine knows."""
    from test_search import reflective_model

    return reflective_model(prompt=None)
