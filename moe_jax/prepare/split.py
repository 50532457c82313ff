"""Which documents are held out for validation: decided from their names and lengths alone. Imports no jax."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from moe_jax.errors import UserError
from moe_jax.prepare.plays import PLAYS
from moe_jax.prepare.sources import Piece


class InputScan:
    """What one pass over the documents of an input finds out; 16 bytes a document."""

    def __init__(self, seed: int):
        # Seed 0 leaves the names alone, so that a split can be found again by hand.
        self._salt = f"\0{seed}" if seed else ""
        self._sizes, self._ranks = array("Q"), array("Q")
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        self.first_name = ""

    def add(self, piece: Piece) -> None:
        encoded = piece.text.encode()
        self.num_bytes += len(encoded)
        self._digest.update(encoded)
        if piece.is_first:
            self.first_name = self.first_name or piece.name
            name = piece.name.removeprefix(PLAYS) + self._salt
            self._ranks.append(int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big"))
            self._sizes.append(0)
            self._digest.update(b"\xff")  # no byte of UTF-8: tells where a document begins
        self._sizes[-1] += len(piece.text)

    @property
    def num_documents(self) -> int:
        return len(self._sizes)

    @property
    def sizes(self) -> np.ndarray:
        """Characters of each document."""
        return np.frombuffer(self._sizes, np.uint64) if self._sizes else np.zeros(0, np.uint64)

    @property
    def order(self) -> np.ndarray:
        """Documents in the order in which they are held out: that of the hashes of their names."""
        return np.argsort(np.frombuffer(self._ranks, np.uint64), kind="stable")

    def sha256(self) -> str:
        """Of all text."""
        return self._digest.hexdigest()


@dataclass(frozen=True)
class HeldOut:
    """What of an input is validated on."""

    is_val: np.ndarray
    """[documents] bool."""
    cut: tuple[int, int] | None = None
    """(document, characters): of this one document the end is held out, after so many characters."""

    def assign(self, pieces: Iterable[Piece]) -> Iterator[tuple[str, Piece]]:
        """("train" or "val", piece) of each piece, where the cut makes two of one."""
        seen = 0
        for piece in pieces:
            if self.cut is None or piece.document != self.cut[0]:
                yield ("val" if self.is_val[piece.document] else "train"), piece
                continue
            kept = self.cut[1] - seen
            seen += len(piece.text)
            if kept >= len(piece.text):
                yield "train", piece._replace(is_last=kept == len(piece.text))
            elif kept <= 0:
                yield "val", piece._replace(is_first=kept == 0)
            else:
                yield "train", piece._replace(text=piece.text[:kept], is_last=True)
                yield "val", piece._replace(text=piece.text[kept:], is_first=True)


def hold_out(scan: InputScan, val_fraction: float, val_documents: int | None, corpus: str) -> HeldOut:
    """What is held out of the documents in ``scan``: the same whatever the order of files.

    Whole documents, in the order of the hashes of their names: ``val_documents`` of them, or each that brings the
    share of characters nearer to ``val_fraction``, never all. Where that does not come within a factor of two of it,
    as with a single document, the longest one is cut instead and its end held out.
    """
    is_val = np.zeros(scan.num_documents, bool)
    if val_documents is not None:
        if val_documents >= scan.num_documents:
            raise UserError(
                f"--val-documents must leave something to train on, got {val_documents} of the {scan.num_documents} "
                f"documents of {corpus}; lower it"
            )
        is_val[scan.order[:val_documents]] = True
        return HeldOut(is_val)
    wanted, held = val_fraction * float(scan.sizes.sum()), 0
    left = scan.num_documents - 1
    for document in scan.order:
        size = int(scan.sizes[document])
        if left == 0 or held >= wanted:
            break
        if abs(held + size - wanted) < abs(held - wanted):
            held, left = held + size, left - 1
            is_val[document] = True
    if wanted / 2 <= held <= wanted * 2:
        return HeldOut(is_val)
    order = scan.order  # of documents of the same length the first in it
    longest = int(order[np.argmax(scan.sizes[order])])
    size = int(scan.sizes[longest])
    if not 0 < round(wanted) < size:
        raise UserError(
            f"the fraction {val_fraction} to validate on leaves nothing to train on or to validate in the {size} "
            f"characters of the longest document of {corpus}; give more text or change the fraction"
        )
    return HeldOut(np.zeros(scan.num_documents, bool), (longest, size - round(wanted)))
