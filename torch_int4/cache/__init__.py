"""The managed KV cache, which is a cache of transformers, too."""

from torch_int4.cache.int4_cache import Int4Cache

__all__ = ["Int4Cache"]
