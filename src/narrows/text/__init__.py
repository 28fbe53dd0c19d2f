"""Tokenizers and text: files to token ids and back, chats to prompts, ids to text as they arrive.

No torch, so that a server or a benchmark client can use it without the engine.
"""

from narrows.text.generation_config import GenerationConfig
from narrows.text.offsets import TokenOffsets
from narrows.text.stream import GeneratedText, TextStream
from narrows.text.tokenizer import Message, Tokenizer

__all__ = ["GeneratedText", "GenerationConfig", "Message", "TextStream", "TokenOffsets", "Tokenizer"]
