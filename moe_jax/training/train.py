"""The first two acts of a run: ``resolve`` what it is, ``restore_or_init`` its state. ``loop.fit`` is the third.

``resolve`` reads every file and looks at the machine once; nothing after it asks for either again.
"""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import msgspec
import optax
from jax.sharding import Mesh

from moe_jax.config import Config
from moe_jax.config.rules import check
from moe_jax.data.batches import batches_per_epoch, check_data
from moe_jax.data.dataset import Dataset
from moe_jax.errors import UserError
from moe_jax.model.decoder import Decoder, Variables
from moe_jax.model.machine import Machine, this_machine
from moe_jax.model.moe.backends import Choice, choose, for_machine
from moe_jax.runs.checkpoint.record import Saved
from moe_jax.runs.checkpoint.restore import newest_sound_for_all
from moe_jax.runs.checkpoint.save import Checkpoints
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.opened import OpenedRun
from moe_jax.runs.resume import check_same_run, check_same_text
from moe_jax.sharding.mesh import make_mesh
from moe_jax.training.init_from import open_source
from moe_jax.training.metrics import Interval
from moe_jax.training.optimizer import make_optimizer, make_schedule
from moe_jax.training.state import TrainState, abstract_state, check_random, init_state

log = logging.getLogger("moe_jax")


Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


@dataclass
class Progress:
    """What a run remembers beside its arrays; saved with every checkpoint."""

    data_fingerprint: str
    next_batch: Count = 0
    """The state of the data: batch n is a function of (seed, n)."""
    skipped_steps: Count = 0
    """Steps without a finite loss and gradient, which changed nothing."""
    skipped_in_a_row: Count = 0
    interval: dict[str, float | list] | list | None = None
    """``Interval.to_json`` of the steps since the last line of metrics.jsonl."""
    best_val_loss: float | None = None
    evaluations_without_gain: Count = 0
    train_seconds: float = 0.0
    """Spent in steps: without start-up, compilation, evaluation and saving."""


@dataclass(frozen=True)
class Setup:
    """What a start of a run is made of, read and checked once."""

    config: Config
    """With epochs as steps, and with what must not change over a run's life as it was at its first start."""
    run: RunDirectory
    dataset: Dataset
    mesh: Mesh
    decoder: Decoder
    """With the backend of training."""
    eval_decoder: Decoder
    """The same model with the backend of evaluation, where nothing is dropped."""
    machine: Machine
    backends: dict[str, Choice]
    """Of "training" and "evaluation", and why; empty for a dense model."""
    steps_per_epoch: int
    saved: Saved | None
    """The newest sound checkpoint; None for a new run."""
    source: OpenedRun | None
    """The run whose parameters a new one begins with."""

    @property
    def schedule(self) -> optax.Schedule:
        return make_schedule(self.config.optimizer, self.config.train.num_steps)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config.optimizer, self.schedule)

    @property
    def microbatch_size(self) -> int:
        return self.config.data.batch_size // self.config.optimizer.accumulation_steps


