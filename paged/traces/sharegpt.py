"""ShareGPT's conversations as requests: each question of a person with the answer it got.

As vLLM's benchmark reads them: the first message of a conversation that a person wrote and the one after it. With
`multi_turn` every later question counts too, and its prompt is all that was said before: what a chat server sees.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from paged.traces.trace import Piece, TraceError, TraceRequest

Tokenize = Callable[[str], Sequence[int]]
PEOPLE = ("human", "user")
MODELS = ("gpt", "chatgpt", "bing", "bard", "assistant")
TINY_TOKENIZER = Path(__file__).parent.parent / "tiny" / "tokenizer.json"


def tiny_tokenizer() -> Tokenize:
    """The tokenizer of the model that ships with the package. It was trained on Shakespeare, so counts are larger.

    Example:
        >>> len(tiny_tokenizer()("To be, or not to be")) > 4
        True
    """
    return file_tokenizer(TINY_TOKENIZER)


def file_tokenizer(path: Path) -> Tokenize:
    """The tokenizer of a tokenizer.json, or of a folder with one; neither torch nor transformers is needed for it.

    Raises:
        TraceError: there is none.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise TraceError(f"there is no tokenizer {file}")
    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def conversations_of(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """The line on which each conversation begins, and what it is.

    The list is decoded one entry after another, because then every one has a line.

    Raises:
        TraceError: the text is no JSON list.

    Example:
        >>> list(conversations_of('[{"a": 1},\\n {"b": 2}]', Path("x.json")))
        [(1, {'a': 1}), (2, {'b': 2})]
    """
    decoder, place, line = json.JSONDecoder(), text.index("[") + 1, 1
    counted = 0
    while True:
        while place < len(text) and text[place] in ", \t\r\n":
            place += 1
        line, counted = line + text.count("\n", counted, place), place
        if text[place : place + 1] == "]":
            return
        try:
            value, place = decoder.raw_decode(text, place)
        except ValueError as error:
            raise TraceError(f"{path}:{line}: no JSON from here on: {error}") from None
        yield line, value


def turns_of(conversation: Any, tokenize: Tokenize, seeds: dict[str, int], multi_turn: bool) -> list[TraceRequest]:
    """The requests of one conversation, all at 0 s.

    Args:
        conversation: {"conversations": [{"from": ..., "value": ...}, ...]}.
        tokenize: text -> token ids.
        seeds: message -> its seed. It grows: a message that was seen before has the same tokens again.
        multi_turn: all turns, or the first one.

    Raises:
        TraceError: it is something else, or nobody asks and gets an answer in it.

    Example: letters for tokens; the second prompt is the first one, its answer, and the second question.
        >>> talk = [("human", "why?"), ("gpt", "so."), ("human", "ah"), ("gpt", "yes")]
        >>> talk = {"conversations": [{"from": who, "value": text} for who, text in talk]}
        >>> [(r.num_prompt_tokens, r.num_output_tokens) for r in turns_of(talk, list, {}, True)]
        [(4, 3), (9, 3)]
    """
    try:
        messages = [(str(message["from"]), message["value"]) for message in conversation["conversations"]]
    except (KeyError, TypeError, IndexError):
        raise TraceError('not like {"conversations": [{"from": "human", "value": "..."}, ...]}') from None
    if not all(isinstance(text, str) for _, text in messages):
        raise TraceError("a message's value is no text")
    requests: list[TraceRequest] = []
    pieces: list[Piece] = []
    for (who, text), following in itertools.zip_longest(messages, messages[1:]):
        piece = Piece(seeds.setdefault(text, len(seeds)), len(tokenize(text)))
        if piece.num_tokens:  # an empty message says nothing
            pieces.append(piece)
        if who not in PEOPLE or following is None or following[0] not in MODELS or not piece.num_tokens:
            continue
        answer = Piece(seeds.setdefault(following[1], len(seeds)), len(tokenize(following[1])))
        if not answer.num_tokens:
            continue
        requests.append(TraceRequest(0.0, tuple(pieces) if multi_turn else (piece,), answer))
        if not multi_turn:
            break
    if not requests:
        raise TraceError("nobody asks and gets an answer in this conversation")
    return requests
