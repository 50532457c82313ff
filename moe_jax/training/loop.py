"""The one impure loop: data, steps, evaluations, files and signals around the pure step."""

import dataclasses
import logging
import math
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moe_jax.config import Config
from moe_jax.data.batches import TrainBatches, batches_per_epoch, train_batches
from moe_jax.data.dataset import PreparedData
from moe_jax.errors import EnvironmentFault
from moe_jax.runs.checkpoint.save import Checkpoints
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.log import TrainingBar, training_bar
from moe_jax.runs.metrics_file import MetricsWriter
from moe_jax.sampling.engine import Generator, is_causal
from moe_jax.sharding.mesh import put_batch
from moe_jax.sharding.startup import compiler_options
from moe_jax.trackers.alarms import CollapseWatch, SpikeWatch
from moe_jax.trackers.profile import Trace
from moe_jax.trackers.watchdog import Watchdog
from moe_jax.training.diagnosis import find_not_finite
from moe_jax.training.evaluate import Evaluation, bits_per_byte, evaluate, joined
from moe_jax.training.flops import flops_per_token, utilisation
from moe_jax.training.metrics import (
    Interval,
    expert_load,
    named_metrics,
    routing_by_layer,
    routing_summary,
)
from moe_jax.training.optimizer import make_optimizer, make_schedule
from moe_jax.training.signals import StopRequest
from moe_jax.training.state import TrainState, make_decoders, random_record
from moe_jax.training.step import StepOutput, make_eval_step, make_train_step

log = logging.getLogger("moe_jax")


@dataclasses.dataclass
class Progress:
    """What a run remembers beside its arrays; saved with every checkpoint."""

    data_fingerprint: str
    next_batch: int = 0
    """The state of the data: batch n is a function of (seed, n)."""
    skipped_steps: int = 0
    """Steps without a finite loss and gradient, which changed nothing."""
    skipped_in_a_row: int = 0
    interval: list | None = None
    """``Interval.to_json`` of the steps since the last line of metrics.jsonl."""
    best_val_loss: float | None = None
    evaluations_without_gain: int = 0
    train_seconds: float = 0.0
    """Spent in steps: without start-up, compilation, evaluation and saving."""


