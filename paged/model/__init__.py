"""transformers' own models, loaded, checked, and run with their attention reading a paged KV cache."""

from paged.model.loading import LoadedModel, load_model
from paged.model.memory_ledger import MemoryLedger
from paged.model.runner import ModelRunner
from paged.model.support import ModelNotFound, UnsupportedModel

__all__ = ["LoadedModel", "MemoryLedger", "ModelNotFound", "ModelRunner", "UnsupportedModel", "load_model"]
