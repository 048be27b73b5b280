"""Train the tiny model that ships with paged: a tokenizer, a Llama of two million parameters, and its model card.

    python scripts/train_tiny.py --text shakespeare.txt --out paged/tiny

Reads one text file, takes its last tenth for validation, trains a byte-level BPE tokenizer on the rest, then a
Llama-architecture model (grouped-query attention, so that it exercises what a paged KV cache has to handle) from random
weights, and writes a folder that transformers loads as it is. The defaults made the model in the repository: on one
GPU that takes a few minutes. On a CPU, try `--steps 20 --batch-tokens 4096` to see it run.

The text is cut at its blank lines into speeches, and runs of speeches of random length become documents with an
end-of-text token behind them: so the model learns to begin anywhere and to end. Windows of four lengths up to the
whole context are mixed, so that every position is trained.
"""

import argparse
import gzip
import json
import lzma
import math
import platform
import random
import time
from collections import Counter
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
CONTEXT = 1024
LN2 = math.log(2)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="training text, UTF-8")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--vocab", type=int, default=1024, help="entries of the tokenizer")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--intermediate", type=int, default=576)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1400, help="most optimiser steps")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop after this long, whatever the steps")
    parser.add_argument("--batch-tokens", type=int, default=32768)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--embedding-dropout", type=float, default=0.1)
    parser.add_argument("--layer-dropout", type=float, default=0.25)
    parser.add_argument("--token-dropout", type=float, default=0.1, help="share of input tokens replaced at random")
    parser.add_argument("--average", type=float, default=0.998, help="decay of the averaged weights that are kept")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


# --- text -------------------------------------------------------------------------------------------------------------


