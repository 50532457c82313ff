"""Score a trained model: python -m moe_jax.evaluate --workdir runs/moe [--data DIR].

Prints one JSON object: the loss in nats a token, perplexity, bits per byte and the tokens scored, each of them once,
in consecutive windows of the training context (or in whole documents, as the model was trained), without noise,
dropout or drops. bits_per_byte is null where unknown tokens stand for bytes that are not known, and so is every number
that is not finite.
"""

import json
import sys
from pathlib import Path

from moe_jax import command


def main() -> None:
    from moe_jax.command_line import parse_evaluate
    from moe_jax.runs.layout import RunDirectory, latest_run

    arguments = parse_evaluate(sys.argv[1:], __doc__ or "")
    command.use_huge_pages()
    if arguments.workdir is not None:
        run = RunDirectory(Path(arguments.workdir))
    else:
        run = latest_run()
        print(f"note: scoring {run.path}, the run that changed last", file=sys.stderr)
    config = run.load_config()  # what is wrong with it is told before jax is loaded

    from moe_jax.runs.metrics import finite
    from moe_jax.sampling.generator import is_causal
    from moe_jax.training.evaluation import evaluate_run

    if not is_causal(config.model):
        print("note: experts that choose have seen later tokens too, and drop some", file=sys.stderr)

    scores = evaluate_run(run, arguments.data, arguments.split, arguments.checkpoint)
    print(json.dumps(finite(scores), allow_nan=False))


if __name__ == "__main__":
    command.run(main)
