"""The third act of a run: steps, evaluations and saves around the pure step. Observers watch."""

import dataclasses
import functools
import logging
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import TrainConfig
from moe_jax.data.batches import TrainBatches, train_batches
from moe_jax.data.tokenizer_file import fingerprint
from moe_jax.errors import EnvironmentFault
from moe_jax.runs.checkpoint.record import Record
from moe_jax.runs.checkpoint.save import Checkpoints
from moe_jax.runs.metrics_file import MetricsFile
from moe_jax.sharding.mesh import of_each_process, own_rows, put_batch, replicated
from moe_jax.sharding.processes import called_together
from moe_jax.sharding.startup import compiler_options
from moe_jax.training.diagnosis import find_not_finite
from moe_jax.training.evaluate import Evaluation, bits_per_byte, evaluate, joined
from moe_jax.training.flops import flops_per_token, utilisation
from moe_jax.training.metrics import Interval, named_metrics, routing_by_layer, routing_summary
from moe_jax.training.observers import Observer
from moe_jax.training.signals import StopRequest
from moe_jax.training.state import TrainState, random_record
from moe_jax.training.step import StepOutput, eval_step, train_step
from moe_jax.training.train import Progress, Setup, Start

log = logging.getLogger("moe_jax")


def fit(
    setup: Setup,
    start: Start,
    checkpoints: Checkpoints,
    metrics: MetricsFile,
    observers: Sequence[Observer],
    request: StopRequest,
) -> TrainState:
    """Act three: runs to the last step, an early stop or ``request``; the state that it returns is then on disk.

    ``start.progress`` is kept up to date. Raises EnvironmentFault where the state could not be saved, or where the
    loss was not finite for too long.
    """
    return Loop(setup, start, checkpoints, metrics, observers, request).run()


