"""What train.py does: open or prepare the data, make the observers, call the three acts of a run."""

import functools
import logging
import math
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import jax
from clu import parameter_overview

from moe_jax.config import Config, TrainConfig
from moe_jax.data.tokenizer_file import save_tokenizer
from moe_jax.errors import Interrupted, UserError, naming_what_helps
from moe_jax.files import cache_folder, remove_leftovers
from moe_jax.model.moe.routing import is_causal
from moe_jax.prepare.cache import find_or_prepare
from moe_jax.report.pictures import draw
from moe_jax.runs.checkpoint.save import Checkpoints, Retention
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.log import start_log
from moe_jax.runs.metrics_file import MetricsFile
from moe_jax.sampling.engine import Engine
from moe_jax.sharding.mesh import use_mesh
from moe_jax.sharding.processes import first_then_all, is_first_process, join_processes, watched_processes
from moe_jax.sharding.startup import start_jax
from moe_jax.trackers.alarms import Alarms
from moe_jax.trackers.console import Console
from moe_jax.trackers.mlflow import MLflow, check_mlflow, end_what_was_left
from moe_jax.trackers.profile import Profile
from moe_jax.trackers.samples import Samples
from moe_jax.trackers.tensorboard import TensorBoard
from moe_jax.trackers.tracker import Tracker
from moe_jax.trackers.watchdog import Watchdog
from moe_jax.training.flops import count_params, flops_per_token
from moe_jax.training.loop import fit, is_out_of_patience
from moe_jax.training.observers import Ending, Observer
from moe_jax.training.signals import catch_signals
from moe_jax.training.state import TrainState
from moe_jax.training.train import Progress, Setup, Start, resolve, restore_or_init

log = logging.getLogger("moe_jax")

_LESS_MEMORY = (
    "raise --optimizer.accumulation-steps or lower --data.batch-size, save memory with --model.remat full or "
    "--model.dtype bfloat16, or make the model or its context smaller"
)


def train(config: Config, workdir: Path) -> None:
    """Trains ``config`` in the run directory ``workdir`` until it is done, out of patience or interrupted.

    Raises UserError before anything is written, and Interrupted once a signal's checkpoint is on disk.
    """
    began = time.monotonic()
    join_processes(config.mesh)
    start_jax(compile_cache=config.train.compile_cache)
    with watched_processes(config.mesh.heartbeat_seconds):
        _train(config, RunDirectory(workdir), began)


def _train(config: Config, run: RunDirectory, began: float) -> None:
    run.check_unlocked()
    if "mlflow" in config.train.trackers:
        check_mlflow(config.train, run)
    # Where processes share a cache, the first one prepares what all read.
    open_dataset = functools.partial(find_or_prepare, config.data, cache_folder("data"))
    setup = resolve(config, lambda: first_then_all(open_dataset), run.path)
    config, dataset = setup.config, setup.dataset
    engine = None
    if is_causal(config.model.moe):  # no text can be sampled from experts that choose among later tokens too
        engine = Engine(config, dataset.tokenizer, setup.machine)
        engine.check_stop_tokens(config.sample)
    with (
        naming_what_helps(_LESS_MEMORY),
        run.lock(),
        start_log(run.log_file),
        use_mesh(setup.mesh),
        catch_signals(seconds=_seconds_left(config.train, began), is_shared=jax.process_count() > 1) as request,
    ):
        retention = Retention(newest=config.train.keep_checkpoints, best=config.train.keep_best)
        with Checkpoints(run.checkpoints, setup.saved, retention) as checkpoints:
            start = restore_or_init(setup, checkpoints)
            if _is_finished(setup, start):
                _end_what_was_left(setup, start)
                return
            if is_first_process():
                for file in (run.metrics_file, run.config_file, run.mlflow_file, run.loss_curve, run.expert_load):
                    remove_leftovers(file)
            # Metrics first: where something is wrong with them, no tracker is left with a run that never began.
            with MetricsFile(run, start.restored_step) as metrics, _Watch() as watch:
                for observer in _observers(setup, start, engine):
                    watch.observers.append(observer)
                run.save_config(config)
                if is_first_process():
                    save_tokenizer(dataset.tokenizer, run.tokenizer)
                _describe(setup, start.state)
                state = fit(setup, start, checkpoints, metrics, watch.observers, request)
                watch.files = _draw(run)
                watch.ending = "finished" if request.exit_code is None else "interrupted"
        _conclude(setup, int(state.step), start.progress, request.exit_code)
    if request.exit_code is not None:
        raise Interrupted(request.exit_code)