class Loop:
    """One start of a run, from the state it is given to the last step, an early stop or a signal."""

    def __init__(
        self,
        config: Config,
        run: RunDirectory,
        mesh: Mesh,
        data: PreparedData,
        state: TrainState,
        progress: Progress,
        checkpoints: Checkpoints,
        writer: MetricsWriter,
    ):
        self.config, self.run_directory, self.mesh, self.data = config, run, mesh, data
        self.state, self.progress, self.checkpoints, self.writer = state, progress, checkpoints, writer
        decoder, eval_decoder = make_decoders(config, data.tokenizer.vocab_size)
        self.schedule = make_schedule(config.optimizer, config.train.num_steps)
        optimizer = make_optimizer(config.optimizer, self.schedule)
        options = compiler_options(config.train.deterministic)
        self.decoder = decoder
        self.train_step = jax.jit(
            make_train_step(config, decoder, optimizer), donate_argnums=0, compiler_options=options
        )
        self.eval_step = jax.jit(make_eval_step(eval_decoder), compiler_options=options)
        # Experts that choose tokens choose among later ones too, so that no text can be sampled from them.
        self.generator = Generator(config, data.tokenizer) if is_causal(config.model) else None
        if self.generator is not None:
            self.generator.check_stop_tokens(config.sample)
        self.flops_per_token = flops_per_token(state.params, config.model)
        self.trace = Trace(config.train.profile, run.profile)
        self.spikes = SpikeWatch()
        self.collapses = CollapseWatch(config.model.moe.num_experts, config.model.moe.top_k)
        self.first = int(state.step)
        self.steps_per_epoch = batches_per_epoch(data, config.data, config.model.context_length)
        self.interval = Interval(progress.interval)

    def run(self, request: StopRequest) -> None:
        """Runs to the last step, to an early stop or to ``request``; whichever it is, the state is then on disk.

        Raises EnvironmentFault where it could not be saved, or where the loss was not finite for too long.
        """
        train, first = self.config.train, self.first
        batches = self._batches(self.progress.next_batch)
        watchdog = Watchdog(train.watchdog, self.run_directory.stacks)
        with batches, watchdog, training_bar(train.num_steps, first) as bar:
            unread: StepOutput | None = None
            clock = time.perf_counter()
            for step in range(first, train.num_steps):
                self.trace.before_step(step, self.state)
                watchdog.step_begins()
                self.state, output = self.train_step(self.state, put_batch(next(batches), self.mesh))
                if step == first:
                    jax.block_until_ready(output)
                    log.info(f"first step, with compilation: {time.perf_counter() - clock:.1f} s")
                    clock = time.perf_counter()
                # While the device computes this step, the host reads the one before.
                self._read(unread, bar, step)
                unread, done = output, step + 1
                # Read once a turn: a signal may come at any moment of it, and what ends the run must also save it.
                is_interrupted = request.exit_code is not None
                is_evaluation = done % train.eval_every == 0 or done == train.num_steps
                is_planned = is_evaluation or self._is_save_planned(done)
                is_save = is_planned or is_interrupted or self.checkpoints.is_retry_due()
                # Once a step is left out, and where one is too many, no other is begun before it is known.
                is_doubtful = self.progress.skipped_in_a_row > 0 or train.max_skipped_steps == 1
                if is_save or is_doubtful or done % train.log_every == 0:
                    self._read(unread, bar, done)
                    unread = None
                if step > first:
                    watchdog.step_ends(done)
                if not is_save and done % train.log_every:
                    continue
                self.interval.seconds += time.perf_counter() - clock
                # A line is written where a run without faults has one.
                if is_planned or done % train.log_every == 0:
                    self._write_interval(done)
                val_loss = self._evaluate(done, bar) if is_evaluation else None
                is_interrupted = request.exit_code is not None and is_save  # maybe during the evaluation
                if is_save:
                    self._save(done, val_loss)
                if is_interrupted or self.is_out_of_patience() or done == train.num_steps:
                    self._save_at_last(done, val_loss)
                    break
                clock = time.perf_counter()
        self.trace.finish(self.state)

    def _batches(self, start: int) -> TrainBatches:
        return train_batches(self.data, self.config.data, self.config.model.context_length, start=start)

    def _is_save_planned(self, done: int) -> bool:
        return done % self.config.train.checkpoint_every == 0 or self._is_for_good(done)

    def _is_for_good(self, done: int) -> bool:
        train = self.config.train
        is_multiple = train.keep_every is not None and done % train.keep_every == 0
        return is_multiple or (train.keep_epochs and done % self.steps_per_epoch == 0)

    def is_out_of_patience(self) -> bool:
        """True once ``train.patience`` evaluations in a row have not lowered the validation loss."""
        patience = self.config.train.patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    def _read(self, output: StepOutput | None, bar: TrainingBar, done: int) -> None:
        """Merges a step's metrics into the interval's; waits until the device has computed it."""
        if output is None:
            return
        output = jax.device_get(output)
        num_tokens = int(output.num_targets)
        if done > self.first + 1:  # the first step of a start compiles, and is not timed
            self.interval.time(num_tokens)
        bar.update(done, float(output.loss), num_tokens)
        if not output.is_finite:
            self._count_skipped(done)
            return
        self.progress.skipped_in_a_row = 0
        self.interval.add(output)
        self._warn(self.spikes.warning(done, float(output.loss)))

    def _warn(self, message: str | None) -> None:
        if message is not None:
            log.warning(f"warning: {message}")

    def _count_skipped(self, done: int) -> None:
        """Notes that step ``done`` changed nothing. EnvironmentFault once there are too many in a row."""
        self.progress.skipped_steps += 1
        self.progress.skipped_in_a_row += 1
        in_a_row, most = self.progress.skipped_in_a_row, self.config.train.max_skipped_steps
        if in_a_row == 1:
            self._warn(
                f"step {done} has no finite loss and gradient and is left out ({self.progress.skipped_steps} so far)"
            )
        if in_a_row < most:
            return
        began = done - in_a_row + 1
        # No step since has changed anything, so the first one can be made again.
        with self._batches(began - 1) as batches:
            batch = put_batch(next(batches), self.mesh)
        state = self.state.replace(step=jnp.asarray(began - 1, self.state.step.dtype))
        found = find_not_finite(self.config, self.decoder, state, batch)
        raise EnvironmentFault(
            f"{in_a_row} steps in a row, from step {began}, had no finite loss and gradient; in step {began} {found}; "
            "start a new run with a lower optimizer.learning_rate or clip_norm, from this one's best checkpoint by "
            f"--train.init-from {self.run_directory.path} where there is one, or raise train.max_skipped_steps"
        )

    def _write_interval(self, done: int) -> None:
        """Writes one line of metrics and starts a new interval."""
        values: dict[str, float | list] = {}
        interval, self.interval = self.interval, Interval(None)
        if interval.metrics is not None:
            values |= named_metrics(interval.metrics)
            load_NE = expert_load(interval.metrics)
            if load_NE is not None:
                for message in self.collapses.warnings(done, load_NE):
                    self._warn(message)
        values["train/learning_rate"] = float(jax.device_get(self.schedule(done - 1 - self.progress.skipped_steps)))
        if self.progress.skipped_steps:
            values["train/skipped_steps"] = self.progress.skipped_steps
        if interval.tokens:
            values |= self._speed(interval)
        self.progress.train_seconds += interval.seconds
        self.writer.write(done, values)

    def _speed(self, interval: Interval) -> dict[str, float]:
        """Of the interval: targets a second, positions a second where rows may hold padding, MFU where it is known."""
        speed = {"train/tokens_per_second": interval.tokens / interval.seconds}
        if self.config.data.mode != "windows":
            positions = interval.steps * self.config.data.batch_size * self.config.model.context_length
            speed["train/positions_per_second"] = positions / interval.seconds
        devices = self.mesh.devices
        flops_per_second = self.flops_per_token * speed["train/tokens_per_second"]
        mfu = utilisation(flops_per_second, devices.flat[0].device_kind, devices.size)
        return speed if mfu is None else speed | {"train/mfu": mfu}

    def _evaluate(self, done: int, bar: TrainingBar) -> float:
        """Scores the validation split and as many tokens of the training split, and samples a text."""
        bar.describe("evaluating")
        by_corpus = self._score("val", None)
        val = joined(by_corpus.values())
        train = joined(self._score("train", val.num_tokens).values())
        values: dict[str, float | list] = {
            "train_eval/loss": train.loss,
            "train_eval/perplexity": train.perplexity,
            "val/loss": val.loss,
            "val/perplexity": val.perplexity,
        }
        bits = bits_per_byte(val, self.data.splits("val"))
        if bits is not None:
            values["val/bits_per_byte"] = bits
        if len(by_corpus) > 1:
            values |= {f"val/loss/{name}": part.loss for name, part in by_corpus.items()}
        if val.routing is not None:
            values |= routing_by_layer(val.routing)
        self.writer.write(done, values)
        best = self.progress.best_val_loss
        is_best = math.isfinite(val.loss) and (best is None or val.loss < best)
        if is_best:
            self.progress.best_val_loss = val.loss
        self.progress.evaluations_without_gain = 0 if is_best else self.progress.evaluations_without_gain + 1
        usage = (
            "" if val.routing is None else f", expert usage {routing_summary(val.routing)['moe/expert_usage']:.0f}%"
        )
        log.info(
            f"step {done}: train {train.loss:.4f}, validation {val.loss:.4f} nats/token (perplexity "
            f"{val.perplexity:.2f}" + (f", {bits:.4f} bits/byte)" if bits is not None else ")") + usage
        )
        if len(by_corpus) > 1:
            log.info("validation " + ", ".join(f"{name} {part.loss:.4f}" for name, part in by_corpus.items()))
        if self.generator is not None:
            sample = dataclasses.replace(self.config.sample, num_samples=1)
            text = self.generator.generate(self.generator.prepare(self.state.variables), "", sample)
            self.writer.write_text(done, "sample", text[0].text)
            log.info("sample:\n" + text[0].text.strip())
        bar.describe("training")
        return val.loss

    def _score(self, name: str, max_tokens: int | None) -> dict[str, Evaluation]:
        return evaluate(
            self.eval_step,
            self.state.variables,
            self.data,
            name,
            self.mesh,
            mode=self.config.data.mode,
            context_length=self.config.model.context_length,
            batch_size=self.config.data.batch_size // self.config.optimizer.accumulation_steps,
            max_tokens=max_tokens,
        )

    def _save(self, done: int, val_loss: float | None) -> None:
        self.progress.next_batch = done
        self.progress.interval = self.interval.to_json()
        self.writer.sync()
        record = {
            "progress": dataclasses.asdict(self.progress),
            "random": random_record(self.config.train.seed),
            "config": self.config.to_dict(),
        }
        self.checkpoints.save(
            done,
            self.state.checkpoint_items(),
            record,
            val_loss=val_loss,
            for_good=self._is_for_good(done),
        )

    def _save_at_last(self, done: int, val_loss: float | None) -> None:
        """Waits for the last save, which has a second try. EnvironmentFault where that fails too."""
        if not self.checkpoints.wait():
            self._save(done, val_loss)
        self.checkpoints.check_saved(done)
