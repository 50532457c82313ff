"""One folder for all real runs of a test process, so that what one has compiled the others find."""

import pytest

from tests.tiny import make_home, train


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def straight(home):
    """The run that nothing happened to."""
    result = train(home, home / "straight")
    assert result.returncode == 0, result.stderr
    return home / "straight"
