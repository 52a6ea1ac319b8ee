"""A begun stream that another replica goes on with: from prompt and tokens so far. Pure.

vLLM tells the ids of prompt and tokens on request (`return_token_ids`); they are taken out before
the client sees them. The next replica gets all of them as its prompt, so that nothing is tokenised
again and its text begins where the other one's ended. Only requests are continued whose next token
depends on nothing but the tokens before it: no tools, no grammar, no penalties, one choice.
"""

import json
from typing import Any

_CHAT, _PLAIN = "/v1/chat/completions", "/v1/completions"
# Keys that either concern the prompt alone, or mean the same for the rest of an answer.
_KEPT = frozenset({"model", "temperature", "top_p", "top_k", "min_p", "ignore_eos", "user"})
_PROMPT = frozenset({"messages", "prompt", "chat_template_kwargs", "add_generation_prompt"})
_HANDLED = frozenset({"stream", "stream_options", "max_tokens", "max_completion_tokens"})
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1, None),
    "frequency_penalty": (0, 0.0, None),
    "presence_penalty": (0, 0.0, None),
    "stop": (None, []),
    "logprobs": (None, False),
    "echo": (None, False),
    "seed": (None,),
    "tools": (None, []),
}


class Continuation:
    """One stream: what it has told so far, and the request for its rest."""

    def __init__(self, path: str, asked: dict[str, Any]) -> None:
        self._is_chat = path == _CHAT
        self._asked = asked
        self._head: dict[str, Any] = {}
        self._prompt: list[int] = []
        self._tokens: list[int] = []
        self._told_before = 0  # tokens of earlier replicas, for the usage
        self._is_resumed = False
        self._is_whole = True  # every chunk so far could be followed
        self.is_finished = False

    @classmethod
    def of(cls, path: str, document: dict[str, Any] | None) -> "Continuation | None":
        """None where the rest of an answer would depend on more than its tokens."""
        if document is None or document.get("stream") is not True or path not in (_CHAT, _PLAIN):
            return None
        options = document.get("stream_options") or {}
        if not isinstance(options, dict) or set(options) - {"include_usage"}:
            return None
        for name, value in document.items():
            if name in _KEPT | _PROMPT | _HANDLED:
                continue
            if not _is_neutral(name, value):
                return None
        if path == _PLAIN and not _is_one_prompt(document.get("prompt")):
            return None
        return cls(path, document)

    def first_body(self, model: str) -> bytes:
        """The request as the client made it, with the ids asked for."""
        asked = {**self._asked, "return_token_ids": True}
        return json.dumps({**asked, "model": model} if model else asked).encode()

    @property
    def can_resume(self) -> bool:
        left = self._left()
        return bool(self._prompt) and self._is_whole and not self.is_finished and left != 0

    def resume(self, model: str) -> tuple[str, bytes]:
        """Path and body of the request for the rest."""
        self._is_resumed = True
        self._told_before = len(self._tokens)
        kept = {name: value for name, value in self._asked.items() if name in _KEPT}
        left = self._left()
        document = {
            **kept,
            "prompt": [*self._prompt, *self._tokens],
            "stream": True,
            "return_token_ids": True,
            "stream_options": self._asked.get("stream_options"),
            # None is the end of the context; without the key a completion ends after 16 tokens.
            "max_tokens": left,
        }
        if model:
            document["model"] = model
        return _PLAIN, json.dumps(document).encode()

    def pass_on(self, events: bytes) -> bytes:
        """The same events without what the client did not ask for, in the words of the first."""
        return b"".join(self._one(event) for event in events.split(b"\n\n") if event.strip())

    def _left(self) -> int | None:
        limit = self._asked.get("max_completion_tokens") or self._asked.get("max_tokens")
        if limit is None:
            return None if self._is_chat else max(0, 16 - len(self._tokens))
        return max(0, int(limit) - len(self._tokens))

    def _one(self, event: bytes) -> bytes:
        data = event.strip().removeprefix(b"data:").strip()
        try:
            chunk = json.loads(data)
        except ValueError:  # [DONE], a comment
            return event.strip() + b"\n\n"
        if not isinstance(chunk, dict) or "error" in chunk:
            self._is_whole = False
            return event.strip() + b"\n\n"
        self._take_prompt(chunk)
        for choice in chunk.get("choices") or ():
            self._follow(choice)
        if chunk.get("usage"):
            chunk["usage"] = self._usage(chunk["usage"])
        if not self._head:
            self._head = {k: chunk[k] for k in ("id", "object", "created", "model") if k in chunk}
        return b"data: " + json.dumps({**chunk, **self._head}).encode() + b"\n\n"

    def _follow(self, choice: dict[str, Any]) -> None:
        self._take_prompt(choice)
        ids = choice.pop("token_ids", None) or []
        self._tokens += ids
        self.is_finished = self.is_finished or choice.get("finish_reason") is not None
        if self._is_chat and "text" in choice:  # a resumed chat is a completion over there
            choice["delta"] = {"content": choice.pop("text")}
            return
        delta = choice.get("delta") or {}
        told = {name for name, value in delta.items() if value} - {"role", "content"}
        # Text without ids, or a part that a parser made, cannot be gone on with.
        text = delta.get("content") if self._is_chat else choice.get("text")
        if told or (text and not ids):
            self._is_whole = False

    def _take_prompt(self, holder: dict[str, Any]) -> None:
        ids = holder.pop("prompt_token_ids", None)
        self._prompt = self._prompt or ids or []

    def _usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Prompt and tokens counted once, whoever made them."""
        if not self._is_resumed:
            return usage
        made = self._told_before + int(usage.get("completion_tokens") or 0)
        return {
            **usage,
            "prompt_tokens": len(self._prompt),
            "completion_tokens": made,
            "total_tokens": len(self._prompt) + made,
        }


def _is_neutral(name: str, value: object) -> bool:
    """Whether a key is written with the value that it has anyway. `logprobs: 0` is not False."""
    if isinstance(value, bool) or value is None:
        return any(value is one for one in _NEUTRAL.get(name, ()))
    return any(value == one and not isinstance(one, bool) for one in _NEUTRAL.get(name, ()))


def _is_one_prompt(prompt: object) -> bool:
    return isinstance(prompt, str) or (
        isinstance(prompt, list) and bool(prompt) and all(isinstance(one, int) for one in prompt)
    )
