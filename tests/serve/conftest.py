"""These tests run in `.venv-serve`, which has vLLM: `make test-serve`.

vLLM and the reference, `vzip.load`, answer in one environment, in float32. Pictures are processed a
little differently with another version of transformers.
"""

import gc
import importlib.util
import os

import pytest
import torch

# One process for engine and model, a small cache for keys and values, and no network.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


# `.venv` has no vLLM, and its tests pass over these.
HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]


def pytest_collection_modifyitems(items):
    """Put the tests that start an engine in this process last: it changes transformers for good."""
    if HAS_VLLM:
        items.sort(key=lambda item: "engine" in getattr(item, "fixturenames", ()))


@pytest.fixture
def engine():
    """Starts an engine for a folder, and frees it after the test."""
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engines = []

    def start(folder, **settings):
        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 512,
            "max_num_seqs": 8,
            "block_size": 32,
        }
        engines.append(LLM(str(folder), **defaults | settings))
        return engines[-1]

    yield start
    engines.clear()
    gc.collect()
    cleanup_dist_env_and_memory()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
