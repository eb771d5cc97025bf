"""Text and tokens for training: sources, tokenizers, corpora, batches (needs posenc[train])."""

from posenc.data.batches import Batches, evaluation_windows
from posenc.data.corpus import Corpus, load_corpus
from posenc.data.hub import HubStream, StreamError
from posenc.data.packed import PackedBatch, PackedBatches, packed_windows
from posenc.data.shards import Tokens, open_shards, write_bin
from posenc.data.sources import Documents, documents
from posenc.data.splits import split_documents
from posenc.data.stream_batches import StreamBatches
from posenc.data.tokenizers import Tokenizer, load_tokenizer
from posenc.data.vocabularies import (
    byte_tokenizer,
    char_tokenizer,
    gpt2_tokenizer,
    train_bpe,
)

__all__ = [
    "Batches",
    "Corpus",
    "Documents",
    "HubStream",
    "PackedBatch",
    "PackedBatches",
    "StreamBatches",
    "StreamError",
    "Tokenizer",
    "Tokens",
    "byte_tokenizer",
    "char_tokenizer",
    "documents",
    "evaluation_windows",
    "gpt2_tokenizer",
    "load_corpus",
    "load_tokenizer",
    "open_shards",
    "packed_windows",
    "split_documents",
    "train_bpe",
    "write_bin",
]
