"""The model that ships: it is what its card says, and it has learnt something."""

import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged.model.loading import TINY

# Lines of our own in the style it was trained on: not from its training text.
PASSAGE = """DUKE:
What man is this that stands before the gate?

SERVANT:
My lord, he says he is your brother's son, and that he comes to speak with you of peace. He has no sword, nor any
man with him.

DUKE:
Then let him in; and bid my daughter come. I have not seen the boy these seven years, since that dark night his father
left the court.
"""


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


def test_size_and_shape(model):
    config = model.config
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 5_000_000
    assert config.model_type == "llama"
    assert config.num_attention_heads == 3 * config.num_key_value_heads
    assert config.max_position_embeddings == 1024
    assert 512 <= config.vocab_size <= 1024
    weights = AutoModelForCausalLM.from_pretrained(TINY, dtype="auto")
    assert weights.dtype in (torch.float16, torch.bfloat16)


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert max(ids) < 1024
    if tokenizer.bos_token not in text:
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_card_and_metrics_agree():
    metrics = json.loads((TINY / "metrics.json").read_text())
    card = (TINY / "README.md").read_text()
    bits = metrics["bits_per_byte"]
    assert f"**{bits['model']:.3f}**" in card
    for other in ("unigram_bytes", "gzip", "xz"):
        assert bits["model"] < bits[other]
        assert f"{bits[other]:.3f}" in card


@torch.inference_mode()
def test_it_predicts_text_it_has_never_seen(model, tokenizer):
    """Under 2.5 bits a byte, where the bytes' own entropy is above 4: within a quarter of what the card says."""
    data = PASSAGE.encode()
    ids = torch.tensor([tokenizer(PASSAGE)["input_ids"]])
    logits = model(ids, use_cache=False).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    bits = float(nats) / math.log(2) / len(data)
    entropy = -sum(n / len(data) * math.log2(n / len(data)) for n in Counter(data).values())
    stated = json.loads((TINY / "metrics.json").read_text())["bits_per_byte"]["model"]
    assert bits < 1.25 * stated < entropy


@torch.inference_mode()
def test_all_positions_are_trained(model, tokenizer):
    """The last quarter of a full context is predicted as well as the first, up to the noise of 256 tokens each."""
    ids = torch.tensor([tokenizer(PASSAGE * 9, truncation=True)["input_ids"]])
    assert ids.shape[1] == 1024

    def loss(position_ids):
        logits = model(ids, position_ids=position_ids, use_cache=False).logits[0, :-1]
        nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        return nats[:256], nats[-256:]

    positions = torch.arange(1024)[None]
    first, last = loss(positions)
    noise = 3 * (first.var() / 256 + last.var() / 256).sqrt()
    assert last.mean() <= first.mean() + noise
    _, beyond = loss(positions * 8)  # what it looks like where a model was not trained
    assert beyond.mean() > first.mean() + noise


@torch.inference_mode()
def test_greedy_text_repeats_and_is_no_loop(model, tokenizer):
    ids = torch.tensor([tokenizer("What news, my lord?")["input_ids"]])
    first, again = (model.generate(ids, max_new_tokens=60, do_sample=False)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert len(set(first.tolist())) > 15
