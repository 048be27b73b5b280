"""Text that grows token by token equals text decoded at once, in the middle of characters and of stop strings too."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paged.sampling import Detokenizer
from paged.sampling.detokenizer import CONTEXT


class Bytes:
    """A tokenizer whose tokens are bytes: every character beyond ASCII is spread over several tokens."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")


def grow(text: str, stop: tuple[str, ...] = (), prompt: str = "") -> tuple[list[str], Detokenizer]:
    """The text after every byte."""
    detokenizer = Detokenizer(Bytes(), tuple(prompt.encode()), stop)
    texts = []
    for token in text.encode():
        detokenizer.append(token)
        texts.append(detokenizer.text)
        if detokenizer.stop_string is not None:
            break
    detokenizer.finish()
    return texts, detokenizer


@given(st.text(), st.text())
def test_text_equals_decoding_at_once(text, prompt):
    text = text.replace("\N{REPLACEMENT CHARACTER}", "?")
    texts, detokenizer = grow(text, prompt=prompt)
    assert detokenizer.text == text
    assert all(text.startswith(part) for part in texts), "a part of a character was shown"


def test_a_character_appears_when_its_last_byte_does():
    assert grow("aé€")[0] == ["a", "a", "aé", "aé", "aé", "aé€"]


def test_an_unfinished_character_is_text_at_the_end():
    detokenizer = Detokenizer(Bytes(), ())
    for token in "€".encode()[:2]:
        detokenizer.append(token)
    assert detokenizer.text == ""
    detokenizer.finish()
    assert detokenizer.text == "\N{REPLACEMENT CHARACTER}"


@given(st.text(alphabet="abé", max_size=30), st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3))
def test_the_stop_string_that_is_complete_first_wins(text, stop):
    detokenizer = grow(text, tuple(stop))[1]
    # By definition: the earliest end of any stop string in the text; of those that end there, the first in the list.
    ends = [(text.find(s) + len(s), order) for order, s in enumerate(stop) if s in text]
    if not ends:
        assert detokenizer.stop_string is None
        assert detokenizer.text == text
    else:
        end, order = min(ends)
        assert detokenizer.stop_string == stop[order]
        assert detokenizer.text == text[: end - len(stop[order])]


@pytest.mark.parametrize("prompt", ["", "stop", "sto"])
def test_the_prompt_is_not_searched(prompt):
    detokenizer = grow("p stop", ("stop",), prompt=prompt)[1]
    assert detokenizer.text == "p "


class Counting(Bytes):
    """Notes how many tokens are decoded in each call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        self.calls.append(len(token_ids))
        return super().decode(token_ids, skip_special_tokens)


@given(st.text(), st.text(max_size=3), st.data())
def test_text_is_the_same_whenever_it_is_looked_at(text, prompt, data):
    text = text.replace("\N{REPLACEMENT CHARACTER}", "?")
    detokenizer = Detokenizer(Bytes(), tuple(prompt.encode()))
    looks = data.draw(st.lists(st.booleans(), min_size=len(text.encode()), max_size=len(text.encode())))
    for i, token in enumerate(text.encode()):
        detokenizer.append(token)
        if looks[i]:
            assert detokenizer.text == text.encode()[: i + 1].decode(errors="ignore")
    detokenizer.finish()
    assert detokenizer.text == text


def test_tokens_nobody_looks_at_are_decoded_at_once():
    tokenizer = Counting()
    detokenizer = Detokenizer(tokenizer, tuple(b"before"))
    for token in b"x" * 1000:
        detokenizer.append(token)
    assert tokenizer.calls == []
    detokenizer.finish()
    assert detokenizer.text == "x" * 1000
    assert tokenizer.calls == [5, 1005], "the context, then the context with all of the output"


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_a_token_costs_the_same_however_long_the_text_is(stop):
    tokenizer = Counting()
    detokenizer = Detokenizer(tokenizer, (), stop)
    for i, token in enumerate(b"some words " * 100, 1):
        detokenizer.append(token)
        assert len(detokenizer.text) == i
    assert len(tokenizer.calls) < 1.5 * i, "less than two decodings for each token"
    assert max(tokenizer.calls) <= CONTEXT + 1
