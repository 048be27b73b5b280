"""Read a published trace, whatever its format: `load` looks at the content, not at the name.

    azure        CSV    TIMESTAMP,ContextTokens,GeneratedTokens          Azure/AzurePublicDataset, 2023 (CC-BY-4.0)
    lengths      CSV    num_prefill_tokens,num_decode_tokens,...         project-etalon/etalon (Apache-2.0); no times
    mooncake     JSONL  timestamp (ms), input_length, output_length, hash_ids: one for each 512 tokens of the prompt,
                        equal if the prompts are equal up to there       kvcache-ai/Mooncake (Apache-2.0)
    sharegpt     JSON   [{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", ...}, ...]}, ...]; no times

None of the files is part of this repository. A row that cannot be used is an error with its file and line, or it is
counted and left out.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from paged.traces.sharegpt import Tokenize, conversations_of, tiny_tokenizer, turns_of
from paged.traces.trace import Piece, Trace, TraceError, TraceRequest, request_of

FORMATS = ("azure", "lengths", "mooncake", "sharegpt")
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
LENGTHS_COLUMNS = ("num_prefill_tokens", "num_decode_tokens")
MOONCAKE_BLOCK = 512
TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)(?:\.(\d+))?$")


@dataclass
class _Rows:
    """Takes rows in one by one, and notes or refuses the bad ones.

    Attributes:
        path: named in errors.
        skip_bad: count bad rows instead of raising.
        requests: the good ones so far.
        num_bad: the others.
        first_bad: what was wrong with the first of them, with its line.
    """

    path: Path
    skip_bad: bool
    requests: list[TraceRequest] = field(default_factory=list)
    num_bad: int = 0
    first_bad: str | None = None

    def add(self, line: int, make: Callable[..., Sequence[TraceRequest]], *arguments: Any) -> None:
        """Take in what `make` finds in the row at `line`, given the arguments."""
        try:
            self.requests += make(*arguments)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else str(error)
            if not self.skip_bad:
                hint = "skip_bad=True (--skip-bad) leaves such rows out"
                raise TraceError(f"{self.path}:{line}: {reason}; {hint}") from None
            self.num_bad += 1
            self.first_bad = self.first_bad or f"line {line}: {reason}"

    def trace(self) -> Trace:
        """What was read, in order of arrival, beginning at 0 s."""
        notes: tuple[str, ...] = (
            (f"{self.num_bad:,} bad rows left out, the first one {self.first_bad}",) if self.num_bad else ()
        )
        if not self.requests:
            raise TraceError(f"{self.path} has no usable rows" + "".join(f"; {note}" for note in notes))
        begin = min(request.arrival for request in self.requests)
        ordered = sorted(self.requests, key=lambda request: request.arrival)
        if ordered != self.requests:
            notes += ("rows sorted by time",)
        trace = Trace(self.path.stem, tuple(ordered), notes)
        if begin == 0:
            return trace
        moved = trace.with_arrivals((request.arrival - begin for request in ordered), "")
        return Trace(trace.name, moved.requests, notes)


def load(
    path: str | Path,
    format: str = "auto",
    *,
    skip_bad: bool = False,
    tokenize: Tokenize | None = None,
    multi_turn: bool = False,
) -> Trace:
    """Read a trace.

    Args:
        path: the file.
        format: one of `FORMATS`, or "auto" to find out from the content.
        skip_bad: leave rows out that cannot be used, and note how many.
        tokenize: text -> token ids, for ShareGPT; None takes the tiny tokenizer that ships with the package, whose
            tokens are far shorter than those of a large model's.
        multi_turn: of ShareGPT, every turn with all that was said before it, instead of the first one alone.

    Raises:
        TraceError: no such file, nothing in it, no format that is known or not the one that was named, or a bad row.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "some.csv"
        ...     _ = file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\\n2023-11-16 18:15:46.6805900,374,44\\n")
        ...     load(file).describe()
        'some: 1 request, 374.0 prompt and 44.0 output tokens on average, all at once'
    """
    path = Path(path)
    text = _read(path)
    found = _detect(text)
    if format not in ("auto", *FORMATS):
        raise TraceError(f"there is no format {format!r}; there are: auto, {', '.join(FORMATS)}")
    if found is None or format not in ("auto", found):
        wanted = "one of those known" if format == "auto" else f"of the format {format}"
        raise TraceError(f"{path} is not {wanted}: {_looks(text, found)}")
    rows = _Rows(path, skip_bad)
    if found == "azure":
        for number, (line, row) in enumerate(_csv_rows(text, AZURE_COLUMNS)):
            rows.add(line, _azure_requests, row, number)
    elif found == "lengths":
        for number, (line, row) in enumerate(_csv_rows(text, LENGTHS_COLUMNS)):
            rows.add(line, _lengths_requests, row, number)
    elif found == "mooncake":
        for line, content in enumerate(text.splitlines(), 1):
            if content.strip():
                rows.add(line, _mooncake_requests, content, line)
    else:
        tokenize, seeds = tokenize or tiny_tokenizer(), dict[str, int]()
        for line, conversation in conversations_of(text, path):
            rows.add(line, turns_of, conversation, tokenize, seeds, multi_turn)
    return rows.trace()


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} cannot be read: {error}") from error
    if not text.strip():
        raise TraceError(f"{path} is empty")
    return text


def _detect(text: str) -> str | None:
    """The format, from the first line that is not blank."""
    text = text.lstrip()
    head = text.split("\n", 1)[0]
    if head.startswith("["):
        return "sharegpt"
    if head.startswith("{") and ('"hash_ids"' in head or '"input_length"' in head):
        return "mooncake"
    columns = {name.strip() for name in head.split(",")}
    if set(AZURE_COLUMNS) <= columns:
        return "azure"
    return "lengths" if set(LENGTHS_COLUMNS) <= columns else None


def _looks(text: str, found: str | None) -> str:
    if found is not None:
        return f"its content is that of {found}"
    head = text.lstrip().split("\n", 1)[0][:80]
    return (
        f"it begins with {head!r}; wanted is a CSV with the columns {', '.join(AZURE_COLUMNS)} or "
        f"{', '.join(LENGTHS_COLUMNS)}, a JSON object a line (Mooncake) or a JSON list (ShareGPT)"
    )


def _csv_rows(text: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line and content of each row that is not blank, without the space around names and values."""
    reader = csv.DictReader(text.lstrip().splitlines())
    skipped = len(text) - len(text.lstrip())
    first = text[:skipped].count("\n")
    for row in reader:
        clean = {str(name).strip(): (value or "").strip() for name, value in row.items() if isinstance(value, str)}
        yield first + reader.line_num, {column: clean.get(column, "") for column in columns}


