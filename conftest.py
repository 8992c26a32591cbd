"""How the tests run: on one thread, with 25 fixed examples a property.

`pytest -m slow` runs the long versions;
HYPOTHESIS_PROFILE=search draws 500 random examples instead.
"""

import os

import hypothesis
import torch

hypothesis.settings.register_profile("fixed", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=500)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_configure(config):
    torch.set_num_threads(1)  # results depend on the number of threads in the last bit
    config.addinivalue_line("markers", "slow: minutes instead of seconds; run with -m slow")
    config.addinivalue_line("filterwarnings", "error")
    # torchvision's way of unpacking a tarball, on Python 3.12 and 3.13
    config.addinivalue_line("filterwarnings", "ignore:Python 3.14 will:DeprecationWarning")
    config.option.markexpr = config.option.markexpr or "not slow"
