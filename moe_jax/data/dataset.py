"""A prepared folder: its table of contents, and how it is checked before it is used. Imports no jax.

``meta.json`` is written last, so a folder that has one is whole.
"""

import contextlib
import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_jax.data.shards import Split, file_sha256
from moe_jax.data.tokenizer import Tokenizer, fingerprint, load_tokenizer
from moe_jax.errors import UserError
from moe_jax.files import atomic_write_text, cache_folder

# Raise it when the same text and settings would give other files.
FORMAT_VERSION = 3


@dataclass(frozen=True)
class Corpus:
    name: str
    weight: float
    """Share of the training rows; those of all corpora sum to one."""
    train: Split
    val: Split


@dataclass(frozen=True)
class PreparedData:
    folder: Path
    tokenizer: Tokenizer
    corpora: tuple[Corpus, ...]
    made_from: dict[str, Any]
    """The settings, sources and split that the files were made with."""
    fingerprint: str
    """Identifies the token streams and their mixture: equal fingerprints mean equal batches."""

    def splits(self, name: str) -> list[Split]:
        """The ``train`` or ``val`` split of each corpus."""
        return [corpus.train if name == "train" else corpus.val for corpus in self.corpora]


def meta_file(folder: Path) -> Path:
    return folder / "meta.json"


def progress_file(folder: Path) -> Path:
    """What an unfinished preparation knows of itself."""
    return folder / "progress.json"


def is_prepared(folder: Path) -> bool:
    """Whether ``folder`` is one that a preparation made, or began."""
    return meta_file(folder).exists() or progress_file(folder).exists()


def write_meta(folder: Path, tokenizer: Tokenizer, corpora: tuple[Corpus, ...], made_from: dict[str, Any]) -> None:
    """Makes ``folder`` a prepared one: all its other files are whole."""
    meta = {
        "version": FORMAT_VERSION,
        "fingerprint": _fingerprint(tokenizer, corpora),
        "tokenizer": {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "sha256": fingerprint(tokenizer)},
        "corpora": [
            {
                "name": corpus.name,
                "weight": corpus.weight,
                "train": _split_to_json(corpus.train),
                "val": _split_to_json(corpus.val),
            }
            for corpus in corpora
        ],
        "made_from": made_from,
    }
    atomic_write_text(meta_file(folder), json.dumps(meta, indent=2) + "\n")
    _remember_checked(folder, meta["fingerprint"], corpora)


def open_prepared(folder: Path) -> PreparedData:
    """The prepared data in ``folder``, its files checked. UserError where they are not as they were made.

    A file's size is always compared, its SHA-256 where its time of change is not the one it had when it was last
    checked on this machine.
    """
    file = meta_file(folder)
    if not file.exists():
        raise UserError(
            f"the preparation of {folder} was interrupted; run the same python -m moe_jax.prepare command again "
            "to complete it"
        )
    tokenizer = load_tokenizer(folder / "tokenizer")
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
        if meta["version"] != FORMAT_VERSION:
            raise UserError(
                f"{file} has format version {meta['version']}, this program reads {FORMAT_VERSION}; prepare it again"
            )
        corpora = tuple(
            Corpus(
                entry["name"],
                entry["weight"],
                Split(name="train", folder=folder / entry["name"], **entry["train"]),
                Split(name="val", folder=folder / entry["name"], **entry["val"]),
            )
            for entry in meta["corpora"]
        )
        data = PreparedData(folder, tokenizer, corpora, meta["made_from"], meta["fingerprint"])
        if meta["tokenizer"]["sha256"] != fingerprint(tokenizer):
            raise UserError(f"the tokenizer in {folder} is not the one its tokens are from; prepare it again")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is corrupt ({error}); prepare the folder again") from None
    if _fingerprint(tokenizer, corpora) != data.fingerprint:
        raise UserError(f"{file} was changed after it was made; prepare the folder again")
    _check_files(data)
    return data


def _check_files(data: PreparedData) -> None:
    known = _checked(data.fingerprint)
    is_new = False
    for corpus in data.corpora:
        for split in (corpus.train, corpus.val):
            for file, size in split.files():
                if not file.exists():
                    raise UserError(f"{file} is missing; put a copy of it back, or prepare the folder again")
                if file.stat().st_size != size:
                    raise UserError(
                        f"{file} must have {size} bytes, has {file.stat().st_size}; put a copy of it back, or prepare "
                        "the folder again"
                    )
                if known.get(str(file.resolve())) == _stamp(file):
                    continue
                if file_sha256(file) != split.sha256[file.name]:
                    raise UserError(
                        f"{file} was changed after it was made (its SHA-256 is another); put a copy of it back, or "
                        "prepare the folder again"
                    )
                is_new = True
    if is_new:
        _remember_checked(data.folder, data.fingerprint, data.corpora)


def _checked(data_fingerprint: str) -> dict[str, int]:
    """Time of change of each file when its content was last known to be right, by its path."""
    try:
        return json.loads((cache_folder("checked") / f"{data_fingerprint}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _remember_checked(folder: Path, data_fingerprint: str, corpora: tuple[Corpus, ...]) -> None:
    files = [file for corpus in corpora for split in (corpus.train, corpus.val) for file, _ in split.files()]
    known = _checked(data_fingerprint) | {str(file.resolve()): _stamp(file) for file in files}
    cache = cache_folder("checked")
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a reading of the files at each start
        cache.mkdir(parents=True, exist_ok=True)
        atomic_write_text(cache / f"{data_fingerprint}.json", json.dumps(known))


def _stamp(file: Path) -> int:
    return file.stat().st_mtime_ns


def _split_to_json(split: Split) -> dict[str, Any]:
    values: dict[str, Any] = dataclasses.asdict(split)
    del values["name"], values["folder"]
    return values


def _fingerprint(tokenizer: Tokenizer, corpora: tuple[Corpus, ...]) -> str:
    parts = [
        [corpus.name, corpus.weight, [_split_to_json(split) for split in (corpus.train, corpus.val)]]
        for corpus in corpora
    ]
    content = json.dumps([FORMAT_VERSION, fingerprint(tokenizer), parts], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]
