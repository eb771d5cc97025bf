"""What a run says about itself: the lines before it starts, and summary.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from posenc.data import Tokens
from posenc.training.evaluate import Evaluation
from posenc.training.job import Job


def heading(job: Job) -> str:
    """Model, data and notes on it, the arithmetic of a batch, where it goes: one line each."""
    config, corpus, ranks = job.config, job.corpus, job.parallel.world_size
    total = job.tokens + (config.steps - job.step) * config.tokens_per_step
    if isinstance(corpus.train, Tokens):
        size, epochs = f"{len(corpus.train):,} tokens", f", {total / len(corpus.train):.2f} epochs"
    else:
        size, epochs = "a stream", ""
    dtype = str(job.dtype).removeprefix("torch.")
    lines = [
        f"model: {config.attention}, {config.layers} layers, {config.heads} heads, "
        f"width {config.embed_dim}, {job.model.num_parameters():,} parameters; "
        f"{dtype} on {job.parallel.device}",
        f"data: {config.data}, {size}, {len(corpus.validation):,} for validation; "
        f"{corpus.vocab_size:,} symbols",
        *(f"note: {note}" for note in corpus.description.get("notes", [])),
        f"batch: {config.batch_size} sequences ({ranks} x {config.batch_size // ranks}) "
        f"x {config.grad_accum} accumulated x {config.context} tokens "
        f"= {config.tokens_per_step:,} tokens a step",
        f"length: {config.steps:,} steps = {total:,} tokens{epochs}",
        f"run folder: {job.folder.path}" + (f", from step {job.step}" if job.step else ""),
    ]
    return "\n".join(lines)


def summary(
    job: Job, evaluations: Sequence[Evaluation], refused: Mapping[str, str], peak_memory: int
) -> dict[str, Any]:
    """The values of summary.json; "routing" is of rank 0's share, as in `Job`.

    Args:
        evaluations: at the training context, then beyond it.
        refused: lengths that could not be evaluated, and why.
        peak_memory: bytes, 0 where not known.
    """
    first = evaluations[0].values()
    return {
        "attention": job.config.attention,
        "preset": job.config.preset,
        **{key: first[key] for key in ("val_loss", "perplexity", "bits_per_byte")},
        "tokens_per_second": job.tokens / job.seconds,
        "parameters": job.model.num_parameters(),
        "peak_memory_bytes": peak_memory or None,
        "steps": job.step,
        "tokens": job.tokens,
        "seconds": job.seconds,
        "routing": job.routing and [stats and stats.values() for stats in job.routing],
        "evaluations": [evaluation.values() for evaluation in evaluations],
        "not_evaluated": dict(refused),
    }
