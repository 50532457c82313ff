"""A trained run, opened for reading: each of its files is read and checked once. Imports no jax."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moe_jax.config import Config
from moe_jax.data.tokenizer import Tokenizer
from moe_jax.data.tokenizer_file import load_tokenizer
from moe_jax.errors import UserError
from moe_jax.runs.checkpoint.record import Found, Which, find_checkpoint
from moe_jax.runs.layout import RunDirectory, latest_run
from moe_jax.runs.resume import check_same_model

T = TypeVar("T")

_TRIES = 10


@dataclass
class OpenedRun:
    directory: RunDirectory
    config: Config
    tokenizer: Tokenizer
    checkpoint: Found
    """Another one once a training that goes on has removed it."""
    is_latest: bool
    """Whether nobody named it, and it is the run under runs/ that changed last."""

    def check(self, items: Iterable[str]) -> None:
        """UserError where one of ``items`` of the checkpoint is damaged; each is read and hashed once."""
        self._read(lambda found: found.check(items))

    def restore(self, items: Mapping[str, Any]) -> dict[str, Any]:
        """The named ``items`` of the checkpoint, in the shapes, types and shardings given.

        UserError where one is damaged, or is not of the model that config.json and the tokenizer describe.
        """
        from moe_jax.runs.checkpoint.restore import restore_items

        def read(found: Found) -> dict[str, Any]:
            found.check(items)
            return restore_items(found.folder, found.record, items)

        return self._read(read)

    def _read(self, read: Callable[[Found], T]) -> T:
        """What ``read`` returns of the checkpoint, or of a newer or better one where it was removed meanwhile."""
        for _ in range(_TRIES):
            try:
                value = read(self.checkpoint)
            except Exception:  # Orbax raises what it likes where files are gone
                if self.checkpoint.folder.exists():
                    raise
            else:
                if self.checkpoint.folder.exists():  # and so it was whole all the while
                    return value
            self.checkpoint = find_checkpoint(self.directory.checkpoints, self.checkpoint.which)
            check_same_model(self.checkpoint.record, self.directory, self.config, self.tokenizer)
        raise UserError(
            f"a training replaces the checkpoints of {self.directory.path} faster than they can be read; wait for it, "
            "or give it a larger train.keep_checkpoints"
        )


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
