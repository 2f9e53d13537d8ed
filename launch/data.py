"""Tokens for pretraining: text, `.bin` token files or a Hugging Face dataset, some of it held out for validation.

A batch is a function of (seed, step) alone and every data-parallel rank reads its own part of it. So the position in
the data *is* the step, resuming needs nothing else, and the global batch is the same on any number of ranks.
"""

import hashlib
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

# Not source that teaches anything: tests are longer than the library itself and often stripped by distributions, the
# others are generated tables (one generated file would be most of the validation text).
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
DOCUMENT_END = 0  # the byte between documents; it occurs in no text file


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to read. With neither `path` nor `dataset`: the running interpreter's standard library, as bytes.

    Attributes:
        path: a file or a folder: text files, or `.bin` files of raw tokens.
        val_path: the same for validation; without it a part of `path` is held out.
        pattern: which files of a folder, as a glob relative to it.
        bin_dtype: the integer type in `.bin` files.
        dataset: a Hugging Face dataset: a name, or a folder that `save_to_disk` wrote. Needs the `datasets` package.
        dataset_split: the split of it to read.
        text_field: the column of it that holds the text.
        tokenizer: a local tokenizer folder; without it, text is read as bytes (vocabulary of 256).
        val_fraction: the share held out: files (or documents of a dataset) by the hash of their name, or the end of a
            single file.
        seq_len: tokens per sequence.
    """

    path: str | None = None
    val_path: str | None = None
    pattern: str = "**/*"
    bin_dtype: Literal["uint16", "uint32"] = "uint16"
    dataset: str | None = None
    dataset_split: str = "train"
    text_field: str = "text"
    tokenizer: str | None = None
    val_fraction: float = 0.05
    seq_len: int = 256

    def __post_init__(self) -> None:
        if self.path is not None and self.dataset is not None:
            raise ValueError("data.path and data.dataset are both set; keep one")
        if self.val_path is not None and self.path is None:
            raise ValueError("data.val_path is set without data.path; set both")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction={self.val_fraction}: expected a fraction between 0 and 1")
        if self.seq_len < 1:
            raise ValueError(f"data.seq_len={self.seq_len}: expected at least 1")


@dataclass(frozen=True)
class Corpus:
    """Tokens in one or more arrays; a sequence never crosses from one array into the next.

    Attributes:
        arrays: integer arrays of shape (tokens,).
        seq_len: tokens per sequence.
        name: what an error calls it.

    Raises:
        ValueError: when no array holds a whole sequence and its next token.
    """

    arrays: Sequence[NDArray[Any]]
    seq_len: int
    name: str
    ends: NDArray[np.int64] = field(init=False)  # running number of sequence starts after each array

    def __post_init__(self) -> None:
        starts = [max(0, len(array) - self.seq_len) for array in self.arrays]
        object.__setattr__(self, "ends", np.cumsum(starts, dtype=np.int64))
        if not starts or self.ends[-1] == 0:
            raise ValueError(
                f"{self.name} data: no file or array holds data.seq_len + 1 = {self.seq_len + 1} tokens; "
                "give more data or lower data.seq_len"
            )

    @property
    def tokens(self) -> int:
        return sum(len(array) for array in self.arrays)

    @property
    def unit(self) -> str:
        """Of a mean cross entropy over these tokens."""
        return "nats/byte" if self.arrays[0].dtype == np.uint8 else "nats/token"

    def read(self, starts: NDArray[np.int64], vocab_size: int) -> torch.Tensor:
        """The sequences at `starts` with one token more, for the shifted targets.

        Args:
            starts: shape (n,), each in [0, ends[-1]).
            vocab_size: the limit that every token must stay below.

        Returns:
            int64 of shape (n, seq_len + 1).

        Raises:
            ValueError: for a token outside the vocabulary.
        """
        rows = np.empty((len(starts), self.seq_len + 1), dtype=np.int64)
        for row, start in zip(rows, starts, strict=True):
            index = int(np.searchsorted(self.ends, start, side="right"))
            offset = int(start) - (int(self.ends[index - 1]) if index else 0)
            row[:] = self.arrays[index][offset : offset + self.seq_len + 1]
        if rows.size and rows.max() >= vocab_size:
            raise ValueError(
                f"{self.name} data: token {rows.max()}, but the model's vocabulary has {vocab_size}; "
                "raise model.vocab_size, or check data.bin_dtype"
            )
        return torch.from_numpy(rows)

    def fingerprint(self) -> str:
        """A hash of sizes and contents; of memory-mapped files, of about a thousand tokens of each."""
        digest = hashlib.sha256()
        for array in self.arrays:
            stride = max(1, len(array) // 1024) if isinstance(array, np.memmap) else 1
            digest.update(f"{len(array)} {array.dtype} ".encode())
            digest.update(np.ascontiguousarray(array[::stride]).tobytes())
        return digest.hexdigest()


def training_starts(
    corpus: Corpus, *, seed: int, step: int, batch_size: int, ranks: int, rank: int, micro_batch_size: int
) -> NDArray[np.int64]:
    """Where a data-parallel rank's sequences of `step` begin, shape (passes, micro_batch_size).

    The parts of all ranks together are the global batch, which depends on (seed, step, batch_size) only.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = generator.integers(0, corpus.ends[-1], size=batch_size, dtype=np.int64)
    return starts.reshape(-1, ranks, micro_batch_size)[:, rank]


