"""Tokens to text, one token at a time, and the stop strings found in it.

A token is not a piece of text: a character of several bytes may be spread over several tokens, and many tokenizers
write a word differently at the beginning of a text. So the text that a token adds is the difference between decoding
a few tokens with it and without it, and while that ends in the middle of a character (the decoder then writes U+FFFD,
the replacement character) nothing is added yet.

Decoding is the dearest thing that the host does for a token. So tokens wait until somebody looks at the text, and are
then decoded together: at the end for a caller who wants no more than that, at every token where a stop string may end
the text.
"""

from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# Tokens of context that decoding starts from: enough that the first new one is not taken for the start of a text.
CONTEXT = 5

# Of a character, and so of tokens that it can be spread over.
MOST_BYTES = 4


class Tokenizer(Protocol):
    """The one method of a transformers tokenizer that is used here."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """The text of some tokens."""
        ...


class Detokenizer:
    """The text of one sequence while it grows.

    Args:
        tokenizer: any transformers tokenizer.
        prompt_token_ids: the context that the output goes on from; not part of the text.
        stop: strings that end the text, which is then cut before the one found.
        include_stop: cut it behind the one found instead.
        skip_special_tokens: leave special tokens out.

    Attributes:
        stop_string: the stop string that was found, or None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: tuple[int, ...],
        stop: tuple[str, ...] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._token_ids = list(prompt_token_ids[-CONTEXT:])
        # Tokens [_prefix, _read) are in the text already; they are decoded again as context of the next ones.
        self._prefix = 0
        self._read = len(self._token_ids)
        self._known: str | None = None  # what they decode to, once it is needed
        self._text = ""
        self.stop_string: str | None = None

    @property
    def text(self) -> str:
        """The output so far."""
        self._catch_up()
        return self._text

    def append(self, token_id: int) -> None:
        """Take one more token in; `text` and `stop_string` follow."""
        self._token_ids.append(token_id)
        if self._stop:
            self._catch_up()

    def finish(self) -> None:
        """No more tokens come: what is left of an unfinished character is text too."""
        if self.stop_string is None:
            self._catch_up(is_end=True)

    def _catch_up(self, *, is_end: bool = False) -> None:
        """Decode the tokens that are not in the text yet, however many, as far as their last character is complete."""
        num_tokens = len(self._token_ids)
        if self._read == num_tokens:
            return
        if self._known is None:
            self._known = self._decode(self._prefix, self._read)
        for end in range(num_tokens, max(self._read, num_tokens - MOST_BYTES), -1):
            longer = self._decode(self._prefix, end)
            if is_end or (len(longer) > len(self._known) and not longer.endswith(REPLACEMENT)):
                self._extend(longer[len(self._known) :])
                self._known = longer
                if end - self._prefix > CONTEXT:  # the context need not become longer
                    self._prefix, self._known = self._read, None
                self._read = end
                return

    def _extend(self, piece: str) -> None:
        """Add a piece of text and look for a stop string that ends in it; the one that is complete first wins."""
        before = len(self._text)
        self._text += piece
        found = [
            (start + len(stop), order, start, stop)
            for order, stop in enumerate(self._stop)
            if (start := self._text.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        if found:
            end, _, start, self.stop_string = min(found)
            self._text = self._text[: end if self._include_stop else start]

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._token_ids[start:end], skip_special_tokens=self._skip_special_tokens)
