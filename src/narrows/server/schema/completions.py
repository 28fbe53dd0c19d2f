"""Body of ``/v1/completions``. Knows shapes and ranges; decides nothing."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from narrows.server.schema.common import MAX_IDS, GenerationFields, TokenId, TopLogprobs
from narrows.server.schema.limits import AtMost, Text

__all__ = ["CompletionRequest", "PromptIds"]

MAX_PROMPTS = 1024

PromptIds = Annotated[list[TokenId], AtMost(MAX_IDS, "token ids of a prompt", least=1)]


def _kind(prompt: Any) -> str | None:
    """Of which form a prompt is; a list's first item decides, so that the others are told what they should be."""
    if isinstance(prompt, str):
        return "text"
    if not isinstance(prompt, list):
        return None
    first = prompt[0] if prompt else 0
    return "texts" if isinstance(first, str) else "lists of ids" if isinstance(first, list) else "ids"


class CompletionRequest(GenerationFields):
    """A text to go on with, or several; as text or as token ids."""

    prompt: Annotated[
        Annotated[Text, Tag("text")]
        | Annotated[PromptIds, Tag("ids")]
        | Annotated[list[Text], AtMost(MAX_PROMPTS, "prompts"), Tag("texts")]
        | Annotated[list[PromptIds], AtMost(MAX_PROMPTS, "prompts"), Tag("lists of ids")],
        Discriminator(
            _kind, custom_error_type="wrong_type", custom_error_message="must be a text, token ids, or a list of either"
        ),
    ]
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
