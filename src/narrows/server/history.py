"""A past conversation, told piece by piece, as the messages of a chat. Knows chats; not how another API tells it.

Other APIs have a thought, a text and each call as pieces of their own; chat templates want one message for an answer.
"""

from __future__ import annotations

from typing import Any

from narrows.server.schema.chat import ChatMessage

__all__ = ["History"]


class History:
    """The messages so far. What the model thought, said and called, in this order, becomes one message.

    >>> history = History()
    >>> history.say("user", "2 + 2?"), history.think("easy"), history.say("assistant", "4")
    (None, None, None)
    >>> [(message.role, message.reasoning_content, message.content) for message in history.messages]
    [('user', None, '2 + 2?'), ('assistant', 'easy', '4')]
    """

    def __init__(self) -> None:
        self._messages: list[ChatMessage] = []
        self._thought: str | None = None
        self._text: str | None = None
        self._calls: list[dict[str, Any]] = []

    @property
    def messages(self) -> list[ChatMessage]:
        """All of them."""
        self._end_answer()
        return self._messages

    def think(self, text: str) -> None:
        """The model thought this."""
        if self._text is not None or self._calls:
            self._end_answer()
        self._thought = (self._thought or "") + text

    def say(self, role: str, text: str) -> None:
        """Somebody said this."""
        if role == "assistant":
            if self._text is not None or self._calls:
                self._end_answer()
            self._text = text
        else:
            self._end_answer()
            self._messages.append(ChatMessage(role=role, content=text))

    def call(self, number: str, name: str, arguments: str) -> None:
        """The model called a function; ``arguments`` are JSON."""
        function = {"name": name, "arguments": arguments}
        self._calls.append({"id": number, "type": "function", "function": function})

    def result(self, number: str, text: str) -> None:
        """What a call came to."""
        self._end_answer()
        self._messages.append(ChatMessage(role="tool", tool_call_id=number, content=text))

    def _end_answer(self) -> None:
        if self._thought is None and self._text is None and not self._calls:
            return
        self._messages.append(
            ChatMessage(
                role="assistant",
                content=self._text,
                reasoning_content=self._thought,
                tool_calls=self._calls or None,
            )
        )
        self._thought, self._text, self._calls = None, None, []
