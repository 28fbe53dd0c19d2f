"""Body of ``/v1/completions``. Knows shapes and ranges; decides nothing."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from narrows.server.schema.common import GenerationFields, TokenId, TopLogprobs

__all__ = ["CompletionRequest", "PromptIds"]

MAX_PROMPTS = 1024

PromptIds = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(GenerationFields):
    """A text to go on with, or several; as text or as token ids."""

    prompt: (
        str
        | PromptIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[PromptIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    echo: bool | None = Field(default=None, description="begin the text with the prompt")
    logprobs: TopLogprobs | None = Field(default=None, description="that many of the best tokens, and the chosen one")
    add_special_tokens: bool | None = Field(
        default=None, description="whether text is encoded with bos; true if absent"
    )
    return_tokens_as_token_ids: bool | None = Field(default=None, description="write tokens as token_id:123")
    best_of: int | None = Field(default=None, ge=1, description="must equal n")

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)
