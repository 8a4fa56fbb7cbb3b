"""Bookkeeping of the KV cache: which block belongs to whom. No tensors here."""
