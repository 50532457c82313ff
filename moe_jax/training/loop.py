"""The one impure loop: data, steps, evaluations, files and signals around the pure step."""

import dataclasses
import logging
import math
import time

import jax
from jax.sharding import Mesh

from moe_jax.config import Config
from moe_jax.data.pipeline import train_batches
from moe_jax.data.prepared import PreparedData
from moe_jax.model.decoder import Decoder
from moe_jax.parallel.mesh import put_batch
from moe_jax.runs.checkpoint import Checkpoints
from moe_jax.runs.layout import RunDirectory
from moe_jax.runs.log import TrainingBar, training_bar
from moe_jax.runs.metrics import MetricsWriter
from moe_jax.sampling.generator import Generator, is_causal
from moe_jax.training.evaluation import Evaluation, bits_per_byte, evaluate, joined
from moe_jax.training.flops import flops_per_token, utilisation
from moe_jax.training.interrupt import StopRequest
from moe_jax.training.metrics import Metrics, merge, named_metrics, routing_by_layer, routing_summary, step_metrics
from moe_jax.training.optimizer import make_optimizer, make_schedule
from moe_jax.training.state import TrainState
from moe_jax.training.step import StepOutput, make_eval_step, make_train_step
from moe_jax.training.trace import Trace

log = logging.getLogger("moe_jax")


@dataclasses.dataclass
class Progress:
    """What a run remembers beside its arrays; saved with every checkpoint."""

    data_fingerprint: str
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
        decoder = Decoder(config.model, data.tokenizer.vocab_size)
        self.schedule = make_schedule(config.optimizer, config.train.num_steps)
        optimizer = make_optimizer(config.optimizer, self.schedule)
        self.train_step = jax.jit(make_train_step(config, decoder, optimizer), donate_argnums=0)
        self.eval_step = jax.jit(make_eval_step(decoder))
        # Experts that choose tokens choose among later ones too, so that no text can be sampled from them.
        self.generator = Generator(config, data.tokenizer) if is_causal(config.model) else None
        self.flops_per_token = flops_per_token(state.params, config.model)
        self.trace = Trace(config.train.profile, run.profile)
        self.first = int(state.step)
        # Of the steps since the last line of metrics.jsonl: their metrics, number and time.
        self.interval: Metrics | None = None
        self.interval_tokens, self.interval_steps, self.interval_seconds = 0, 0, 0.0

    def run(self, request: StopRequest) -> None:
        """Runs to the last step, to an early stop or to ``request``; whichever it is, the state is saved."""
        train, first = self.config.train, self.first
        batches = train_batches(self.data, self.config.data, self.config.model.context_length, start=first)
        with batches, training_bar(train.num_steps, first) as bar:
            unread: StepOutput | None = None
            clock = time.perf_counter()
            for step in range(first, train.num_steps):
                self.trace.before_step(step, self.state)
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
                is_save = is_evaluation or done % train.checkpoint_every == 0 or is_interrupted
                if not (is_save or done % train.log_every == 0):
                    continue
                self._read(unread, bar, done)
                unread = None
                self.interval_seconds += time.perf_counter() - clock
                self._write_interval(done)
                val_loss = self._evaluate(done, bar) if is_evaluation else None
                if is_save:
                    self._save(done, val_loss)
                if is_interrupted or self.is_out_of_patience():
                    break
                clock = time.perf_counter()
        self.trace.finish(self.state)

    def is_out_of_patience(self) -> bool:
        """True once ``train.patience`` evaluations in a row have not lowered the validation loss."""
        patience = self.config.train.patience
        return patience is not None and self.progress.evaluations_without_gain >= patience

    def _read(self, output: StepOutput | None, bar: TrainingBar, done: int) -> None:
        """Merges a step's metrics into the interval's; waits until the device has computed it."""
        if output is None:
            return
        metrics = step_metrics(jax.device_get(output))
        self.interval = metrics if self.interval is None else merge(self.interval, metrics)
        num_tokens = int(output.num_targets)
        if done > self.first + 1:  # the first step of a start compiles, and is not timed
            self.interval_tokens += num_tokens
            self.interval_steps += 1
        bar.update(done, float(output.loss), num_tokens)

    def _write_interval(self, done: int) -> None:
        """Writes one line of metrics and starts a new interval."""
        assert self.interval is not None
        values: dict[str, float | list] = {**named_metrics(self.interval)}
        values["train/learning_rate"] = float(jax.device_get(self.schedule(done - 1)))
        if self.interval_tokens:
            values |= self._speed()
        self.progress.train_seconds += self.interval_seconds
        self.interval, self.interval_tokens, self.interval_steps, self.interval_seconds = None, 0, 0, 0.0
        self.writer.write(done, values)

    def _speed(self) -> dict[str, float]:
        """Of the interval: targets a second, positions a second where rows may hold padding, MFU where it is known."""
        speed = {"train/tokens_per_second": self.interval_tokens / self.interval_seconds}
        if self.config.data.mode != "windows":
            positions = self.interval_steps * self.config.data.batch_size * self.config.model.context_length
            speed["train/positions_per_second"] = positions / self.interval_seconds
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
            text = self.generator.generate(self.state.variables, "", sample)
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
        self.checkpoints.save(
            done,
            self.state.checkpoint_items(),
            progress=dataclasses.asdict(self.progress),
            val_loss=val_loss,
        )
