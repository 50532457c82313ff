"""The console and train.log."""

import logging
import re

from moe_jax.runs.log import start_log

log = logging.getLogger("moe_jax")


def test_messages_go_to_the_console_and_with_their_time_to_the_file(tmp_path, capsys):
    for message in ("first start", "second start"):
        with start_log(tmp_path / "train.log"):
            log.info(message)
            log.debug("only in the file\ud800")  # of a file's name that is no UTF-8
    assert capsys.readouterr().out == "first start\nsecond start\n"
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in lines] == [
        *("first start", "only in the file\\ud800"),
        *("second start", "only in the file\\ud800"),
    ]
    assert log.handlers == []
