"""Train a GPT-2 with any attention of posenc.

    python train.py                                              a small RoPE model, on any CPU
    python train.py --attention carope --out runs/carope         another attention
    python train.py --preset shakespeare-char --data input.txt   nanoGPT's recipe
    python train.py --resume runs/carope --steps 2000            continue, or train for longer
    torchrun --nproc-per-node 8 train.py --preset gpt2-small --parallel fsdp

The flags are the fields of `TrainConfig`: python train.py --help. This file only wires the parts
in `posenc.training` together: parse, prepare, begin, train, finish.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from posenc.data import Corpus, StreamError
from posenc.models.gpt import GPT
from posenc.training import checkpoint, initial
from posenc.training.cli import parse
from posenc.training.config import TrainConfig
from posenc.training.console import any_console
from posenc.training.environment import check_compiler, environment, peak_memory
from posenc.training.errors import Diverged, PeerFailed, Refused, RunError, describe
from posenc.training.evaluate import Halted, contexts
from posenc.training.export import plain_model, sample_text
from posenc.training.job import Job
from posenc.training.log import TrainingLog
from posenc.training.optimizer import make_optimizer, set_learning_rate
from posenc.training.parallel import Parallel, connect
from posenc.training.plot import loss_plot
from posenc.training.precision import choose_dtype
from posenc.training.report import heading, summary
from posenc.training.run_folder import ENVIRONMENT, SUMMARY, RunFolder, claimed
from posenc.training.signals import StopSignals
from posenc.training.step import train_step
from posenc.training.text import corpus_of
from posenc.training.tracker import check_tracker, make_tracker

PROMPT = 32  # tokens of the validation text that the sample continues
STREAM_BROKE = 64  # a reason to stop, above the numbers of signals


def claim(config: TrainConfig, parallel: Parallel, stack: ExitStack) -> RunFolder:
    """The run folder, held by rank 0 until the stack unwinds.

    Raises:
        ValueError: it holds a run already, or another process is in it.
        OSError: it cannot be made.
    """
    path = parallel.on_main(lambda: stack.enter_context(claimed(config)))
    return RunFolder(Path(parallel.share(str(path))))


def prepare(config: TrainConfig, parallel: Parallel, folder: RunFolder) -> Job:
    """Check everything and build it; nothing is written to the run folder yet.

    Raises:
        ValueError: for what cannot be built or loaded.
    """
    check_tracker(config.tracker)
    if config.compile:
        check_compiler()
    with torch.device("meta"):
        GPT(config.model(1))  # refuses a bad model before minutes go into the corpus
    corpus = prepare_corpus(config, parallel)

    torch.manual_seed(config.seed)
    if config.init_from is not None and checkpoint.latest(folder.checkpoints) is None:
        model, config, origin = initial.start(config, corpus.vocab_size)
    else:
        model, origin = GPT(config.model(corpus.vocab_size)), None
    model = model.to(parallel.device)
    model.checkpoint_activations = config.activation_checkpointing
    if config.compile:
        for part in model.h if parallel.mode == "fsdp" else [model]:
            part.compile()  # in place: no weight is renamed
    module = parallel.wrap(model)
    optimizer = make_optimizer(
        model,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
    )
    torch.manual_seed(config.dropout_seed(parallel.rank))
    batches = corpus.batches(
        context=config.context,
        batch_size=config.batch_size,
        seed=config.data_seed,
        rank=parallel.rank,
        world_size=parallel.world_size,
        pack=config.pack,
    )
    dtype = choose_dtype(config.dtype, parallel.device)
    job = Job(config, parallel, folder, corpus, batches, model, module, optimizer, dtype)
    if config.resume is not None:
        job.load()
    if origin is not None:
        job.say(origin)
    return job


def prepare_corpus(config: TrainConfig, parallel: Parallel) -> Corpus:
    """Load the corpus, first on rank 0, which fills the cache for the others."""
    load = partial(corpus_of, config, progress=parallel.is_main)
    return parallel.on_main(load) or load()


def begin(job: Job, argv: Sequence[str]) -> None:
    """Fill the run folder, and say what will happen."""

    def write() -> None:
        job.folder.checkpoints.mkdir(exist_ok=True)
        checkpoint.clean(job.folder.checkpoints)
        job.folder.truncate_metrics(job.step)
        if job.corpus.tokenizer is not None:
            job.corpus.tokenizer.save(job.folder.tokenizer)
        about = environment(argv, job.parallel, job.dtype, job.corpus.description)
        job.folder.write_json(ENVIRONMENT, about)
        job.folder.write_config(job.config)

    job.parallel.on_main(write)
    job.say(heading(job))


def train(job: Job) -> int:
    """Train to the end (0), or until a signal, whose number is returned; either way it is saved.

    Raises:
        RunError: training cannot go on. It is saved if it is sound.
    """
    config, main = job.config, job.parallel.is_main
    tracker = make_tracker(
        config.tracker if main else "none", job.folder.path, asdict(config), job.step
    )
    bar = tqdm(
        total=config.steps,
        initial=job.step,
        unit="step",
        disable=not main,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )
    log = TrainingLog(job, tracker, bar)
    try:
        with StopSignals(patient=job.parallel.mode != "none") as signals, bar:
            return take_steps(job, log, signals)
    except (Diverged, StreamError, OSError) as error:
        raise RunError(f"{describe(error)} {job.how_to_resume()}") from error
    finally:
        tracker.close()


def take_steps(job: Job, log: TrainingLog, signals: StopSignals) -> int:
    """The loop: draw, agree to go on, step; log, evaluate and save where due."""
    config, parallel, batches = job.config, job.parallel, job.batches
    log.start_clock()
    while job.step < config.steps:
        position, broken, drawn = batches.state_dict(), None, []
        try:
            drawn = [batches.next_batch() for _ in range(config.grad_accum)]
        except StreamError as error:
            broken = error
        # All ranks stop after the same step, whichever of them has the reason.
        halt = parallel.highest(STREAM_BROKE if broken else signals.received)
        if halt:
            log.flush()
            job.save(position)
            if halt == STREAM_BROKE:
                raise broken or PeerFailed("another rank's stream broke")
            return halt

        rate = config.learning_rate(job.step)
        set_learning_rate(job.optimizer, rate)
        loss, norm = train_step(
            job.module,
            job.optimizer,
            drawn,
            grad_clip=config.grad_clip,
            aux_weight=config.aux_weight,
            parallel=parallel,
            autocast=job.autocast(),
        )
        job.step += 1
        log.add(rate, loss, norm)
        if job.due(config.log_every):
            log.flush()
        if job.due(config.save_every):
            log.flush()
            job.save(batches.state_dict())
            log.start_clock()
        if job.due(config.eval_every):
            log.flush()
            try:
                log.add_evaluation(job.validate(lambda: bool(parallel.highest(signals.received))))
            except Halted:
                job.save(batches.state_dict())
                break
            log.start_clock()
    return parallel.highest(signals.received)


def finish(job: Job) -> None:
    """Evaluate at 1, 2 and 4 training contexts, export, sample, plot and sum up."""
    config, folder = job.config, job.folder
    lengths, refused = contexts(job.model, job.corpus.validation)
    evaluations = [job.evaluation or job.validate()]
    evaluations += [job.evaluate(length) for length in lengths[1:]]
    for length, evaluation in zip(lengths, evaluations, strict=True):
        job.say(f"validation at {length} tokens ({length // config.context}x): {evaluation}")
    for beyond, reason in refused.items():
        job.say(f"validation at {beyond} tokens: none, {reason}")
    for layer, routing in enumerate(job.routing or []):
        if routing is not None:
            job.say(f"layer {layer}: {routing}")
    peak = job.parallel.highest(peak_memory(job.parallel.device) or 0)
    model = plain_model(job.model, job.parallel)
    if model is None:
        return
    model.save_pretrained(folder.model)
    loss_plot(folder.read_metrics(), folder.plot, f"{config.attention} on {config.data}")
    values = summary(job, evaluations, refused, peak)
    folder.write_json(SUMMARY, values)
    if config.sample_tokens and job.corpus.tokenizer is not None:
        # From the middle of the text: its very first token says too little to a small model.
        validation = job.corpus.validation
        middle, given = len(validation) // 2, min(PROMPT, len(validation) // 2)
        prompt = [int(token) for token in validation[middle : middle + given]]
        text = sample_text(model, job.corpus.tokenizer, prompt, config.sample_tokens, config.seed)
        folder.write_text(folder.sample, text)
        job.say(f"sample, its first {given} tokens from the validation text:\n{text}\n")
    job.say(
        f"{job.seconds:.0f} s of training, {values['tokens_per_second']:,.0f} tokens/s, "
        f"{peak / 2**20:,.0f} MiB; {SUMMARY}, {folder.plot.name} and {folder.model.name}/ "
        f"are in {folder.path}"
    )


@contextmanager
def refusing_bad_input() -> Iterator[None]:
    """Before the run begins a ValueError is about the user's input; later it is our mistake."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the given flags; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    any_console()
    try:
        with ExitStack() as stack:
            with refusing_bad_input():
                config = parse(argv)
                parallel = stack.enter_context(connect(config.parallel, config.device))
                job = prepare(config, parallel, claim(config, parallel, stack))
            stack.callback(job.release)
            begin(job, argv)
            if halt := train(job):
                job.say(f"stopped at step {job.step}. {job.how_to_resume()}")
                return 128 + halt
            try:
                finish(job)
            except (OSError, SafetensorError) as error:
                raise RunError(f"{describe(error)} {job.how_to_resume()}") from error
            return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except PeerFailed as error:  # the rank that failed says why
        return error.exit_code
    except (RunError, StreamError, OSError) as error:
        if os.environ.get("RANK", "0") == "0" or not isinstance(error, Refused):
            print(f"error: {describe(error)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


if __name__ == "__main__":
    sys.exit(main())