def validation_starts(corpus: Corpus, count: int) -> NDArray[np.int64]:
    """At most `count` sequences spread evenly over the corpus, the same at every evaluation."""
    count = min(count, max(1, int(corpus.ends[-1]) // corpus.seq_len))
    return np.linspace(0, corpus.ends[-1] - 1, num=count, dtype=np.int64)


def load_corpora(config: DataConfig) -> tuple[Corpus, Corpus]:
    """Read the training and the validation tokens.

    Raises:
        ValueError: for a path that does not exist, matches no file, mixes text and `.bin`, or holds too little.
        ImportError: for a dataset without the `datasets` package.
    """
    if config.dataset is not None:
        train, val = _dataset_documents(config)
    elif config.path is None:
        train, val = _stdlib_documents(config)
    elif config.val_path is not None:
        train, val = _read_path(config.path, config), _read_path(config.val_path, config)
    else:
        train, val = _hold_out(_read_path(config.path, config), config.val_fraction)
    return (
        Corpus(_arrays(train), config.seq_len, "training"),
        Corpus(_arrays(val), config.seq_len, "validation"),
    )


Documents = dict[str, NDArray[Any]]  # name (relative path) → tokens


def _arrays(documents: Documents) -> list[NDArray[Any]]:
    arrays = list(documents.values())
    if any(isinstance(array, np.memmap) for array in arrays):
        return arrays
    return [np.concatenate(arrays)] if arrays else []


def _hold_out(documents: Documents, fraction: float) -> tuple[Documents, Documents]:
    if len(documents) == 1:
        ((name, tokens),) = documents.items()
        cut = len(tokens) - int(len(tokens) * fraction)
        return {name: tokens[:cut]}, {name: tokens[cut:]}
    # By name, so that a file stays on its side when others are added or the order changes.
    place = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64 for name in documents}
    held_out = {name for name in documents if place[name] < fraction} or {min(place, key=place.__getitem__)}
    if len(held_out) == len(documents):
        held_out.discard(max(place, key=place.__getitem__))
    return (
        {name: tokens for name, tokens in documents.items() if name not in held_out},
        {name: tokens for name, tokens in documents.items() if name in held_out},
    )


def _stdlib_documents(config: DataConfig) -> tuple[Documents, Documents]:
    root = Path(sysconfig.get_path("stdlib"))
    encode = _encoder(config.tokenizer)
    documents = {
        path.relative_to(root).as_posix(): encode(path.read_bytes())
        for path in sorted(root.rglob("*.py"))
        if not STDLIB_LEFT_OUT.intersection(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    }
    if not documents:
        raise ValueError(f"{root}: this interpreter has no standard library sources; set data.path to some text")
    return _hold_out(documents, config.val_fraction)


def _read_path(location: str, config: DataConfig) -> Documents:
    root = Path(location)
    if root.is_file():
        files, root = [root], root.parent
    elif root.is_dir():
        files = sorted(path for path in root.glob(config.pattern) if path.is_file())
    else:
        raise ValueError(f"data path '{location}' does not exist")
    token_files = [path for path in files if path.suffix == ".bin"]
    if not files:
        raise ValueError(f"data path '{location}': no file matches data.pattern='{config.pattern}'")
    if token_files and len(token_files) < len(files):
        raise ValueError(
            f"data path '{location}' mixes .bin files with others such as "
            f"'{next(path.name for path in files if path.suffix != '.bin')}'; choose with data.pattern"
        )
    read = _read_bin(config) if token_files else _read_text(config)
    return {path.relative_to(root).as_posix(): tokens for path in files if len(tokens := read(path))}


def _read_text(config: DataConfig) -> Callable[[Path], NDArray[Any]]:
    encode = _encoder(config.tokenizer)
    return lambda path: encode(path.read_bytes())


def _read_bin(config: DataConfig) -> Callable[[Path], NDArray[Any]]:
    dtype = np.dtype(config.bin_dtype)

    def read(path: Path) -> NDArray[Any]:
        if path.stat().st_size % dtype.itemsize:
            raise ValueError(f"'{path}' is no whole number of {dtype.name} tokens; check data.bin_dtype")
        if path.stat().st_size == 0:  # memmap refuses an empty file
            return np.empty(0, dtype)
        return np.memmap(path, dtype=dtype, mode="r")

    return read


def _encoder(tokenizer_path: str | None) -> Callable[[bytes], NDArray[Any]]:
    """Text of one document → its tokens, with an end-of-document token at the end."""
    if tokenizer_path is None:
        return lambda text: np.frombuffer(text + bytes([DOCUMENT_END]), dtype=np.uint8)
    if not Path(tokenizer_path).is_dir():
        raise ValueError(f"data.tokenizer='{tokenizer_path}' is no local folder")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=True, trust_remote_code=False)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def encode(text: bytes) -> NDArray[Any]:
        ids = tokenizer(text.decode("utf-8", errors="replace"), add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids + end, dtype=np.uint32)

    return encode


def _dataset_documents(config: DataConfig) -> tuple[Documents, Documents]:
    assert config.dataset is not None
    try:
        import datasets
    except ImportError:
        raise ImportError("data.dataset needs the datasets package: pip install datasets") from None
    if (Path(config.dataset) / "state.json").is_file() or (Path(config.dataset) / "dataset_dict.json").is_file():
        dataset = datasets.load_from_disk(config.dataset)
        if isinstance(dataset, datasets.DatasetDict):
            dataset = dataset[config.dataset_split]
    else:
        dataset = datasets.load_dataset(config.dataset, split=config.dataset_split)
    if config.text_field not in dataset.column_names:
        raise ValueError(
            f"data.text_field='{config.text_field}': the dataset has {', '.join(map(repr, dataset.column_names))}"
        )
    encode = _encoder(config.tokenizer)
    texts: Iterator[str] = (row[config.text_field] for row in dataset)
    return _hold_out({f"{row}": encode(text.encode()) for row, text in enumerate(texts)}, config.val_fraction)
