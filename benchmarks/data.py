"""How fast is text tokenized and loaded, and how soon does training on a large data set start?

    python benchmarks/data.py [--tokens 1000000000] [--megabytes 64] [--rounds 3] [--json]

Tokenization: stories cut from the embedded plays, 64 MB of JSON lines, by a vocabulary of 2,048. The bound is
tiktoken's ``encode_ordinary`` on the same texts, already in memory, in one thread of this process. ``prepare`` is the
whole command without making the tokenizer: two passes over the file, tokens in shards on disk; ``tokenize and write``
is its second pass. Loader: rows of 512 tokens, 32 a batch, on one core. Start-up: from the prepared folder to the
first batch, beyond the imports, on a data set of a billion tokens made for it. Variants take turns; medians count.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from moe_jax.config import DataConfig
from moe_jax.data.byte_pairs import BpeTokenizer
from moe_jax.data.dataset import FORMAT_VERSION, LENGTHS, Corpus, MadeFrom, Split, file_sha256, open_dataset
from moe_jax.data.tokenizer_file import save_tokenizer
from moe_jax.errors import run
from moe_jax.prepare import folder as preparation
from moe_jax.prepare.folder import prepare_folder, write_meta
from moe_jax.prepare.formats import ReadOptions, read_play
from moe_jax.prepare.plays import find_plays
from moe_jax.prepare.settings import PrepareConfig
from moe_jax.prepare.tokenizer import build_tokenizer

LENGTH, BATCH = 512, 32
MODES = ("windows", "packed", "padded")


def seconds_of(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def stories(megabytes: int) -> list[str]:
    """Pieces of 60 to 300 words of the plays, until they are ``megabytes`` long."""
    play_texts = ("".join(text for text, _ in read_play(file, ReadOptions())) for _, file in find_plays())
    words = "".join(play_texts).split(" ")
    random, found, size = np.random.default_rng(0), [], 0
    while size < megabytes * 1e6:
        start, count = int(random.integers(len(words) - 300)), int(random.integers(60, 300))
        found.append(" ".join(words[start : start + count]))
        size += len(found[-1])
    return found


def tokenization(folder: Path, megabytes: int, rounds: int) -> list[dict[str, Any]]:
    import tiktoken

    texts = stories(megabytes)
    file = folder / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = build_tokenizer("bpe:2048", texts[:20_000])
    save_tokenizer(tokenizer, folder / "tokenizer")
    assert isinstance(tokenizer, BpeTokenizer)
    alone = tiktoken.Encoding("alone", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.ranks, special_tokens={})
    size = sum(len(text.encode()) for text in texts) / 1e6
    second_pass: list[float] = []
    real = preparation._write_corpus

    def timed(*arguments: Any) -> Corpus:
        start = time.perf_counter()
        made = real(*arguments)
        second_pass.append(time.perf_counter() - start)
        return made

    cores = sorted(os.sched_getaffinity(0))
    processes = sorted({1, min(2, len(cores)), len(cores)})
    times: dict[str, list[float]] = {"tiktoken, one thread": []}
    for round_number in range(rounds):
        times["tiktoken, one thread"].append(seconds_of(lambda: [alone.encode_ordinary(text) for text in texts]))
        for number in processes:
            config = PrepareConfig(
                input=(str(file),),
                out=str(folder / f"out-{round_number}-{number}"),
                tokenizer=str(folder / "tokenizer"),
                processes=number,
            )
            with mock.patch.object(preparation, "_write_corpus", timed):
                whole = seconds_of(lambda config=config: prepare_folder(config))
            times.setdefault(f"prepare, {number} processes", []).append(whole)
            times.setdefault(f"tokenize and write, {number} processes", []).append(second_pass[-1])
    medians = {name: statistics.median(values) for name, values in times.items()}
    bound = medians["tiktoken, one thread"]
    return [
        {"what": name, "MB/s": round(size / median, 2), "of tiktoken": round(bound / median, 2)}
        for name, median in medians.items()
    ]


def make_large(folder: Path, num_tokens: int) -> None:
    """A prepared folder of random tokens in documents of some 250."""
    random = np.random.default_rng(0)
    tokenizer = build_tokenizer("bpe:2048", ["the quick brown fox " * 50])
    save_tokenizer(tokenizer, folder / "tokenizer")
    (folder / "text").mkdir(parents=True)
    splits = {}
    for name, size in (("train", num_tokens), ("val", 100_000)):
        lengths = np.clip(random.lognormal(5.4, 0.5, size // 200), 8, 4000).astype(LENGTHS)
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), size)) + 1]
        total = int(lengths.sum())
        split = Split(
            name=name,
            folder=folder / "text",
            dtype="uint16",
            shard_tokens=100_000_000,
            num_tokens=total,
            num_documents=len(lengths),
            num_bytes=4 * total,
            num_unknown=0,
            sha256={},
        )
        lengths.tofile(split.lengths_file)
        for file, num_tokens in split.shards():
            random.integers(tokenizer.vocab_size, size=num_tokens, dtype=np.uint16).tofile(file)
        sha256 = {file.name: file_sha256(file) for file, _ in split.files()}
        splits[name] = dataclasses.replace(split, sha256=sha256)
    origin = MadeFrom(FORMAT_VERSION, {"val_fraction": 0.0001}, {})
    write_meta(folder, tokenizer, [Corpus("text", 1.0, splits["train"], splits["val"])], origin)


def loading(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Start-up and throughput in every mode, in turns."""
    from moe_jax.data.batches import train_batches  # here, for the processes that tokenize import this file too

    starts: dict[str, list[float]] = {mode: [] for mode in MODES}
    rates: dict[str, list[float]] = {mode: [] for mode in MODES}
    useful: dict[str, float] = {}
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # threads that are made from here on inherit it
    for _ in range(rounds):
        for mode in MODES:
            start = time.perf_counter()
            config = DataConfig(path=str(folder), mode=mode, batch_size=BATCH)
            with train_batches(open_dataset(folder), config, LENGTH) as batches:
                batch = next(batches)
                starts[mode].append(time.perf_counter() - start)
                number = 0
                start = time.perf_counter()
                while time.perf_counter() - start < 2.0:
                    batch = next(batches)
                    number += 1
                rates[mode].append(number * BATCH / (time.perf_counter() - start))
                useful[mode] = float(batch["mask"].mean()) if "mask" in batch else 1.0
    os.sched_setaffinity(0, cores)
    return [
        {
            "mode": mode,
            "start-up, s": round(statistics.median(starts[mode]), 2),
            "rows/s": round(statistics.median(rates[mode])),
            "M tokens/s": round(statistics.median(rates[mode]) * LENGTH / 1e6, 1),
            "of them not padding": round(useful[mode], 3),
        }
        for mode in MODES
    ]


def show(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print("\n".join(json.dumps(row) for row in rows))
        return
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=10**9, help="size of the data set for start-up and loader")
    parser.add_argument("--megabytes", type=int, default=64, help="text to tokenize")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one object a line instead of tables")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        show(tokenization(Path(folder), arguments.megabytes, arguments.rounds), arguments.json)
        make_large(Path(folder) / "large", arguments.tokens)
        show(loading(Path(folder) / "large", arguments.rounds), arguments.json)


if __name__ == "__main__":
    run(main)
