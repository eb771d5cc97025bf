"""The text of a run."""

from posenc.data import Corpus, load_corpus
from posenc.training.config import TrainConfig


def corpus_of(config: TrainConfig, *, progress: bool = True) -> Corpus:
    """The corpus that a configuration asks for, from the cache where it is there.

    Raises:
        ValueError, StreamError: as `load_corpus`.
    """
    assert config.data is not None
    return load_corpus(
        config.data,
        val_data=config.val_data,
        tokenizer=config.tokenizer,
        vocab_size=config.bpe_symbols,
        context=config.context,
        cache_dir=config.cache_dir,
        progress=progress,
    )
