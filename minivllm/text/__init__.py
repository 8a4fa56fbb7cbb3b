"""Text in, text out: tokenizer, incremental detokenizer and chat template; nothing here knows of models or tensors."""

from __future__ import annotations

from minivllm.text.chat_template import ChatTemplate
from minivllm.text.detokenizer import IncrementalDetokenizer
from minivllm.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "IncrementalDetokenizer", "Tokenizer"]
