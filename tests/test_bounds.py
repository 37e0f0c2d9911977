"""Lower bounds are those that `make test-oldest` installs."""

import re
from pathlib import Path


ROOT = Path(__file__).parent.parent


def test_the_oldest_versions_are_those_that_setup_admits():
    bounds = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (ROOT / "setup.py").read_text()))
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-oldest.txt").read_text(), re.M))
    del pinned["torch"]  # whose older builds for the CPU are not to be had
    assert len(pinned) > 8
    for name, version in pinned.items():
        short = re.sub(r"(\.0)+$", "", version)
        assert re.sub(r"(\.0)+$", "", bounds[name]) == short, name
