"""The engine against transformers' `generate`, and against itself under every setting that must not matter."""

import gc
import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import as_prompts, generate, load, token_prompts, tokens_of
from tiny_models import ARCHITECTURES, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged import LLM, SamplingParams
from paged.kv_pool import LayerShape, bytes_per_block
from paged.model.largest_steps import largest_steps
from paged.model.loading import TINY

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("form", ["gathered", "fused"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_equal_transformers_generate(name, form, folders):
    """Float32, ragged prompts around block borders, with a pool so small that requests are preempted."""
    prompts = token_prompts([1, 3, 4, 5, 17, 40])
    llm = load(folders[name], block_size=4, num_gpu_blocks_override=20, max_num_seqs=4, attention_form=form)
    outputs = llm.generate(as_prompts(prompts), GREEDY)
    model = tiny_model(name)
    for prompt, tokens in zip(prompts, tokens_of(outputs), strict=True):
        expected = generate(model, prompt, 24)
        assert tokens == expected
        assert len(set(expected)) > 3, "a model that repeats itself would hide faults"
    # Where every layer has a window, blocks are freed so early that the pool does not run out.
    assert (llm.engine.scheduler.num_preemptions > 0) == (name != "mistral")
    assert llm.engine.scheduler.pool.num_free == 18, "every block came back"


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings", [{"enforce_eager": True, "attention_form": "gathered"}, {}], ids=["eager", "compiled"]
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tokens_on_a_gpu_equal_transformers_generate_on_a_cpu(name, settings, folders):
    prompts = token_prompts([1, 3, 4, 5, 17, 40])
    llm = load(folders[name], device="cuda", block_size=4, num_gpu_blocks_override=20, max_num_seqs=4, **settings)
    model = tiny_model(name)
    for prompt, tokens in zip(prompts, tokens_of(llm.generate(as_prompts(prompts), GREEDY)), strict=True):
        assert tokens == generate(model, prompt, 24)


def test_the_largest_steps_are_full_and_run_on_a_pool_of_three_blocks(folders):
    """What a GPU's memory is measured with: the token budget used up, every row taken, all at full length."""
    llm = load(
        folders["llama"],
        max_model_len=64,
        block_size=64,
        max_num_seqs=5,
        max_num_batched_tokens=200,
        num_gpu_blocks_override=3,
    )
    prompts, decodes = largest_steps(llm.engine.config)
    assert [(row.end, len(row.token_ids)) for row in prompts.rows] == [(64, 64), (64, 64), (64, 64), (64, 8)]
    assert prompts.num_tokens == 200
    assert [(row.end, len(row.token_ids)) for row in decodes.rows] == [(64, 1)] * 5
    for step in (prompts, decodes):
        assert len(llm.engine.runner.run(step).token_ids) == len(step.rows)
    # The engine is none the worse for it.
    fresh = load(folders["llama"], max_model_len=64, block_size=64, num_gpu_blocks_override=3)
    prompt = as_prompts(token_prompts([6]))
    assert tokens_of(llm.generate(prompt, GREEDY)) == tokens_of(fresh.generate(prompt, GREEDY))


@pytest.mark.gpu
def test_the_pool_takes_the_share_of_the_gpu_that_was_asked_for():
    """Weights, the largest step and the pool together stay within gpu_memory_utilization; others' memory is apart."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    share = 3 * 2**29 / total
    settings = {"device": "cuda", "dtype": "float32", "enforce_eager": True, "max_num_seqs": 512}
    llm = LLM(model="tiny", gpu_memory_utilization=share, **settings)
    assert llm.engine.runner.kv_cache_bytes > 2**28
    assert llm.engine.runner.num_blocks < 512 * 64, "the limit on the share was the one that held"
    for length, wishes in ((1000, {}), (3, {}), (100, {"logprobs": 20, "prompt_logprobs": 20})):
        prompt = {"prompt_token_ids": [5] * length}
        params = SamplingParams(temperature=1, top_p=0.9, max_tokens=24, ignore_eos=True, **wishes)
        llm.generate([prompt] * 64, params)
    free_after, _ = torch.cuda.mem_get_info()
    # Whole pages of 2 MiB are handed out; and the next step must not need the share's last byte.
    assert free - free_after <= share * total + 32 * 2**20


def test_the_shipped_model_equals_transformers_generate():
    prompts = [
        "To be, or not to be",
        "ROMEO:\n",
        "My lord,",
        "What news from the north, sir? Speak, and be brief.",
    ]
    llm = LLM(model="tiny", max_model_len=256, device="cpu")
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True))
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert list(output.prompt_token_ids) == tokenizer(prompt)["input_ids"]
        assert list(output.outputs[0].token_ids) == generate(model, list(output.prompt_token_ids), 48)
        assert output.prompt == prompt


class Logits:
    """Every row of logits that a model computed, in order."""

    def __init__(self, llm: LLM) -> None:
        self.rows: list[torch.Tensor] = []
        head = llm.engine.runner._model.get_output_embeddings()
        head.register_forward_hook(lambda module, arguments, output: self.rows.extend(output[0].double()))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_short_prompt_is_not_changed_by_a_long_one_beside_it(name, folders):
    """Packing must not change the model: the same logits, up to the rounding of sums in another order."""
    short, long = token_prompts([5, 90])
    params = SamplingParams(temperature=0, max_tokens=1)
    llm = load(folders[name], dtype="float64", block_size=4, enable_prefix_caching=False)
    seen = Logits(llm)
    llm.generate(as_prompts([short]), params)
    llm.generate(as_prompts([long, short]), params)
    alone, _, packed = seen.rows
    # A few thousand float64 roundings of 1e-16 each, against differences of 1e-2 if a single key were mixed up.
    assert (alone - packed).abs().max() <= 1e-11 * alone.abs().max()


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 1, "num_gpu_blocks_override": 200},
        {"block_size": 5},
        {"block_size": 128},
        {"max_num_seqs": 1},
        {"max_num_seqs": 2},
        {"num_gpu_blocks_override": 17, "block_size": 4},
        {"max_model_len": 256, "max_num_batched_tokens": 256},
        {"attention_form": "fused"},
    ],
    ids=str,
)
def test_settings_that_must_not_matter(settings, folders):
    """In float64, greedy and drawn, the tokens are those of the default settings."""
    prompts = as_prompts(token_prompts([1, 7, 16, 33, 20]))
    params = [
        SamplingParams(temperature=t, top_p=0.9, top_k=20, seed=i, max_tokens=20, ignore_eos=True)
        for i, t in enumerate([0, 0.7, 1.0, 1.5, 0])
    ]
    default = load(folders["llama"], dtype="float64").generate(prompts, params)
    changed = load(folders["llama"], dtype="float64", **settings).generate(prompts, params)
    assert tokens_of(changed) == tokens_of(default)


def test_a_seeded_request_draws_the_same_alone_and_in_any_batch(folders):
    llm = load(folders["llama"], dtype="float64")
    prompts = as_prompts(token_prompts([4, 9, 23]))
    params = [SamplingParams(temperature=1.0, seed=s, max_tokens=30, ignore_eos=True) for s in (7, 8, 7)]
    together = tokens_of(llm.generate(prompts, params))
    backwards = tokens_of(llm.generate(prompts[::-1], params[::-1]))[::-1]
    alone = [tokens_of(llm.generate([prompt], wish))[0] for prompt, wish in zip(prompts, params, strict=True)]
    assert together == backwards == alone


def test_unseeded_requests_differ_from_each_other_and_repeat_with_the_engine(folders):
    prompts = as_prompts(token_prompts([4]) * 3)
    params = SamplingParams(temperature=1.0, max_tokens=30, ignore_eos=True)
    first = tokens_of(load(folders["llama"], seed=1).generate(prompts, params))
    again = tokens_of(load(folders["llama"], seed=1).generate(prompts, params))
    other = tokens_of(load(folders["llama"], seed=2).generate(prompts, params))
    assert first == again
    assert len({tuple(tokens) for tokens in first + other}) == 6


def test_stop_reasons(folders):
    """The same greedy tokens, ended by each of the things that can end them."""
    llm = load(folders["llama"])
    (prompt,) = as_prompts(token_prompts([6]))

    def run(**wishes):
        return llm.generate(prompt, SamplingParams(temperature=0, **wishes))[0].outputs[0]

    whole = run(max_tokens=20, ignore_eos=True)
    assert (whole.finish_reason, whole.stop_reason, len(whole.token_ids)) == ("length", None, 20)
    third = whole.token_ids[2]
    assert third not in whole.token_ids[:2]
    stopped = run(max_tokens=20, ignore_eos=True, stop_token_ids=[third])
    assert (stopped.finish_reason, stopped.stop_reason, stopped.token_ids) == ("stop", third, whole.token_ids[:3])
    llm.engine._eos_token_ids = frozenset([third])
    ended = run(max_tokens=20)
    assert (ended.finish_reason, ended.stop_reason, ended.token_ids) == ("stop", None, whole.token_ids[:3])
    assert run(max_tokens=20, ignore_eos=True).token_ids == whole.token_ids
    llm.engine._eos_token_ids = frozenset()
    assert len(run(max_tokens=None).token_ids) == llm.engine.max_model_len - 6


def test_stop_strings_end_the_text_before_them():
    llm = LLM(model="tiny", max_model_len=256, device="cpu")
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    whole = llm.generate("To be, or not", params)[0].outputs[0]
    tokenizer = llm.get_tokenizer()
    assert whole.text == tokenizer.decode(whole.token_ids, skip_special_tokens=True)
    stop = whole.text[9:14]
    assert stop not in whole.text[:13]
    stopped = llm.generate("To be, or not", SamplingParams(temperature=0, max_tokens=40, stop=stop))[0].outputs[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (whole.text[:9], "stop", stop)
    assert stopped.token_ids == whole.token_ids[: len(stopped.token_ids)]
    assert stop in tokenizer.decode(stopped.token_ids)
    assert stop not in tokenizer.decode(stopped.token_ids[:-1])
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_usable


def test_a_stop_string_that_the_last_token_completes():
    """The text ends before it and the reason is the string, though the length would have ended it as well."""
    llm = LLM(model="tiny", max_model_len=256, device="cpu")
    whole = llm.generate("To be, or not", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))[0].outputs[0]
    stop = whole.text[-3:]
    assert whole.text.count(stop) == 1
    (output,) = llm.generate("To be, or not", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=stop))
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == (whole.text[:-3], "stop")
    assert output.outputs[0].stop_reason == stop
    assert not llm.engine._answers, "nothing of a finished request stays"


def test_a_stop_token_is_no_part_of_the_text():
    llm = LLM(model="tiny", max_model_len=256, device="cpu")
    whole = llm.generate("To be, or not", SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))[0].outputs[0]
    token = whole.token_ids[-1]
    assert token not in whole.token_ids[:-1]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, stop_token_ids=[token])
    (output,) = llm.generate("To be, or not", params)
    assert output.outputs[0].token_ids == whole.token_ids
    assert output.outputs[0].text == llm.get_tokenizer().decode(whole.token_ids[:-1])


def test_half_a_character_at_the_end_comes_out():
    """A character of several bytes whose last token never comes: its replacement is the text's end, not lost."""
    llm = LLM(model="tiny", max_model_len=256, device="cpu")
    half = llm.get_tokenizer()("é", add_special_tokens=False)["input_ids"][0]
    engine = llm.engine
    engine.add_request("a", "To be", SamplingParams(temperature=0, max_tokens=1))
    launch = engine.runner.launch
    engine.runner.launch = lambda step: replace(launch(step), sampled=torch.tensor([[half], [0]]))
    (output,) = engine.step()
    assert (output.outputs[0].text, output.finished) == ("\ufffd", True)


def test_the_checkpoint_may_state_how_to_sample(folders, tmp_path):
    """generation_config.json holds for requests that bring no wishes, and the config's end token where it has none."""
    shutil.copytree(folders["llama"], tmp_path / "model")
    stated = {"temperature": 0.5, "top_k": 1, "top_p": 0.9, "max_new_tokens": 3}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(stated))
    settings = {"device": "cpu", "skip_tokenizer_init": True}
    llm = LLM(model=tmp_path / "model", **settings)
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.5, 1, 0.9, 3)
    (prompt,) = as_prompts(token_prompts([6]))
    greedy = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=3))
    assert tokens_of(llm.generate(prompt)) == tokens_of(greedy), "top_k=1 takes the most likely token"
    llm.engine.add_request("a", prompt["prompt_token_ids"])
    assert llm.engine.scheduler.waiting[0].sampling_params == params
    assert LLM(model=tmp_path / "model", generation_config="vllm", **settings).get_default_sampling_params() == (
        SamplingParams()
    )

    second = tokens_of(greedy)[0][1]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for name, content in (("config.json", {**config, "eos_token_id": second}), ("generation_config.json", {})):
        (tmp_path / "model" / name).write_text(json.dumps(content))
    assert LLM(model=tmp_path / "model", **settings).engine._eos_token_ids == {second}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [second, 3]}))
    ended = LLM(model=tmp_path / "model", **settings)
    assert ended.engine._eos_token_ids == {second, 3}
    (output,) = ended.generate(prompt, SamplingParams(temperature=0, max_tokens=9))
    assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (2, "stop")


