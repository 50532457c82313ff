"""What train.py does: start a run, or go on with the one that is there."""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from pathlib import Path

import jax
from clu import parameter_overview

from moe_jax.config import Config
from moe_jax.config.rules import check
from moe_jax.data.batches import batches_per_epoch, check_data
from moe_jax.data.dataset import PreparedData
from moe_jax.data.tokenizer import save_tokenizer
from moe_jax.errors import Interrupted, UserError
from moe_jax.files import cache_folder, remove_leftovers
from moe_jax.model.moe.backends import Choice, choose, this_machine
from moe_jax.prepare.cache import find_or_prepare
from moe_jax.report.pictures import plot_expert_load, plot_loss_curve
from moe_jax.runs.checkpoint.restore import read_record
from moe_jax.runs.checkpoint.save import Checkpoints, Retention
from moe_jax.runs.layout import RunDirectory, check_same_run, saved_steps
from moe_jax.runs.log import start_log
from moe_jax.runs.metrics_file import MetricsWriter
from moe_jax.sampling.engine import is_causal
from moe_jax.sharding.mesh import make_mesh, use_mesh
from moe_jax.sharding.startup import enable_compile_cache
from moe_jax.trackers.trackers import check_trackers, open_trackers
from moe_jax.training.evaluate import check_same_text
from moe_jax.training.flops import count_params, flops_per_token
from moe_jax.training.init_from import check_source, load_into
from moe_jax.training.loop import Loop, Progress
from moe_jax.training.optimizer import make_optimizer, make_schedule
from moe_jax.training.signals import catch_signals
from moe_jax.training.state import TrainState, abstract_state, check_random, init_state, make_decoders

log = logging.getLogger("moe_jax")


def train(config: Config, workdir: Path) -> None:
    """Trains ``config`` in the run directory ``workdir`` until it is done, out of patience or interrupted.

    Raises UserError before anything is written, and Interrupted once a signal's checkpoint is on disk.
    """
    run = RunDirectory(workdir)
    run.check_unlocked()
    _check_run(config, run)
    check_trackers(config.train, run)
    if config.train.compile_cache:
        enable_compile_cache()
    choices = _choose_dispatch(config)
    mesh = make_mesh(config.mesh, config.data.batch_size // config.optimizer.accumulation_steps)
    data = find_or_prepare(config.data, cache_folder("data"))
    check_data(data, config.data, config.model.context_length)
    check_same_text(run, config.data, data)
    config = _settle(config, run, data)
    is_new = not saved_steps(run.checkpoints)
    if config.train.init_from is not None and is_new:
        check_source(config, data.tokenizer, run)
    with run.lock(), start_log(run.log_file), use_mesh(mesh), catch_signals() as request:
        retention = Retention(newest=config.train.keep_checkpoints, best=config.train.keep_best)
        with Checkpoints(run.checkpoints, retention) as checkpoints:
            state, progress, restored_step = _state(config, mesh, data, checkpoints)
            if _is_finished(config, int(state.step), progress, run):
                if not run.loss_curve.exists():  # the start that made the last step was killed before it drew it
                    _draw(run)
                return
            for file in (run.metrics_file, run.config_file, run.mlflow_file, run.loss_curve, run.expert_load):
                remove_leftovers(file)
            opening = functools.partial(open_trackers, config, run, restored_step)
            with MetricsWriter(run, restored_step, opening) as writer:
                run.save_config(config)
                save_tokenizer(data.tokenizer, run.tokenizer)
                _describe(config, mesh, data, state)
                _describe_dispatch(config, choices)
                loop = Loop(config, run, mesh, data, state, progress, checkpoints, writer)
                loop.run(request)
                writer.finish(_draw(run), "finished" if request.exit_code is None else "interrupted")
        _conclude(config, run, int(loop.state.step), progress, request.exit_code)
    if request.exit_code is not None:
        raise Interrupted(request.exit_code)


def _check_run(config: Config, run: RunDirectory) -> None:
    """UserError where ``config`` cannot go on with what is in the run directory."""
    if run.path.exists() and not run.path.is_dir():
        raise UserError(f"--workdir must be a folder, but {run.path} is a file; choose another")
    saved = _begun(run)
    if saved is not None:
        check_same_run(saved, config)


def _begun(run: RunDirectory) -> Config | None:
    """The configuration that the run was begun with; None before its first checkpoint, for that binds to nothing.

    UserError where a checkpoint is of another version, or config.json of a folder without one is not ours.
    """
    record = read_record(run.checkpoints)
    if record is not None:
        return Config.from_dict(record["config"], str(run.checkpoints))
    if run.config_file.exists():
        run.load_config()
    return None


def _settle(config: Config, run: RunDirectory, data: PreparedData) -> Config:
    """The configuration of this start: epochs as steps, and what must not change over a run's life as it was."""
    train = config.train
    if train.num_epochs is not None:
        steps = train.num_epochs * batches_per_epoch(data, config.data, config.model.context_length)
        config = dataclasses.replace(config, train=dataclasses.replace(train, num_steps=steps))
    saved = _begun(run)
    decay_steps = saved.optimizer.decay_steps if saved else config.optimizer.decay_steps or config.train.num_steps
    optimizer = dataclasses.replace(config.optimizer, decay_steps=decay_steps)
    return check(dataclasses.replace(config, optimizer=optimizer))


def _state(
    config: Config, mesh: jax.sharding.Mesh, data: PreparedData, checkpoints: Checkpoints
) -> tuple[TrainState, Progress, int | None]:
    """The newest checkpoint's state, what the run remembers and the step restored; or a new state and None."""
    decoder, _ = make_decoders(config, data.tokenizer.vocab_size)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.train.num_steps))
    target = abstract_state(decoder, optimizer, mesh)
    restored = checkpoints.restore(target.checkpoint_items())
    if restored is None:
        state = init_state(decoder, optimizer, mesh, config.train.seed)
        if config.train.init_from is not None:
            state = load_into(state, target, RunDirectory(Path(config.train.init_from)))
        return state, Progress(data_fingerprint=data.fingerprint), None
    check_random(restored.record["random"], config.train.seed)
    step = jax.device_put(jax.numpy.asarray(restored.step, target.step.dtype), target.step.sharding)
    state = TrainState.from_items(step, restored.items)
    return state, Progress(**restored.record["progress"]), restored.step


