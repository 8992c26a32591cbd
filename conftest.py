"""How the tests run: on one thread, with 25 fixed examples a property, in folders of their own.

`pytest -m slow` runs the long versions;
HYPOTHESIS_PROFILE=search draws 500 random examples instead.
"""

import os
import signal
import threading

import pytest


def pytest_configure(config):
    if os.name == "nt":
        pytest.exit("the tests need Linux or macOS; on Windows, WSL")
    if config.getoption("dist", "no") == "no":  # not where pytest-xdist only hands the tests out
        import hypothesis
        import torch
        from tqdm import tqdm

        import log

        profile = hypothesis.settings.register_profile
        profile("fixed", deadline=None, max_examples=25, derandomize=True)
        profile("search", deadline=None, max_examples=500)
        hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))
        torch.set_num_threads(1)  # results depend on the number of threads in the last bit
        # A shell's script starts `pytest &` with SIGINT ignored, nohup with SIGHUP. What the
        # tests start would ignore them as well, and many tests wait for its end.
        for number in log.SIGNALS:
            is_ctrl_c = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if is_ctrl_c else signal.SIG_DFL)
        # tqdm has one lock for a process and its forks: held by one that is killed, it would stop
        # all others for good.
        os.register_at_fork(after_in_child=lambda: tqdm.set_lock(threading.RLock()))
    config.addinivalue_line("markers", "slow: minutes instead of seconds; run with -m slow")
    config.addinivalue_line("filterwarnings", "error")
    # an NVIDIA driver that is older than PyTorch's CUDA
    config.addinivalue_line("filterwarnings", "ignore:CUDA initialization")
    # torchvision's way of unpacking a tarball, on Python 3.12 and 3.13
    config.addinivalue_line("filterwarnings", "ignore:Python 3.14 will:DeprecationWarning")
    # Matplotlib before 3.10.7 calls pyparsing by its old names
    config.addinivalue_line("filterwarnings", "ignore:.*deprecated - use:DeprecationWarning")
    config.option.markexpr = config.option.markexpr or "not slow"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The test has a folder of its own, and leaves no global switch behind."""
    import torch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with torch.random.fork_rng(devices=[]):
        yield tmp_path
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def tiny():
    """For a module: see testing.tiny_world."""
    from testing import tiny_world

    with tiny_world():
        yield


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """The folder of a finished tiny run, not to be written to."""
    from testing import run, tiny_world

    out = tmp_path_factory.mktemp("plain") / "out"
    with tiny_world():
        assert run(out=out) == 0
    return out
