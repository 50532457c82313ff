"""python -m moe_jax.prepare: parse the flags, prepare, print what was made."""

import shlex
import signal
import sys
from collections.abc import Iterable
from typing import Any

from moe_jax.data.dataset import Dataset, progress_file
from moe_jax.errors import Interrupted, show
from moe_jax.prepare.folder import prepare_folder
from moe_jax.prepare.settings import PrepareConfig, parse_prepare


def _describe(data: Dataset, config: PrepareConfig) -> Iterable[str]:
    for corpus in data.corpora:
        for split in (corpus.train, corpus.val):
            yield (
                f"{corpus.name} {split.name}: {split.num_documents:,} documents, {split.num_tokens:,} tokens, "
                f"{split.num_bytes / max(1, split.num_tokens):.3f} bytes a token"
            )
            if split.num_unknown:
                yield (
                    f"warning: {split.num_unknown:,} tokens of it stand for unknown characters, so that there will "
                    "be no bits per byte"
                )
        if len(data.corpora) > 1:
            yield f"{corpus.name}: {corpus.weight:.1%} of the training rows"
    yield f"tokenizer: {data.tokenizer.name}, {data.tokenizer.vocab_size:,} tokens; fingerprint {data.fingerprint}"
    if config.part is not None:
        yield f"part {config.part} is done; once all are, run the command with --join in place of --part"
        return
    yield f"train on it: python train.py --config configs/moe.py --data.path {shlex.quote(config.out)}"


def main() -> None:
    config = parse_prepare(sys.argv[1:])
    show("stdout")

    def stop(signal_number: int, _: Any) -> None:
        raise Interrupted(128 + signal_number)

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_number, stop)
    try:
        data = prepare_folder(config)
    except Interrupted:
        if progress_file(config.folder).exists():
            print("interrupted; run the same command again to complete it", file=sys.stderr)
        raise
    for line in _describe(data, config):
        print(line)