def _is_finished(config: Config, step: int, progress: Progress, run: RunDirectory) -> bool:
    patience = config.train.patience
    if step >= config.train.num_steps:
        log.info(
            f"{run.path} is finished: {step} steps are done. "
            f"To go on, run the same command with --train.num-steps above {step}"
        )
        return True
    if patience is not None and progress.evaluations_without_gain >= patience:
        log.info(
            f"{run.path} stopped early at step {step}: {progress.evaluations_without_gain} evaluations without a "
            f"lower validation loss. To go on, run the same command with --train.patience above {patience}"
        )
        return True
    return False


def _describe(config: Config, mesh: jax.sharding.Mesh, data: PreparedData, state: TrainState) -> None:
    """What is being trained, on what and where, before the first step."""
    moe = config.model.moe
    overview = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    log.info(overview)
    total, active = count_params(state.params, moe)
    log.info(f"parameters: {total:,} in all, {active:,} active for a token")
    log.info(f"operations: {flops_per_token(state.params, config.model) / 1e6:,.1f} MFLOP for a token's step")
    for line in _describe_data(config, data):
        log.info(line)
    log.info(f"devices: {mesh.devices.size} x {mesh.devices.flat[0].device_kind} ({jax.default_backend()})")
    if moe.num_experts and moe.load_balancing_scope == "batch" and config.optimizer.accumulation_steps > 1:
        log.info("load is balanced over each microbatch, not over the accumulated batch")
    if int(state.step):
        log.info(f"going on from step {int(state.step)}")


def _describe_data(config: Config, data: PreparedData) -> Iterator[str]:
    for corpus in data.corpora:
        name = f"{corpus.name}, {corpus.weight:.1%} of the rows" if len(data.corpora) > 1 else corpus.name
        yield (
            f"{name}: {corpus.train.num_tokens:,} tokens to train on, {corpus.val.num_tokens:,} to validate, "
            f"{corpus.val.num_bytes / corpus.val.num_tokens:.3f} bytes a token "
            f"({data.tokenizer.name}, {data.tokenizer.vocab_size:,} different)"
        )
        if corpus.val.num_unknown:
            yield (
                f"warning: {corpus.val.num_unknown:,} tokens to validate on stand for unknown characters, whose bytes "
                "are not known either: there will be no bits per byte"
            )
    steps = batches_per_epoch(data, config.data, config.model.context_length)
    yield f"rows: {config.data.mode}; {steps:,} steps are an epoch, {config.train.num_steps / steps:.2f} epochs in all"


def _choose_dispatch(config: Config) -> dict[str, Choice]:
    """How rows move in training and in evaluation; UserError where this machine cannot do what the settings say."""
    if not config.model.moe.num_experts:
        return {}
    num_tokens = config.data.batch_size // config.optimizer.accumulation_steps * config.model.context_length
    machine = this_machine()
    return {
        name: choose(config.model.moe, num_tokens, train=name == "training", machine=machine)
        for name in ("training", "evaluation")
    }


def _describe_dispatch(config: Config, choices: dict[str, Choice]) -> None:
    moe = config.model.moe
    for name, choice in choices.items():
        log.info(f"dispatch in {name}: {choice}")
    if not is_causal(config.model):
        log.info(
            f"experts take {moe.capacity_factor} of a balanced share each, in evaluation too, among all tokens of a "
            "sequence, later ones included: the validation loss has seen the future, and no text can be sampled"
        )
    elif choices and moe.capacity_factor is not None:
        log.info(f"in training experts accept {moe.capacity_factor} of a balanced share and drop the rest")


def _draw(run: RunDirectory) -> list[Path]:
    """The pictures of the run that could be made; a run is not lost for one."""
    try:
        return [file for file in (plot_loss_curve(run), plot_expert_load(run)) if file is not None]
    except (OSError, UserError) as error:  # no folder for matplotlib's own files, or metrics that somebody has changed
        log.warning(f"warning: there are no pictures ({error}); the run is complete without them")
        return []


def _conclude(config: Config, run: RunDirectory, step: int, progress: Progress, exit_code: int | None) -> None:
    """The last lines: what was reached and what to do next."""
    if progress.skipped_steps:
        log.info(f"{progress.skipped_steps} steps had no finite loss and gradient and were left out")
    best = "" if progress.best_val_loss is None else f"; best validation loss {progress.best_val_loss:.4f} nats/token"
    log.info(f"{step} steps, {progress.train_seconds:.0f} s in steps{best}")
    memory = jax.local_devices()[0].memory_stats()  # a processor does not count its own
    if memory is not None and "peak_bytes_in_use" in memory:
        log.info(f"largest use of a device's memory: {memory['peak_bytes_in_use'] / 2**30:.2f} GiB")
    if exit_code is not None:
        log.info(f"interrupted: the checkpoint of step {step} is on disk; run the same command to go on")
    elif step < config.train.num_steps:
        log.info(f"stopped early: {progress.evaluations_without_gain} evaluations without a lower validation loss")
    if is_causal(config.model):
        log.info(f"sample from it: python sample.py --workdir {run.path}")
