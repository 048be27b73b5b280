"""Fixtures for all tests, and the rule for tests that need a GPU."""

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model

# The models are tiny, so threads bring nothing; and beside other work on the same cores they wait for one another,
# which makes a run of the suite many times slower.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Longer runs of what is drawn at random."""
    parser.addoption("--schedules", type=int, default=20_000, help="random schedules without a model (default: 20,000)")
    parser.addoption("--model-schedules", type=int, default=240, help="random schedules with a tiny one (default: 240)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none, and say so."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A folder with the weights of each tiny random model."""
    folders = {}
    for name in ARCHITECTURES:
        folders[name] = tmp_path_factory.mktemp(name)
        tiny_model(name).save_pretrained(folders[name])
    return folders
