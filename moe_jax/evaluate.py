"""Score a trained model: python -m moe_jax.evaluate --workdir runs/moe [--data DIR].

Prints one JSON object: the loss in nats a token, perplexity, bits per byte and the tokens scored, each of them once,
in consecutive windows of the training context (or in whole documents, as the model was trained), without noise,
dropout or drops. bits_per_byte is null where unknown tokens stand for bytes that are not known, and so is every number
that is not finite.
"""

from moe_jax.commands.evaluate import main
from moe_jax.errors import run

if __name__ == "__main__":
    run(lambda: main(__doc__ or ""))