def _seconds_left(train: TrainConfig, began: float) -> float:
    return math.inf if train.max_minutes is None else began + 60 * train.max_minutes - time.monotonic()


def _observers(setup: Setup, start: Start, engine: Engine | None) -> Iterator[Observer]:
    """Those that the settings ask for, each begun when it is due. UserError where a tracker cannot begin."""
    config, run = setup.config, setup.run
    yield Alarms(config.model.moe)
    trackers: list[Tracker] = []
    if is_first_process():
        if "mlflow" in config.train.trackers:
            trackers.append(MLflow(config, run, start.restored_step))
            yield trackers[-1]
        if "tensorboard" in config.train.trackers:
            trackers.append(TensorBoard(run, start.restored_step))
            yield trackers[-1]
        if config.train.profile is not None:
            yield Profile(config.train.profile, run.profile)
        if config.train.watchdog is not None:
            yield Watchdog(config.train.watchdog, run.stacks)
    if engine is not None:
        yield Samples(engine, config.sample, trackers)
    yield Console(config.train.num_steps, int(start.state.step))


class _Watch:
    """The observers of a start. At the end of a ``with`` block all are closed: as failed, unless it said otherwise."""

    def __init__(self) -> None:
        self.observers: list[Observer] = []
        self.ending: Ending = "failed"
        self.files: Sequence[Path] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for observer in reversed(self.observers):
            try:
                observer.close(self.ending, self.files)
            except Exception as error:  # noqa: BLE001 - the others are to be closed, and the run's own end counts
                log.warning(f"warning: {type(observer).__name__} could not be closed ({error})")


def _is_finished(setup: Setup, start: Start) -> bool:
    train, run, step = setup.config.train, setup.run, int(start.state.step)
    if step >= train.num_steps:
        log.info(
            f"{run.path} is finished: {step} steps are done. "
            f"To go on, run the same command with --train.num-steps above {step}"
        )
        return True
    if is_out_of_patience(train, start.progress):
        log.info(
            f"{run.path} stopped early at step {step}: {start.progress.evaluations_without_gain} evaluations without "
            f"a lower validation loss. To go on, run the same command with --train.patience above {train.patience}"
        )
        return True
    return False


def _end_what_was_left(setup: Setup, start: Start) -> None:
    """What the start that made the last step was killed before: pictures, and the end of MLflow's run."""
    config, run = setup.config, setup.run
    if not is_first_process():
        return
    save_tokenizer(setup.dataset.tokenizer, run.tokenizer)  # the checkpoint's, which somebody may have changed since
    picture, metrics = run.loss_curve, run.metrics_file
    if not picture.exists() or (metrics.exists() and metrics.stat().st_mtime > picture.stat().st_mtime):
        _draw(run)
    if "mlflow" in config.train.trackers:
        files = [file for file in (picture, run.expert_load) if file.exists()]
        end_what_was_left(config, run, int(start.state.step), files)


