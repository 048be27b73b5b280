"""A contiguous KV cache: for every sequence that runs, one row of `max_model_len` slots, in every layer.

    row 0   | a a a a a a . . . . . . . . . . |     six tokens of "a"; ten slots that wait, or are never used
    row 1   | b b . . . . . . . . . . . . . . |

This is what a KV cache is without paging: simple, and as large as the longest sequence that might come.
"""

import torch
from torch import Tensor
from transformers import PretrainedConfig


class ContiguousCache:
    """K and V of every layer.

    Args:
        config: of the model; says how many layers and KV heads there are and how wide a head is.
        num_rows: sequences held at once.
        max_model_len: slots of a row.
        dtype, device: of the tensors.

    Attributes:
        keys, values: for each layer, [rows, max_model_len, Hkv, D].

    Example: two layers of one KV head of four, 3 rows of 8 slots, float32.
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(
        ...     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, hidden_size=8, head_dim=4
        ... )
        >>> ContiguousCache(config, num_rows=3, max_model_len=8).num_bytes     # 2 layers, K and V, 24 slots, 16 bytes
        1536
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        num_rows: int,
        max_model_len: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        text = config.get_text_config()
        num_heads = text.num_attention_heads
        num_kv_heads = getattr(text, "num_key_value_heads", None) or num_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // num_heads
        shape = (num_rows, max_model_len, num_kv_heads, head_dim)
        self.num_rows = num_rows
        self.max_model_len = max_model_len
        layers = range(text.num_hidden_layers)
        try:
            self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
            self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        except RuntimeError as error:
            raise ValueError(
                f"a cache of {num_rows} rows of {max_model_len} slots does not fit into the memory of {device}"
            ) from error

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, measured."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.keys + self.values)

    def write(self, layer: int, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> None:
        """Write one layer's K and V of some tokens.

        Args:
            layer: which.
            rows, positions: [n] where each token goes.
            key, value: [n, Hkv, D].
        """
        self.keys[layer][rows, positions] = key
        self.values[layer][rows, positions] = value