def _azure_requests(row: dict[str, str], number: int) -> list[TraceRequest]:
    time, prompt, output = AZURE_COLUMNS
    return [
        request_of(_seconds(row[time]), _count(row[prompt], prompt), _count(row[output], output), number=number),
    ]


def _lengths_requests(row: dict[str, str], number: int) -> list[TraceRequest]:
    prompt, output = LENGTHS_COLUMNS
    return [request_of(0, _count(row[prompt], prompt), _count(row[output], output), number=number)]


def _mooncake_requests(content: str, number: int) -> list[TraceRequest]:
    row: dict[str, Any] = json.loads(content)
    length, hashes = _count(row["input_length"], "input_length"), row["hash_ids"]
    time = row["timestamp"]
    if isinstance(time, bool) or not isinstance(time, int | float) or not time >= 0:
        raise TraceError(f"timestamp is {time!r}, not milliseconds")
    if not isinstance(hashes, list) or not all(type(value) is int and value >= 0 for value in hashes):
        raise TraceError("hash_ids is not a list of integers")
    if len(hashes) != -(-length // MOONCAKE_BLOCK):
        raise TraceError(f"{len(hashes)} hash_ids for {length} tokens; there is one for each {MOONCAKE_BLOCK}")
    sizes = [MOONCAKE_BLOCK] * (len(hashes) - 1) + [length - MOONCAKE_BLOCK * (len(hashes) - 1)]
    # Even seeds are the trace's hashes, odd ones the answers, which no prompt of the trace names.
    prompt = tuple(Piece(2 * value, size) for value, size in zip(hashes, sizes, strict=True))
    return [TraceRequest(time / 1e3, prompt, Piece(2 * number + 1, _count(row["output_length"], "output_length")))]


def _seconds(text: str) -> float:
    """Seconds since 1970 of a timestamp like 2023-11-16 18:15:46.6805900, which has a digit more than datetime reads.

    >>> _seconds("1970-01-01 00:00:02.1234567")
    2.1234567
    """
    found = TIMESTAMP.match(text)
    if found is None:
        raise TraceError(f"TIMESTAMP is {text!r}, not like 2023-11-16 18:15:46.6805900")
    whole, decimals = found.groups()
    return datetime.fromisoformat(f"{whole}+00:00").timestamp() + float(f"0.{decimals or 0}")


def _count(value: str | int | float, name: str) -> int:
    """A number of tokens. Length files of other tools write some of them as 12.0.

    >>> _count("12.0", "n")
    12
    """
    if isinstance(value, bool):
        raise TraceError(f"{name} is {value!r}, not a number of tokens")
    try:
        number = float(value)
    except (ValueError, TypeError):
        raise TraceError(f"{name} is {value!r}, not a number of tokens") from None
    if not number >= 1 or not number.is_integer():
        raise TraceError(f"{name} is {value!r}; a request has a whole number of tokens, at least 1")
    return int(number)
