"""The data of a run: a prepared folder, or a text that is prepared once and found again. Imports no jax."""

import dataclasses
import hashlib
import json
import logging
import os
import shlex
from pathlib import Path

from moe_jax.config import DataConfig
from moe_jax.data.dataset import FORMAT_VERSION, Dataset, is_dataset, meta_file, open_dataset
from moe_jax.data.tokenizer import Delimiters
from moe_jax.data.tokenizer_file import fingerprint
from moe_jax.errors import EnvironmentFault, UserError
from moe_jax.files import make_writable
from moe_jax.prepare.folder import prepare_folder
from moe_jax.prepare.plays import PLAYS
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.prepare.sources import HUB, CorpusSources, find_corpora
from moe_jax.prepare.tokenizer import PUBLISHED, build_tokenizer, file_of_spec, spec_by_content

log = logging.getLogger("moe_jax")


def find_or_prepare(
    data: DataConfig,
    cache: Path,
    delimiters: Delimiters = "endoftext",
    *,
    of_run: Path | None = None,
    or_nothing: bool = False,
) -> Dataset:
    """The prepared folder that ``data`` names, or that of a text, made in ``cache`` unless it is there.

    ``delimiters`` are those of a text's documents; a prepared folder has its own. UserError where the text or the
    tokenizer does not exist, before any work, where the folder was prepared with other settings, or where the text is
    too short to hold something out, unless ``or_nothing`` may be held out of it; EnvironmentFault where ``cache``
    cannot be written.

    ``of_run``: the folder of a run's tokenizer, where ``data`` is the run's and not this user's. Then nothing that is
    not in ``cache`` is fetched: a data set of the hub is a UserError, and that tokenizer stands for a published one.
    """
    if data.path is not None and Path(data.path).is_dir() and is_dataset(Path(data.path)):
        found = open_dataset(Path(data.path))
        _check_matches(data, found)
        return found
    config = PrepareConfig(
        input=(PLAYS if data.path is None else data.path,),
        tokenizer=data.tokenizer or PrepareConfig.tokenizer,
        val_fraction=data.val_fraction or PrepareConfig.val_fraction,
        delimiters=delimiters,
    )
    try:
        (corpus,) = find_corpora(config)
    except UserError as error:
        raise UserError(f"data.path={data.path}: {error}") from None
    folder = cache / _cache_key(config, corpus)
    config = dataclasses.replace(config, out=str(folder))
    if meta_file(folder).exists():
        try:
            return open_dataset(folder)
        except UserError as error:  # damaged, but the text to make it from is there
            log.debug(f"{folder} is made again: {error}")
    if of_run is not None and config.tokenizer in PUBLISHED:
        data = dataclasses.replace(data, tokenizer=str(of_run))
        return find_or_prepare(data, cache, delimiters, of_run=of_run, or_nothing=or_nothing)
    if of_run is not None and any(source.path.startswith(HUB) for source in corpus.train):
        raise UserError(
            f"the run's text is {data.path}, which is not on this machine and is fetched only for who names it; "
            f"add --data {shlex.quote(str(data.path))}"
        )
    try:
        make_writable(cache)
    except OSError as error:
        raise EnvironmentFault(
            f"{cache}, where the tokens of a text are kept, cannot be written ({error.strerror}); set XDG_CACHE_HOME "
            "to a folder that can, or prepare the text with python -m moe_jax.prepare and name its folder"
        ) from None
    return prepare_folder(config, is_cache=True, or_nothing=or_nothing)


def _check_matches(data: DataConfig, found: Dataset) -> None:
    """UserError where settings that ask for something by name are not what the folder was prepared with."""
    settings = found.made_from.settings
    if data.val_fraction is not None and data.val_fraction != settings.get("val_fraction"):
        before = settings.get("val_fraction")
        raise UserError(
            f"data.val_fraction is {data.val_fraction}, but {data.path} was prepared with {before}; "
            "leave it out, or prepare another folder"
        )
    if data.tokenizer is None or data.tokenizer == found.tokenizer.name:
        return
    if file_of_spec(data.tokenizer):
        asked = build_tokenizer(data.tokenizer, (), found.tokenizer.delimiters)
        if fingerprint(asked) == fingerprint(found.tokenizer):
            return
    raise UserError(
        f"data.tokenizer is {data.tokenizer}, but {data.path} was prepared with {found.tokenizer.name}; leave it out, "
        "or prepare another folder"
    )


def _cache_key(config: PrepareConfig, corpus: CorpusSources) -> str:
    """A hash of what the streams are made from; files count by their content, the embedded plays by their sizes."""
    settings = [FORMAT_VERSION, spec_by_content(config.tokenizer), config.delimiters, config.val_fraction]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for source in corpus.train:
        size = Path(source.path).stat().st_size if source.name.startswith(PLAYS) else source.sha256()
        digest.update(os.fsencode(f"\0{source.name}\0{size}"))
    return digest.hexdigest()[:32]
