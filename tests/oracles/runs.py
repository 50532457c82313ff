"""A run directory as a training would leave it, without one."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from moe_jax.data.tokenizer_file import save_tokenizer
from moe_jax.model.decoder import Decoder, Tokens, Variables
from moe_jax.prepare.tokenizer import build_tokenizer
from moe_jax.runs.checkpoint.record import Record
from moe_jax.runs.checkpoint.save import Checkpoints, Retention
from moe_jax.runs.layout import RunDirectory
from tests.oracles.moe import on_cpu
from tests.oracles.texts import VERSE


def write_run(folder, config, losses=(3.0,)):
    """``folder`` with a checkpoint of new parameters for each validation loss, of the steps 2, 4 and so on."""
    run, tokenizer = RunDirectory(folder), build_tokenizer("char", [VERSE])
    decoder = Decoder(on_cpu(config.model), tokenizer.vocab_size)
    initialise = jax.jit(lambda key: nn.unbox(decoder.init(key, Tokens(jnp.zeros((1, 2), jnp.int32))))["params"])
    folder.mkdir(parents=True)
    run.save_config(config)
    save_tokenizer(tokenizer, run.tokenizer)
    (folder / ".lock").touch()
    remembered = {"progress": {"data_fingerprint": "0"}, "config": config.to_dict()}
    with Checkpoints(run.checkpoints, None, Retention(newest=len(losses), best=1)) as checkpoints:
        for number, loss in enumerate(losses, start=1):
            variables = Variables(initialise(jax.random.key(number)))
            checkpoints.save(Record(step=2 * number, val_loss=loss, **remembered), variables.to_items())
    return run