def test_seed_minus_one_is_no_seed(folders):
    prompts = as_prompts(token_prompts([4]) * 2)
    params = SamplingParams(temperature=1.0, max_tokens=20, ignore_eos=True, seed=-1)
    first, second = tokens_of(load(folders["llama"]).generate(prompts, params))
    assert first != second


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Each token is one of the best, up to what rounding in this dtype does to transformers' own logits."""
    llm = LLM(model="tiny", max_model_len=256, device="cpu", dtype=dtype)
    prompt = llm.get_tokenizer()("To be, or not to be")["input_ids"]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    (tokens,) = tokens_of(llm.generate(as_prompts([prompt]), params))
    exact = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(TINY, dtype=dtype)
    with torch.inference_mode():
        ids = torch.tensor([[*prompt, *tokens]])
        best, halved = (
            model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float() for model in (exact, rounded)
        )
    error = (best - halved).abs().max()  # of one logit; a gap between two may be off by twice that, in both engines
    chosen = best.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert (best.amax(dim=1) - chosen).max() <= 4 * error
    assert llm.engine.runner.caches[0][0].dtype == dtype


def test_a_pool_is_no_larger_than_its_users(folders):
    llm = load(folders["llama"], max_model_len=64, block_size=16, max_num_seqs=3)
    assert llm.engine.runner.num_blocks == 3 * 4 + 2