def split(text: str) -> tuple[str, str]:
    """Training and validation text: the last tenth, cut at a blank line."""
    border = text.index("\n\n", len(text) * 9 // 10) + 2
    return text[:border], text[border:]


def train_tokenizer(text: str, vocab: int) -> Tokenizer:
    """A byte-level BPE: any bytes can be written, and decoding gives exactly them back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    # A prompt begins a text, so the token that stands between texts goes before it.
    end = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[(END_OF_TEXT, end)]
    )
    return tokenizer


def documents(text: str, tokenizer: Tokenizer, rng: random.Random) -> Tensor:
    """The text as one stream of tokens, cut into documents of 1 to 12 speeches in an order of its own."""
    speeches = text.split("\n\n")
    runs = []
    while speeches:
        count = rng.randint(1, 12)
        runs.append("\n\n".join(speeches[:count]))
        speeches = speeches[count:]
    rng.shuffle(runs)
    end = tokenizer.token_to_id(END_OF_TEXT)
    stream = [end]
    for encoding in tokenizer.encode_batch(runs, add_special_tokens=False):
        stream += [*encoding.ids, end]
    return torch.tensor(stream)


# --- training ---------------------------------------------------------------------------------------------------------


def batches(streams: list[Tensor], batch_tokens: int, generator: torch.Generator):
    """Windows at random places, for ever: ids [B, T + 1], where T is 128, 256, 512 or 1024."""
    while True:
        stream = streams[int(torch.randint(len(streams), (), generator=generator))]
        length = (128, 256, 512, CONTEXT)[int(torch.randint(4, (), generator=generator))]
        starts = torch.randint(len(stream) - length, (batch_tokens // length,), generator=generator)
        yield stream[starts[:, None] + torch.arange(length + 1)]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A short warm-up, a plateau, and a linear fall to zero over the second half."""
    return peak * min(1.0, (step + 1) / 100, 2 * (1 - step / steps))


def add_dropout(model: LlamaForCausalLM, embedding: float, layer: float) -> list[torch.utils.hooks.RemovableHandle]:
    """Drop behind embeddings, attention and MLP: Llama has no dropout, and learns a megabyte of text by heart."""

    def dropping(share: float):
        def hook(module, arguments, output):
            first = output[0] if isinstance(output, tuple) else output
            dropped = torch.nn.functional.dropout(first, share, module.training)
            return (dropped, *output[1:]) if isinstance(output, tuple) else dropped

        return hook

    handles = [model.model.embed_tokens.register_forward_hook(dropping(embedding))]
    for block in model.model.layers:
        handles += [part.register_forward_hook(dropping(layer)) for part in (block.self_attn, block.mlp)]
    return handles


def optimiser_for(model: LlamaForCausalLM, arguments: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW; matrices decay, norms do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": arguments.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.98))


def nats(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Sum of -log p of every token of ids [B, T + 1] but the first of each row."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")


@torch.inference_mode()
def bits_per_byte(model: LlamaForCausalLM, text: str, tokenizer: Tokenizer, device: torch.device) -> float:
    """-log2 p of the text, over its bytes. Each token is predicted once, with 512 to 1023 tokens before it."""
    stream = torch.tensor(tokenizer.encode(text).ids, device=device)
    half = CONTEXT // 2
    total = 0.0
    for start in range(0, len(stream) - 1, half):
        window = stream[max(0, start - half) : start + half + 1][None]
        logits = model(input_ids=window[:, :-1], use_cache=False).logits[0].float()
        fresh = min(half, len(stream) - 1 - start)
        loss = torch.nn.functional.cross_entropy(logits[-fresh:], window[0, -fresh:], reduction="sum")
        total += float(loss)
    return total / LN2 / len(text.encode())


def train(
    model: LlamaForCausalLM, streams: list[Tensor], arguments: argparse.Namespace, validate
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """Train `model`; returns the averaged weights that were best on the validation text."""
    device = model.device
    generator = torch.Generator().manual_seed(arguments.seed)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(arguments.average)
    )
    optimiser = optimiser_for(model, arguments)
    handles = add_dropout(model, arguments.embedding_dropout, arguments.layer_dropout)
    compiled = torch.compile(model, dynamic=False) if device.type == "cuda" else model
    best, best_weights, started = math.inf, None, time.time()
    for step, ids in zip(range(arguments.steps), batches(streams, arguments.batch_tokens, generator), strict=False):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.learning_rate)
        ids = ids.to(device, non_blocking=True)
        targets = ids[:, 1:]
        noisy = torch.where(
            torch.rand(targets.shape, device=device) < arguments.token_dropout,
            torch.randint_like(targets, model.config.vocab_size),
            ids[:, :-1],
        )
        model.train()
        with torch.autocast(device.type, torch.bfloat16):
            logits = compiled(input_ids=noisy, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        averaged.update_parameters(model)

        minutes = (time.time() - started) / 60
        last = step == arguments.steps - 1 or minutes > arguments.minutes
        if step % 200 == 199 or last:
            model.eval()
            bits = validate(averaged.module.eval())
            print(f"step {step + 1:5d}  loss {loss.item():.3f}  validation {bits:.4f} bits/byte  {minutes:.1f} min")
            if bits < best:
                best = bits
                best_weights = {k: v.detach().clone() for k, v in averaged.module.state_dict().items()}
        if last:
            break
    for handle in handles:
        handle.remove()
    assert best_weights is not None, "at least one step was trained"
    model.load_state_dict(best_weights)
    return model.eval(), {"steps": step + 1, "minutes": round(minutes, 2)}


# --- what is written --------------------------------------------------------------------------------------------------


def baselines(text: str) -> dict[str, float]:
    """Bits per byte of the validation text without a model: its byte entropy, gzip, xz."""
    data = text.encode()
    counts = Counter(data)
    entropy = -sum(n / len(data) * math.log2(n / len(data)) for n in counts.values())
    return {
        "unigram_bytes": entropy,
        "gzip": 8 * len(gzip.compress(data, 9)) / len(data),
        "xz": 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data),
    }


def write_card(out: Path, metrics: dict, sample: str, arguments: argparse.Namespace) -> None:
    bits = metrics["bits_per_byte"]
    config = metrics["config"]
    training = metrics["training"]
    environment = metrics["environment"]
    card = f"""---
license: apache-2.0
pipeline_tag: text-generation
library_name: transformers
---

# tiny

The model that ships with `paged`: small enough for a test suite, trained well enough that its text shows when a KV
cache is wrong. `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load this folder as it is.

| | |
| --- | --- |
| architecture | Llama: {config["num_hidden_layers"]} layers, hidden {config["hidden_size"]}, \
MLP {config["intermediate_size"]}, {config["num_attention_heads"]} query and \
{config["num_key_value_heads"]} KV heads of {config["head_dim"]}, \
context {config["max_position_embeddings"]}, tied embeddings |
| parameters | {metrics["parameters"]:,}, stored as {metrics["stored_dtype"]} |
| tokenizer | byte-level BPE, {config["vocab_size"]} entries, `{END_OF_TEXT}` begins and ends a text |
| training text | plays of Shakespeare, collected as "tinyshakespeare" (1.1 MB, public domain); not in this repository |

## How good it is

Bits per byte of the last tenth of the text ({metrics["validation_bytes"]:,} bytes), which neither the tokenizer nor the
model was trained on. Less is better.

| what | bits per byte |
| --- | --- |
| entropy of single bytes | {bits["unigram_bytes"]:.3f} |
| `gzip -9` | {bits["gzip"]:.3f} |
| `xz -9e` | {bits["xz"]:.3f} |
| **this model** | **{bits["model"]:.3f}** |

The checkpoint was chosen by this same figure, so it flatters the model a little.

## How it was made

`python scripts/train_tiny.py --text input.txt --out paged/tiny`, seed {arguments.seed}: {training["steps"]} steps of
{arguments.batch_tokens:,} tokens in {training["minutes"]} minutes on one {environment["device"]} (torch \
{environment["torch"]},
transformers {environment["transformers"]}). AdamW, learning rate {arguments.learning_rate}, \
weight decay {arguments.weight_decay}, dropout {arguments.layer_dropout}, and
{arguments.token_dropout:.0%} of the input tokens replaced at random, averaged weights.

## A sample

Temperature 0.8, 200 tokens from `ROMEO:`, the end of the text suppressed.

```text
{sample}
```

The weights are licensed under Apache-2.0.
"""
    (out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
    }
    print(environment)

    training, validation = split(arguments.text.read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(training, arguments.vocab)
    end = tokenizer.token_to_id(END_OF_TEXT)
    config = LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads,
        head_dim=arguments.hidden // arguments.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    model = LlamaForCausalLM(config).to(device)
    rng = random.Random(arguments.seed)
    streams = [documents(training, tokenizer, rng) for _ in range(32)]

    def validate(candidate: LlamaForCausalLM) -> float:
        return bits_per_byte(candidate, validation, tokenizer, device)

    model, how = train(model, streams, arguments, validate)

    # Both 16-bit types are tried; the one that loses less is kept.
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rounded = {}
    for dtype in (torch.float16, torch.bfloat16):
        model.load_state_dict({name: tensor.to(dtype).float() for name, tensor in weights.items()})
        rounded[dtype] = validate(model)
    dtype = min(rounded, key=lambda key: rounded[key])
    model.load_state_dict(weights)

    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    model = model.to(dtype)
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end)
    model.save_pretrained(out)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(out)

    prompt = torch.tensor([tokenizer.encode("ROMEO:").ids])
    torch.manual_seed(arguments.seed)
    tokens = (
        model.cpu()
        .float()
        .generate(prompt, max_new_tokens=200, do_sample=True, temperature=0.8, top_k=0, suppress_tokens=[end])
    )
    metrics = {
        "bits_per_byte": {**baselines(validation), "model": rounded[dtype]},
        "validation_bytes": len(validation.encode()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "stored_dtype": str(dtype).removeprefix("torch."),
        "training": how,
        "environment": environment,
        "config": {
            name: getattr(config, name)
            for name in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "head_dim",
                "max_position_embeddings",
            )
        },
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    write_card(out, metrics, tokenizer.decode(tokens[0, 1:].tolist()).strip(), arguments)
    print(json.dumps(metrics["bits_per_byte"], indent=2))


if __name__ == "__main__":
    main()
