"""A trained run, opened for reading: each of its files is read and checked once. Imports no jax."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.config import Config
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokenizer_file import load_tokenizer
from moe_jax.runs.checkpoint.record import Found, Which, find_checkpoint
from moe_jax.runs.layout import RunDirectory, latest_run
from moe_jax.runs.resume import check_same_model


@dataclass(frozen=True)
class OpenedRun:
    directory: RunDirectory
    config: Config
    tokenizer: Tokenizer
    checkpoint: Found
    is_latest: bool
    """Whether nobody named it, and it is the run under runs/ that changed last."""

    def restore(self, items: Mapping[str, Any]) -> dict[str, Any]:
        """The named ``items`` of the checkpoint, in the shapes, types and shardings given.

        UserError where one is damaged, or is not of the model that config.json and the tokenizer describe.
        """
        from moe_jax.runs.checkpoint.restore import restore_items

        found = self.checkpoint
        if not found.folder.exists():  # a training that goes on has saved a newer one, or a better one, meanwhile
            found = find_checkpoint(self.directory.checkpoints, found.which)
            check_same_model(found.record, self.directory, self.config, self.tokenizer)
        found.check(items)
        return restore_items(found.folder, found.record, items)


def open_run(workdir: Path | None, which: Which) -> OpenedRun:
    """The run in ``workdir``, None: the one under runs/ that changed last, and its best or newest checkpoint.

    UserError where config.json, the tokenizer or the checkpoint's record is missing, damaged or of another version, or
    where the first two are not those that the checkpoint was made with.
    """
    directory = latest_run() if workdir is None else RunDirectory(workdir)
    config, tokenizer = directory.load_config(), load_tokenizer(directory.tokenizer)
    found = find_checkpoint(directory.checkpoints, which)
    check_same_model(found.record, directory, config, tokenizer)
    return OpenedRun(directory, config, tokenizer, found, workdir is None)
