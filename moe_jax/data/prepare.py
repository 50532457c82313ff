"""From text to two streams of token ids on disk, made once and found again. Imports no jax."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from moe_jax.config import DataConfig
from moe_jax.data.sources import Document, find_files, load_documents, split_documents
from moe_jax.data.tokenizer import Tokenizer, build_tokenizer, fingerprint, load_tokenizer, save_tokenizer

# Raise it when the same text and settings would give other streams.
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Split:
    """One stream: each document's tokens with one end-of-text token before them."""

    name: str
    path: Path
    dtype: str
    num_documents: int
    num_tokens: int
    num_bytes: int
    """Bytes of the text in UTF-8."""
    num_unknown: int
    """Tokens that stand for unknown characters."""

    @property
    def tokens(self) -> np.ndarray:
        """The stream, mapped from disk."""
        return np.memmap(self.path, dtype=self.dtype, mode="r")


@dataclass(frozen=True)
class PreparedData:
    folder: Path
    tokenizer: Tokenizer
    train: Split
    val: Split
    fingerprint: str
    """Identifies the token streams: equal fingerprints mean equal batches."""


def prepare(data: DataConfig, cache: Path) -> PreparedData:
    """The streams of ``data``, from the cache where they are, else made there. Raises UserError on bad text.

    The folder is written beside its place and renamed, so neither a kill nor a second process leaves half of one.
    """
    folder = cache / _cache_key(data)
    found = _open(folder)
    if found is not None:
        return found
    train, val = split_documents(load_documents(data.path), data.val_fraction)
    cache.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=cache))
    try:
        _write(beside, data, train, val)
        if folder.exists():  # damaged, or just finished by another process
            shutil.rmtree(folder)
        os.replace(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    made = _open(folder)
    assert made is not None
    return made


def _cache_key(data: DataConfig) -> str:
    """A hash of what the streams are made from; files count by their content, the embedded plays by their sizes."""
    digest = hashlib.sha256(
        json.dumps([FORMAT_VERSION, data.tokenizer, data.val_fraction, data.path is None]).encode()
    )
    for name, file in find_files(data.path):
        content = str(file.stat().st_size) if data.path is None else hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"\0{name}\0{content}".encode())
    return digest.hexdigest()[:32]


def _write(folder: Path, data: DataConfig, train: list[Document], val: list[Document]) -> None:
    console = Console(stderr=True)
    with console.status(f"building the tokenizer {data.tokenizer}"):
        tokenizer = build_tokenizer(data.tokenizer, (document.text for document in train))
    save_tokenizer(tokenizer, folder / "tokenizer")
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    splits, digest = {}, hashlib.sha256(fingerprint(tokenizer).encode())
    for name, documents in (("train", train), ("val", val)):
        num_tokens = num_unknown = 0
        with open(folder / f"{name}.bin", "wb") as file:
            for ids in _encode(tokenizer, documents, f"encoding the {name} split", console):
                stream = np.asarray(ids, dtype)
                num_tokens += len(stream)
                num_unknown += 0 if tokenizer.unknown_id is None else int(np.sum(stream == tokenizer.unknown_id))
                digest.update(stream.tobytes())
                file.write(stream.tobytes())
        splits[name] = {
            "dtype": dtype.name,
            "num_documents": len(documents),
            "num_tokens": num_tokens,
            "num_bytes": sum(len(document.text.encode()) for document in documents),
            "num_unknown": num_unknown,
        }
    meta = {"version": FORMAT_VERSION, "fingerprint": digest.hexdigest()[:32], "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _encode(tokenizer: Tokenizer, documents: list[Document], what: str, console: Console) -> Iterator[list[int]]:
    shown = track(documents, what, console=console, transient=True, disable=not console.is_terminal)
    for document in shown:
        yield [tokenizer.endoftext_id, *tokenizer.encode(document.text)]


def _open(folder: Path) -> PreparedData | None:
    """The prepared data in ``folder``; None where there is none or it is damaged: then it is made anew."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        splits = {name: Split(name, folder / f"{name}.bin", **values) for name, values in meta["splits"].items()}
        tokenizer = load_tokenizer(folder / "tokenizer")
        for split in splits.values():
            if split.path.stat().st_size != split.num_tokens * np.dtype(split.dtype).itemsize:
                return None
        return PreparedData(folder, tokenizer, splits["train"], splits["val"], meta["fingerprint"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
