"""Text streamed from the Hugging Face Hub, with an exact position and patience for the network.

The documents come in the order in which they are published, without shuffling: a shuffle buffer
loses its content on resume, and the large web corpora are shuffled already.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

HUB_PREFIX = "hf:"
# Where the libraries below `datasets` define exceptions that are not OSErrors.
_NETWORK_MODULES = {"aiohttp", "fsspec", "http", "httpcore", "httpcore2", "httpx", "httpx2"}
_NETWORK_MODULES |= {"requests", "urllib3"}
_log = logging.getLogger(__name__)


class StreamError(RuntimeError):
    """A stream stayed broken after every attempt. Its position is intact: save, resume later."""


class HubStream:
    """The non-empty documents of a Hub dataset, streamed.

    Iterating goes on from the current position to the end of the data, and then stands at its
    beginning again. A broken stream is opened again at the very next document.

    Args:
        source: `hf:REPO[:CONFIG]`.
        split: the dataset's split.
        skip: rows at the beginning that every pass leaves out (the validation text).
        attempts: failures in a row before giving up with `StreamError`, at least 1.
        wait: seconds before the second attempt, doubled for each further one.
        sleep: called with the seconds to wait.

    Raises:
        ValueError: a malformed source, or attempts below 1; while iterating, a dataset that does
            not exist, is private, or has no text.
        StreamError: while iterating, the network stayed broken.
    """

    def __init__(
        self,
        source: str,
        *,
        split: str = "train",
        skip: int = 0,
        attempts: int = 5,
        wait: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if attempts < 1:
            raise ValueError(f"attempts must be at least 1; got {attempts}. Choose 1 to try once.")
        self.repo, self.config = parse_hub_source(source)
        self.source, self.split, self.skip = source, split, skip
        self.attempts, self.wait, self.sleep = attempts, wait, sleep
        self.rows = 0  # read in this pass, skipped ones included
        self._dataset_state: dict[str, Any] | None = None  # the `datasets` library's own position

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last document, as plain values that JSON can hold."""
        return {"source": self.source, "rows": self.rows, "dataset": self._dataset_state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position, from the next `iter` on.

        Raises:
            ValueError: it is a position in another source.
        """
        if state["source"] != self.source:
            raise ValueError(
                f"the saved position lies in {state['source']!r}; got {self.source!r}. "
                "Resume with the same --data."
            )
        self.rows, self._dataset_state = state["rows"], state["dataset"]

    def __iter__(self) -> Iterator[str]:
        failures, reached = 0, self.rows
        while True:
            try:
                yield from self._pass()
                return
            except Exception as error:
                if not is_network_error(error):
                    raise
                failures = failures + 1 if self.rows == reached else 1
                reached = self.rows
                broken = f"{self.source!r} broke after row {self.rows}: {_summary(error)}"
                if failures >= self.attempts:
                    raise StreamError(
                        f"the stream {broken}. Gave up after {failures} attempts; check the "
                        "network and resume."
                    ) from error
                seconds = self.wait * 2 ** (failures - 1)
                _log.warning("the stream %s. Trying again in %g s.", broken, seconds)
                self.sleep(seconds)

    def _pass(self) -> Iterator[str]:
        """Yield the documents from the current position to the end, trying once."""
        dataset = self._open()
        for row in dataset:
            # A copy after every row: once reading has failed, the live state may be half moved on.
            self._dataset_state = dataset.state_dict()
            self.rows += 1
            text = text_of(row, self.source)
            if text and self.rows > self.skip:
                yield text
        self.rows, self._dataset_state = 0, None

    def _open(self) -> Any:
        import datasets  # takes a second, and neither `stdlib` nor token shards need it
        from datasets.packaged_modules.parquet.parquet import ParquetConfig

        try:
            builder = datasets.load_dataset_builder(self.repo, self.config)
            dataset = builder.as_streaming_dataset(split=self.split)
            if isinstance(builder.config, ParquetConfig) and "text" in dataset.features:
                # The others are not read, so their types need not agree between files.
                builder.config.columns = ["text"]
                dataset = builder.as_streaming_dataset(split=self.split)
        except (FileNotFoundError, PermissionError) as error:
            raise ValueError(
                f"expected a dataset that you may read; opening {self.source!r} failed: "
                f"{_summary(error)}. Check the name, or log in with `hf auth login`."
            ) from error
        if self._dataset_state is not None:
            dataset.load_state_dict(self._dataset_state)
        return dataset


def parse_hub_source(source: str) -> tuple[str, str | None]:
    """Split `hf:REPO[:CONFIG]` into repository and configuration.

    Raises:
        ValueError: not of that form.
    """
    repo, colon, config = source.removeprefix(HUB_PREFIX).partition(":")
    if not source.startswith(HUB_PREFIX) or not repo or (colon and not config):
        raise ValueError(
            f"expected {HUB_PREFIX}REPO[:CONFIG]; got {source!r}. "
            f"For example '{HUB_PREFIX}HuggingFaceFW/fineweb-edu:sample-10BT'."
        )
    return repo, config or None


def text_of(row: Mapping[str, Any], where: str) -> str:
    """Return the text of a row, "" where it is null.

    Raises:
        ValueError: the row has no column `text`, or it holds something else.
    """
    check_text_column(row, where)
    text = row["text"]
    if text is not None and not isinstance(text, str):
        raise ValueError(
            f"expected strings in the column 'text' of {where}; got {type(text).__name__}. "
            "Convert them."
        )
    return text or ""


def check_text_column(names: Collection[str], where: str) -> None:
    """Refuse rows without text.

    Raises:
        ValueError: no column is named `text`.
    """
    if "text" not in names:
        columns = ", ".join(map(repr, names)) or "none"
        raise ValueError(
            f"expected a column 'text' in {where}; it has {columns}. Rename the text's column."
        )


def is_network_error(error: BaseException) -> bool:
    """Say whether trying again may help: broken connections yes, missing or private data no."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return False
    modules = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    return isinstance(error, OSError) or not modules.isdisjoint(_NETWORK_MODULES)


def _summary(error: BaseException) -> str:
    """Return an error on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
