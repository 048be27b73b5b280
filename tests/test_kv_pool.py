"""Writing, copying and counting bytes, against plain loops and the tensors' own storages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paged.kv_pool import (
    LayerShape,
    allocate_layer,
    allocate_on_host,
    bytes_per_block,
    copy_blocks,
    storage_bytes,
    swap_blocks,
    write,
)

SHAPE = LayerShape(num_kv_heads=2, head_dim=3, value_dim=5)


@given(st.integers(1, 6), st.integers(1, 7), st.data())
def test_a_token_lands_in_its_slot_and_nowhere_else(num_blocks, block_size, data):
    num_slots = num_blocks * block_size
    slots = data.draw(st.lists(st.integers(0, num_slots - 1), unique=True, max_size=num_slots))
    key_cache, value_cache = allocate_layer(SHAPE, num_blocks, block_size, torch.float32, "cpu")
    key = torch.arange(1.0, 1 + len(slots) * 6).reshape(len(slots), 2, 3)
    value = -torch.arange(1.0, 1 + len(slots) * 10).reshape(len(slots), 2, 5)
    write(key_cache, value_cache, key, value, torch.tensor(slots, dtype=torch.int64))
    for slot in range(num_slots):  # the slots of a block lie one after another, so the pool is a list of slots
        for cache, new in ((key_cache, key), (value_cache, value)):
            expected = new[slots.index(slot)] if slot in slots else torch.zeros(cache.shape[2:])
            assert torch.equal(cache.reshape(num_slots, *cache.shape[2:])[slot], expected)


def test_whole_blocks_are_copied_in_every_layer():
    caches = [allocate_layer(SHAPE, 6, 2, torch.float32, "cpu") for _ in range(2)]
    for tensors in caches:
        for tensor in tensors:
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
    before = [tuple(tensor.clone() for tensor in tensors) for tensors in caches]
    copy_blocks(caches, [(1, 4), (2, 5)])
    for tensors, old in zip(caches, before, strict=True):
        for tensor, was in zip(tensors, old, strict=True):
            assert torch.equal(tensor[:4], was[:4])
            assert torch.equal(tensor[4], was[1])
            assert torch.equal(tensor[5], was[2])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_blocks_go_to_the_host_and_come_back_elsewhere(device):
    caches = [allocate_layer(SHAPE, 6, 2, torch.float32, device) for _ in range(2)]
    hosts = [allocate_on_host(cache, 4) for cache in caches]
    assert all(tensor.device.type == "cpu" and tensor.shape[0] == 4 for host in hosts for tensor in host)
    assert all(tensor.is_pinned() == (device == "cuda") for host in hosts for tensor in host)
    for tensors in caches:
        for tensor in tensors:
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
    before = [tuple(tensor.clone() for tensor in tensors) for tensors in caches]
    swap_blocks(caches, hosts, [(1, 3), (4, 1)])
    for tensors in caches:
        for tensor in tensors:
            tensor[[1, 4]] = -1
    swap_blocks(hosts, caches, [(1, 2), (3, 5)])
    for tensors, old in zip(caches, before, strict=True):
        for tensor, was in zip(tensors, old, strict=True):
            assert torch.equal(tensor[2], was[4])
            assert torch.equal(tensor[5], was[1])
            assert torch.equal(tensor[[0, 3]], was[[0, 3]])
            assert (tensor[[1, 4]] == -1).all()


@pytest.mark.parametrize("pairs", [[(1, 2), (3, 2)], [(1, 2), (2, 3)], [(1, 1)]], ids=str)
def test_copies_that_depend_on_their_order_are_refused(pairs):
    with pytest.raises(ValueError, match="depend on their order"):
        copy_blocks([allocate_layer(SHAPE, 5, 2, torch.float32, "cpu")], pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@given(st.integers(1, 9), st.integers(1, 33), st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=3))
def test_modelled_bytes_are_measured_bytes(dtype, num_blocks, block_size, shapes):
    layers = [LayerShape(*shape) for shape in shapes]
    tensors = [t for layer in layers for t in allocate_layer(layer, num_blocks, block_size, dtype, "cpu")]
    assert storage_bytes(tensors) == num_blocks * bytes_per_block(layers, block_size, dtype)


def test_a_storage_is_counted_once():
    tensor = torch.zeros(4, 4)
    assert storage_bytes([tensor, tensor[1:], tensor.T]) == 64