def _describe(setup: Setup, state: TrainState) -> None:
    """What is being trained, on what and where, before the first step."""
    config, moe, devices = setup.config, setup.config.model.moe, setup.mesh.devices
    log.info(parameter_overview.get_parameter_overview(state.params, include_stats=False))
    total, active = count_params(state.params, moe)
    log.info(f"parameters: {total:,} in all, {active:,} active for a token")
    log.info(f"operations: {flops_per_token(state.params, config.model) / 1e6:,.1f} MFLOP for a token's step")
    _describe_data(setup)
    sizes = setup.mesh.shape
    mesh = ", ".join(f"mesh.{name}={size}" for name, size in sizes.items() if size > 1)
    kind = f"{devices.size} x {devices.flat[0].device_kind} ({jax.default_backend()})"
    log.info(f"devices: {kind}" + (f", {mesh}" if mesh else ""))
    if (vocab_size := setup.dataset.tokenizer.vocab_size) % sizes["tensor"]:
        log.info(
            f"each device holds all {vocab_size:,} rows of the embedding: mesh.tensor={sizes['tensor']} does not "
            "divide them"
        )
    if moe.num_experts and moe.load_balancing_scope == "batch" and config.optimizer.accumulation_steps > 1:
        log.info("load is balanced over each microbatch, not over the accumulated batch")
    if int(state.step):
        log.info(f"going on from step {int(state.step)}")
    for phase, backend in setup.backends.items():
        log.info(f"dispatch in {phase}: {backend}")
    attention = [decoder.config.attention for decoder in (setup.decoder, setup.eval_decoder)]
    log.info("attention in training: {}, in evaluation: {}".format(*attention))
    if not is_causal(config.model.moe):
        log.info(
            f"experts take {moe.capacity_factor} of a balanced share each, in evaluation too, among all tokens of a "
            "sequence, later ones included: the validation loss has seen the future, and no text can be sampled"
        )
    elif setup.backends and moe.capacity_factor is not None:
        log.info(f"in training experts accept {moe.capacity_factor} of a balanced share and drop the rest")


def _describe_data(setup: Setup) -> None:
    dataset, mode = setup.dataset, setup.config.data.mode
    for corpus in dataset.corpora:
        name = f"{corpus.name}, {corpus.weight:.1%} of the rows" if len(dataset.corpora) > 1 else corpus.name
        log.info(
            f"{name}: {corpus.train.num_tokens:,} tokens to train on, {corpus.val.num_tokens:,} to validate, "
            f"{corpus.val.num_bytes / corpus.val.num_tokens:.3f} bytes a token "
            f"({dataset.tokenizer.name}, {dataset.tokenizer.vocab_size:,} different)"
        )
        if corpus.val.num_unknown:
            log.info(
                f"warning: {corpus.val.num_unknown:,} tokens to validate on stand for unknown characters, whose bytes "
                "are not known either: there will be no bits per byte"
            )
    epochs = setup.config.train.num_steps / setup.steps_per_epoch
    log.info(f"rows: {mode}; {setup.steps_per_epoch:,} steps are an epoch, {epochs:.2f} epochs in all")


def _draw(run: RunDirectory) -> list[Path]:
    """The pictures of the run that could be made; a run is not lost for one."""
    if not is_first_process():
        return []
    try:
        return draw(run)
    except (OSError, UserError) as error:  # no folder for matplotlib's own files, or metrics that somebody has changed
        log.warning(f"warning: there are no pictures ({error}); the run is complete without them")
        return []


def _conclude(setup: Setup, step: int, progress: Progress, exit_code: int | None) -> None:
    """The last lines: what was reached and what to do next."""
    if progress.skipped_steps:
        log.info(f"{progress.skipped_steps} steps had no finite loss and gradient and were left out")
    best = "" if progress.best_val_loss is None else f"; best validation loss {progress.best_val_loss:.4f} nats/token"
    log.info(f"{step} steps, {progress.train_seconds:.0f} s in steps{best}")
    memory = jax.local_devices()[0].memory_stats()  # a CPU does not count its own
    if memory is not None and "peak_bytes_in_use" in memory:
        log.info(f"largest use of a device's memory: {memory['peak_bytes_in_use'] / 2**30:.2f} GiB")
    if exit_code is not None:
        log.info(f"interrupted: the checkpoint of step {step} is on disk; run the same command to go on")
    elif step < setup.config.train.num_steps:
        log.info(f"stopped early: {progress.evaluations_without_gain} evaluations without a lower validation loss")
    if is_causal(setup.config.model.moe):
        log.info(f"sample from it: python sample.py --workdir {shlex.quote(str(setup.run.path))}")
