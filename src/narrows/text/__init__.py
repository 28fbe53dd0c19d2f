"""Room of text: tokenizer files to ids and back, chats to prompts, and ids to text as they arrive.

It imports `errors` only, and no torch, so that a server or a benchmark client can use it without the engine.
"""

from narrows.text.generated import GeneratedText
from narrows.text.generation_config import GenerationConfig
from narrows.text.places import TokenPlaces
from narrows.text.stream import TextStream
from narrows.text.tokenizer import Message, Tokenizer

__all__ = ["GeneratedText", "GenerationConfig", "Message", "TextStream", "TokenPlaces", "Tokenizer"]