@dataclass
class Loop:
    setup: Setup
    start: Start
    checkpoints: Checkpoints
    metrics: MetricsFile
    observers: Sequence[Observer]
    request: StopRequest

    def __post_init__(self) -> None:
        setup, start, self.config = self.setup, self.start, self.setup.config
        self.state, self.progress = start.state, start.progress
        options = compiler_options(self.config.train.deterministic)
        step = functools.partial(train_step, self.config, setup.decoder, setup.optimizer)
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.state)  # and stays so: a step writes over its argument
        whole, evaluation = replicated(setup.mesh), functools.partial(eval_step, setup.eval_decoder)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, whole), compiler_options=options)
        self.train_step = called_together(jitted)
        self.eval_step = called_together(jax.jit(evaluation, out_shardings=whole, compiler_options=options))
        self.flops_per_token = flops_per_token(start.state.params, self.config.model)
        self.first = int(start.state.step)
        self.tokenizer = fingerprint(setup.dataset.tokenizer)
        self.interval = Interval(start.progress.interval)

    def run(self) -> TrainState:
        train, first = self.config.train, self.first
        with self._batches(self.progress.next_batch) as batches:
            unread: StepOutput | None = None
            clock = time.perf_counter()
            for step in range(first, train.num_steps):
                for observer in self.observers:
                    observer.step_begins(step, self.state)
                self.state, output = self.train_step(self.state, self._next(batches), self._own_code())
                if step == first:
                    jax.block_until_ready(output)
                    log.info(f"first step, with compilation: {time.perf_counter() - clock:.1f} s")
                    clock = time.perf_counter()
                # While the device computes this step, the host reads the one before.
                self._read(unread, step)
                unread, done = output, step + 1
                # Read once a turn: a signal may come at any moment of it, and what ends the run must also save it.
                is_interrupted = self.request.exit_code is not None
                is_evaluation = done % train.eval_every == 0 or done == train.num_steps
                is_planned = is_evaluation or done % train.checkpoint_every == 0 or self._is_for_good(done)
                is_save = is_planned or is_interrupted or self.checkpoints.is_retry_due()
                # Once a step is left out, and where one is too many, no other is begun before it is known.
                is_doubtful = self.progress.skipped_in_a_row > 0 or train.max_skipped_steps == 1
                if is_save or is_doubtful or done % train.log_every == 0:
                    self._read(unread, done)
                    unread = None
                if step > first:
                    for observer in self.observers:
                        observer.step_ends(done)
                if not is_save and done % train.log_every:
                    continue
                self.interval.seconds += time.perf_counter() - clock
                # A line is written where a run without faults has one.
                if is_planned or done % train.log_every == 0:
                    self._write_interval(done)
                val_loss = self._evaluate(done) if is_evaluation else None
                is_interrupted = self.request.exit_code is not None and is_save  # maybe during the evaluation
                if is_save:
                    self._save(done, val_loss)
                if is_interrupted or is_out_of_patience(train, self.progress) or done == train.num_steps:
                    self._save_at_last(done, val_loss)
                    break
                clock = time.perf_counter()
        return self.state

    def _batches(self, start: int) -> TrainBatches:
        own = own_rows(self.setup.mesh, self.config.data.batch_size)
        length = self.config.model.context_length
        return train_batches(self.setup.dataset, self.config.data, length, start=start, own=own)

    def _next(self, batches: TrainBatches) -> dict[str, jax.Array]:
        return put_batch(next(batches), self.setup.mesh, self.config.data.batch_size)

    def _own_code(self) -> jax.Array | None:
        """With several processes what a signal asks this one for: it reaches all at the same step."""
        return of_each_process(self.request.own_code, self.setup.mesh) if jax.process_count() > 1 else None

    def _is_for_good(self, done: int) -> bool:
        train = self.config.train
        is_multiple = train.keep_every is not None and done % train.keep_every == 0
        return is_multiple or (train.keep_epochs and done % self.setup.steps_per_epoch == 0)

    def _read(self, output: StepOutput | None, done: int) -> None:
        """Merges a step's metrics into the interval's; waits until the device has computed it."""
        if output is None:
            return
        output = jax.device_get(output)
        self.request.hear(int(output.exit_code or 0))
        if done > self.first + 1:  # the first step of a start compiles, and is not timed
            self.interval.time(int(output.num_targets))
        for observer in self.observers:
            observer.step_read(done, output)
        if output.is_finite:
            self.progress.skipped_in_a_row = 0
            self.interval.add(output)
        else:
            self._count_skipped(done)

    def _count_skipped(self, done: int) -> None:
        """Notes that step ``done`` changed nothing. EnvironmentFault once there are too many in a row."""
        self.progress.skipped_steps += 1
        self.progress.skipped_in_a_row += 1
        in_a_row, most = self.progress.skipped_in_a_row, self.config.train.max_skipped_steps
        if in_a_row == 1:
            log.warning(
                f"warning: step {done} has no finite loss and gradient and is left out "
                f"({self.progress.skipped_steps} so far)"
            )
        if in_a_row < most:
            return
        began = done - in_a_row + 1
        # No step since has changed anything, so the first one can be made again.
        with self._batches(began - 1) as batches:
            batch = self._next(batches)
        state = self.state.replace(step=jnp.asarray(began - 1, self.state.step.dtype))
        found = find_not_finite(self.config, self.setup.decoder, state, batch)
        raise EnvironmentFault(
            f"{in_a_row} steps in a row, from step {began}, had no finite loss and gradient; in step {began} {found}; "
            "start a new run with a lower optimizer.learning_rate or clip_norm, from this one's best checkpoint by "
            f"--train.init-from {shlex.quote(str(self.setup.run.path))} where there is one, or raise "
            "train.max_skipped_steps"
        )

    def _write(self, done: int, values: dict[str, float | list], load_NE: np.ndarray | None = None) -> None:
        self.metrics.write(done, values)
        for observer in self.observers:
            observer.line(done, values, load_NE)

    def _write_interval(self, done: int) -> None:
        """Writes one line of metrics and starts a new interval."""
        values: dict[str, float | list] = {}
        interval, self.interval = self.interval, Interval(None)
        if interval.sums:
            values |= named_metrics(interval.sums)
        values["train/learning_rate"] = float(jnp.asarray(self.setup.schedule(done - 1 - self.progress.skipped_steps)))
        if self.progress.skipped_steps:
            values["train/skipped_steps"] = self.progress.skipped_steps
        if interval.tokens:
            values |= self._speed(interval)
        self.progress.train_seconds += interval.seconds
        self._write(done, values, interval.sums.get("load"))

    def _speed(self, interval: Interval) -> dict[str, float]:
        """Of the interval: targets a second, positions a second where rows may hold padding, MFU where it is known."""
        speed = {"train/tokens_per_second": interval.tokens / interval.seconds}
        if self.config.data.mode != "windows":
            positions = interval.steps * self.config.data.batch_size * self.config.model.context_length
            speed["train/positions_per_second"] = positions / interval.seconds
        devices = self.setup.mesh.devices
        flops_per_second = self.flops_per_token * speed["train/tokens_per_second"]
        mfu = utilisation(flops_per_second, devices.flat[0].device_kind, devices.size)
        return speed if mfu is None else speed | {"train/mfu": mfu}

    def _evaluate(self, done: int) -> float:
        """Scores the validation split and as many tokens of the training split; returns the validation loss."""
        for observer in self.observers:
            observer.evaluation_begins()
        by_corpus = self._score("val", None)
        val = joined(by_corpus.values())
        train = joined(self._score("train", val.num_tokens).values())
        values: dict[str, float | list] = {
            "train_eval/loss": train.loss,
            "train_eval/perplexity": train.perplexity,
            "val/loss": val.loss,
            "val/perplexity": val.perplexity,
        }
        bits = bits_per_byte(val, self.setup.dataset.splits("val"))
        if bits is not None:
            values["val/bits_per_byte"] = bits
        if len(by_corpus) > 1:
            values |= {f"val/loss/{name}": part.loss for name, part in by_corpus.items()}
        usage = ""
        if val.routing is not None:
            values |= routing_by_layer(val.routing)
            usage = f", expert usage {routing_summary(val.routing)['moe/expert_usage']:.0f}%"
        self._write(done, values)
        best = self.progress.best_val_loss
        is_best = math.isfinite(val.loss) and (best is None or val.loss < best)
        if is_best:
            self.progress.best_val_loss = val.loss
        self.progress.evaluations_without_gain = 0 if is_best else self.progress.evaluations_without_gain + 1
        log.info(
            f"step {done}: train {train.loss:.4f}, validation {val.loss:.4f} nats/token (perplexity "
            f"{val.perplexity:.2f}" + (f", {bits:.4f} bits/byte)" if bits is not None else ")") + usage
        )
        if len(by_corpus) > 1:
            log.info("validation " + ", ".join(f"{name} {part.loss:.4f}" for name, part in by_corpus.items()))
        for observer in self.observers:
            observer.evaluated(done, self.state.variables)
        return val.loss

    def _score(self, name: str, max_tokens: int | None) -> dict[str, Evaluation]:
        return evaluate(
            self.eval_step,
            self.state.variables,
            self.setup.dataset,
            name,
            self.setup.mesh,
            mode=self.config.data.mode,
            context_length=self.config.model.context_length,
            batch_size=self.setup.microbatch_size,
            max_tokens=max_tokens,
        )

    def _save(self, done: int, val_loss: float | None) -> None:
        self.progress.next_batch = done
        self.progress.interval = self.interval.to_json()
        self.metrics.sync()
        record = Record(
            step=done,
            val_loss=val_loss,
            for_good=self._is_for_good(done),
            progress=dataclasses.asdict(self.progress),
            random=random_record(self.config.train.seed),
            config=self.config.to_dict(),
            tokenizer=self.tokenizer,
        )
        self.checkpoints.save(record, self.state.checkpoint_items())

    def _save_at_last(self, done: int, val_loss: float | None) -> None:
        """Waits for the last save, which has a second try. EnvironmentFault where that fails too."""
        if not self.checkpoints.wait():
            self._save(done, val_loss)
        self.checkpoints.check_saved(done)


def is_out_of_patience(train: TrainConfig, progress: Progress) -> bool:
    """Whether ``train.patience`` evaluations in a row have not lowered the validation loss."""
    return train.patience is not None and progress.evaluations_without_gain >= train.patience
