"""Examples for fine-tuning: instructions as JSON lines, plain text, or, without either, the standard library's docstrings.

An example is a prompt and a response; the loss is on the response alone. A batch is a function of (seed, step), so that the
position in the data is the step.
"""

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROMPT_KEYS = ("prompt", "instruction", "question")
RESPONSE_KEYS = ("response", "output", "completion", "answer")
IGNORED = -100
BUILT_IN_EXAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class ExamplesConfig:
    """What to read. Without `path`: pairs of a function's signature and the first line of its docstring, from the running
    interpreter's standard library.

    Attributes:
        path: a `.jsonl` file with a prompt (or instruction, with or without input) and a response (or output) on every
            line, or with a text; or a text file, whose paragraphs are the examples.
        max_length: tokens of an example; longer ones lose their end.
        val_fraction: the share of examples that is held out, by the hash of their text.
    """

    path: str | None = None
    max_length: int = 256
    val_fraction: float = 0.05

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError(f"data.max_length={self.max_length}: expected at least 2")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"data.val_fraction={self.val_fraction}: expected a fraction between 0 and 1")


Tokens = tuple[list[int], int]  # an example's tokens, and how many of them are the prompt's


@dataclass(frozen=True)
class Batch:
    """Padded examples.

    Attributes:
        tokens: (examples, length), int64.
        targets: (examples, length), the next token where it is the response's, else -100.
        mask: (examples, length), 1 where there is a token.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor


def load_examples(config: ExamplesConfig, tokenizer: Any) -> tuple[list[Tokens], list[Tokens], str]:
    """Training and validation examples, and a fingerprint of them all.

    Raises:
        ValueError: a file that is not there, a line that has no prompt and response, or nothing to hold out.
    """
    pairs = list(_pairs(config.path))
    train: list[Tokens] = []
    held_out: list[Tokens] = []
    for prompt, response in pairs:
        tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        whole = [*tokens, *tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(tokens) >= config.max_length:  # nothing of the response would be left
            continue
        share = int.from_bytes(hashlib.sha256((prompt + response).encode()).digest()[:4], "big") / 2**32
        (held_out if share < config.val_fraction else train).append((whole[: config.max_length], len(tokens)))
    if not train or not held_out:
        raise ValueError(
            f"{config.path or 'the standard library'}: {len(train)} examples to train on and {len(held_out)} held out of "
            f"{len(pairs)}; give more examples, or change data.val_fraction or data.max_length"
        )
    digest = hashlib.sha256(json.dumps([train, held_out]).encode()).hexdigest()[:16]
    return train, held_out, digest


def make_batch(examples: Sequence[Tokens], pad: int) -> Batch:
    """Pad examples on the right."""
    length = max(len(tokens) for tokens, _ in examples)
    tokens = torch.full((len(examples), length), pad, dtype=torch.int64)
    targets = torch.full((len(examples), length), IGNORED, dtype=torch.int64)
    mask = torch.zeros((len(examples), length), dtype=torch.int64)
    for row, (example, prompt) in enumerate(examples):
        tokens[row, : len(example)] = torch.tensor(example)
        mask[row, : len(example)] = 1
        first = max(prompt, 1)  # nothing predicts the first token
        targets[row, first - 1 : len(example) - 1] = torch.tensor(example[first:])
    return Batch(tokens, targets, mask)


def choose(count: int, *, seed: int, step: int, batch_size: int) -> list[int]:
    """Numbers of the examples of a step: every epoch sees all of them, each in an order of its own."""
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, count)
        chosen.append(int(np.random.default_rng((seed, epoch)).permutation(count)[place]))
    return chosen


def _pairs(path: str | None) -> Iterator[tuple[str, str]]:
    if path is None:
        yield from islice(_docstrings(), BUILT_IN_EXAMPLES)
    elif not Path(path).is_file():
        raise ValueError(f"data.path={path}: no such file")
    elif path.endswith((".jsonl", ".json")):
        yield from _json_lines(Path(path))
    else:
        yield from (("", part.strip()) for part in Path(path).read_text(encoding="utf-8").split("\n\n") if part.strip())


def _json_lines(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        prompt = next((record[key] for key in PROMPT_KEYS if key in record), None)
        response = next((record[key] for key in RESPONSE_KEYS if key in record), None)
        if prompt is not None and response is not None:
            more = f"\n{record['input']}" if record.get("input") else ""
            yield f"{prompt}{more}\n", response
        elif "text" in record:
            yield "", record["text"]
        else:
            raise ValueError(
                f"{path}, line {number}: has {sorted(record)}; expected one of {PROMPT_KEYS} and one of {RESPONSE_KEYS}, "
                "or text"
            )


def _docstrings() -> Iterator[tuple[str, str]]:
    """Signatures of documented functions, and what their docstring begins with."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8", errors="replace"))):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if text:
                assert isinstance(node, ast.FunctionDef)
                yield f"def {node.name}({ast.unparse(node.args)})\n", text.splitlines()[0]
