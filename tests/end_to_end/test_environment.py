"""A machine that is not as it should be: folders without permission, a clock that goes backwards."""

import re

import pytest

from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.metrics_file import read_metrics
from tests.end_to_end.tiny import make_home, train


@pytest.mark.parametrize(
    ("forbidden", "workdir", "named"),
    [
        ("mine", "mine", "mine/.lock"),
        pytest.param("theirs", "theirs/run", "theirs/run", marks=pytest.mark.slow),
        pytest.param("cache/moe_jax", "new", r"\S*/cache/moe_jax/\w+", marks=pytest.mark.slow),
    ],
)
def test_a_folder_that_may_not_be_written_is_one_line_and_nothing_changes(tmp_path, forbidden, workdir, named):
    home = make_home(tmp_path)
    folder = home / forbidden
    folder.mkdir(parents=True)
    folder.chmod(0o555)
    try:
        done = train(home, workdir, {"no_privileges": {}})
        assert list(folder.iterdir()) == []
    finally:
        folder.chmod(0o755)
    assert done.returncode == 1
    assert re.fullmatch(f"error: Permission denied: {named}\n", done.stderr), done.stderr
    assert done.stdout == ""
    assert (home / workdir).exists() == (workdir == forbidden)


def without_speed(run):
    return [
        {name: value for name, value in line.items() if not name.endswith("_per_second")}
        for line in read_metrics(run.metrics_file)
    ]


@pytest.mark.slow
def test_a_clock_that_goes_backwards_changes_nothing(tmp_path):
    home = make_home(tmp_path)
    straight, back = home / "runs" / "straight", home / "runs" / "back"
    assert train(home, straight, {}, "--train.num-steps", 20).returncode == 0
    for steps in (10, 20):
        done = train(home, back, {"clock_backwards": {}}, "--train.num-steps", steps, "--optimizer.decay-steps", 20)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert f"step {steps}: train" in done.stdout
    assert "going on from step 10" in done.stdout
    expected = without_speed(RunDirectory(straight))
    assert [line["step"] for line in expected] == [5, 10, 10, 15, 20, 20]
    assert without_speed(RunDirectory(back)) == expected
    times = [line[:19] for line in (back / "train.log").read_text().splitlines() if line.startswith("20")]
    assert times[0] > times[-1], "the clock went backwards"