def resolve(config: Config, open_dataset: Callable[[], Dataset], workdir: Path) -> Setup:
    """Act one: all that a start depends on. Raises every UserError that can be known before it.

    ``open_dataset`` may prepare a large text, so it is called once all that needs no text has been checked. Nothing
    else is written.
    """
    run = RunDirectory(workdir)
    run.check_folders()
    if config.data.path is not None and Path(config.data.path).resolve() == run.path.resolve():
        raise UserError(f"--workdir must be another folder than data.path, got {run.path} for both; name a new one")
    saved = newest_sound_for_all(run.checkpoints)
    begun = _begun(run, saved)
    if begun is not None and saved is not None:
        _progress_of(saved)
        check_same_run(begun, config)
        check_random(saved.record.random, config.train.seed)
    microbatch_size = config.data.batch_size // config.optimizer.accumulation_steps
    mesh = make_mesh(config.mesh, config.model, microbatch_size)
    machine, num_tokens = this_machine(), microbatch_size * config.model.context_length
    models, backends, packed = {}, {}, config.data.mode == "packed"
    for phase, train in (("training", True), ("evaluation", False)):
        models[phase] = for_machine(config.model, num_tokens, train=train, machine=machine, packed=packed)
        if config.model.moe.num_experts:
            backends[phase] = choose(config.model.moe, num_tokens, train=train, machine=machine)

    dataset = open_dataset()
    if saved is not None:
        check_same_text(saved.record, config.data, dataset)
    check_data(dataset, config.data, config.model.context_length)
    steps_per_epoch = batches_per_epoch(dataset, config.data, config.model.context_length)
    config = _settle(config, begun, steps_per_epoch)
    source = None
    if config.train.init_from is not None and saved is None:
        source = open_source(config, dataset.tokenizer, run)
    vocab_size = dataset.tokenizer.vocab_size
    return Setup(
        config=config,
        run=run,
        dataset=dataset,
        mesh=mesh,
        decoder=Decoder(models["training"], vocab_size),
        eval_decoder=Decoder(models["evaluation"], vocab_size),
        machine=machine,
        backends=backends,
        steps_per_epoch=steps_per_epoch,
        saved=saved,
        source=source,
    )


def _begun(run: RunDirectory, saved: Saved | None) -> Config | None:
    """The configuration that the run was begun with; None before its first checkpoint, for that binds to nothing.

    UserError where the config.json of a folder without a checkpoint is not ours.
    """
    if saved is not None:
        return Config.from_dict(saved.record.config, str(run.checkpoints))
    if run.config_file.exists():
        run.load_config()
    return None


def _progress_of(saved: Saved) -> Progress:
    """What the checkpoint remembers. UserError where its record, though sealed, is none of a training's."""
    try:
        progress = msgspec.convert(saved.record.progress, Progress)
        Interval(progress.interval)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"the record of {saved.folder} is not one of a training ({error}); put a copy of the checkpoint back, or "
            "start a new run in another --workdir"
        ) from None
    return progress


def _settle(config: Config, begun: Config | None, steps_per_epoch: int) -> Config:
    """Epochs as steps, and the schedule's end as it was when the run began."""
    train = config.train
    if train.num_epochs is not None:
        train = dataclasses.replace(train, num_steps=train.num_epochs * steps_per_epoch)
    decay_steps = begun.optimizer.decay_steps if begun else config.optimizer.decay_steps or train.num_steps
    optimizer = dataclasses.replace(config.optimizer, decay_steps=decay_steps)
    return check(dataclasses.replace(config, train=train, optimizer=optimizer))


@dataclass(frozen=True)
class Start:
    """What a start of a run begins with."""

    state: TrainState
    progress: Progress
    restored_step: int | None
    """None for a new run."""


def restore_or_init(setup: Setup, checkpoints: Checkpoints) -> Start:
    """Act two: the newest checkpoint's state, or a new one with the parameters of ``setup.source``, if any."""
    seed, decoder = setup.config.train.seed, setup.decoder
    target = abstract_state(decoder, setup.optimizer, setup.mesh)
    if setup.saved is None:
        state = init_state(decoder, setup.optimizer, setup.mesh, seed)
        if setup.source is not None:
            variables = Variables.from_items(setup.source.restore(target.variables.to_items()))
            state = state.replace(params=variables.params, expert_bias_NE=variables.expert_bias_NE)
            log.info(f"parameters are those of the best checkpoint of {setup.source.directory.path}")
        return Start(state, Progress(setup.dataset.fingerprint), None)
    items = checkpoints.restore(target.checkpoint_items())
    step = jax.device_put(jnp.asarray(setup.saved.record.step, target.step.dtype), target.step.sharding)
    return Start(TrainState.from_items(step, items), _progress_of(setup.saved), setup.saved.record.step)