def test_nothing_is_written_to_the_null_and_the_trash_block(folders):
    llm = load(folders["gemma2"], block_size=4, num_gpu_blocks_override=40)
    llm.generate(as_prompts(token_prompts([30, 3, 50])), GREEDY)
    for key_cache, value_cache in llm.engine.runner.caches:
        for block in (0, 39):
            assert not key_cache[block].any()
            assert not value_cache[block].any()


def test_modelled_bytes_are_measured_bytes(folders):
    llm = load(folders["llama"], kv_cache_memory_bytes=1_000_000, block_size=16)
    shapes = [LayerShape(k.shape[2], k.shape[3], v.shape[3]) for k, v in llm.engine.runner.caches]
    size = bytes_per_block(shapes, 16, torch.float32)
    assert llm.engine.runner.num_blocks == 1_000_000 // size
    assert llm.engine.runner.kv_cache_bytes == 1_000_000 // size * size


def test_an_aborted_request_gives_everything_back(folders):
    engine = load(folders["llama"]).engine
    for name, prompt in zip("abc", token_prompts([5, 20, 9]), strict=True):
        engine.add_request(name, prompt, GREEDY)
    engine.step()
    aborted = engine.abort_request("b")
    assert aborted is not None
    assert aborted.finished
    assert aborted.outputs[0].finish_reason == "abort"
    assert engine.abort_request("b") is None
    done = {}
    while engine.has_unfinished_requests:
        done |= {output.request_id: output for output in engine.step() if output.finished}
    assert sorted(done) == ["a", "c"]
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable


def test_ctrl_c_leaves_nothing_in_the_engine(folders, monkeypatch):
    llm = load(folders["llama"])
    prompts = as_prompts(token_prompts([5, 20]))
    expected = tokens_of(llm.generate(prompts, GREEDY))
    launch, steps = llm.engine.runner.launch, []

    def interrupted(step):
        steps.append(step)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return launch(step)

    monkeypatch.setattr(llm.engine.runner, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(prompts, GREEDY)
    assert not llm.engine.has_unfinished_requests
    assert llm.engine.scheduler.pool.num_free == llm.engine.scheduler.pool.num_usable
    assert tokens_of(llm.generate(prompts, GREEDY)) == expected


def test_no_prompts_no_outputs(folders):
    assert load(folders["llama"]).generate([], GREEDY) == []


def test_random_weights_come_from_the_config_and_the_seed(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    prompts = as_prompts(token_prompts([5, 20]))
    first, again, other = (
        tokens_of(load(tmp_path, load_format="dummy", seed=seed).generate(prompts, GREEDY)) for seed in (1, 1, 2)
    )
    assert first == again != other
