"""Routes that clients of other servers ask for and this one has not: why, and what to do. Knows paths only."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["why_absent"]


@dataclass(frozen=True, slots=True)
class _Absent:
    """``paths``: each with all that is below it."""

    paths: tuple[str, ...]
    why: str


_ABSENT = (
    _Absent(
        ("/v1/embeddings", "/embeddings", "/embed", "/api/embed", "/api/embeddings", "/pooling"),
        "this server generates text and makes no embeddings; ask a server of an embedding model for them",
    ),
    _Absent(
        ("/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score", "/classify"),
        "this server generates text and ranks none; ask a server of a reranking model, or compare "
        "log-probabilities of /v1/completions with echo and logprobs",
    ),
    _Absent(
        ("/v1/moderations",), "this server generates text and moderates none; ask a model about the text in a chat"
    ),
    _Absent(
        ("/v1/audio", "/v1/images", "/v1/videos", "/v1/realtime"),
        "this server reads and writes text only; use a server of a model that does more",
    ),
    _Absent(
        ("/v1/responses", "/v1/conversations", "/v1/assistants", "/v1/threads", "/v1/vector_stores", "/v1/containers"),
        "this server keeps nothing between requests; send the whole conversation to /v1/responses",
    ),
    _Absent(
        ("/v1/files", "/v1/uploads", "/v1/batches", "/v1/messages/batches", "/v1/fine_tuning", "/v1/evals"),
        "this server keeps no files and no batches; send requests as they are, many at once",
    ),
    _Absent(
        ("/tokenizer_info", "/get_tokenizer_info"),
        "this server hands out no tokenizer's files; they are in the checkpoint's folder, and /tokenize and "
        "/detokenize do what they say",
    ),
    _Absent(
        ("/v1/complete", "/generate", "/generate_stream", "/api/chat", "/api/generate", "/api/tags", "/api/show"),
        "this server speaks OpenAI's API (/v1/chat/completions, /v1/completions, /v1/responses) and Anthropic's "
        "(/v1/messages)",
    ),
)


def why_absent(path: str) -> str:
    """Why there is nothing at ``path``, and what to do instead; empty if nobody would expect anything there.

    >>> why_absent("/v1/embeddings").partition(";")[0]
    'this server generates text and makes no embeddings'
    """
    path = path.rstrip("/")
    found = (absent.why for absent in _ABSENT for known in absent.paths if f"{path}/".startswith(f"{known}/"))
    return next(found, "")
