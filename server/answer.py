"""One answer in the making, from the tokens of a request to the increments of its client. Pure: time is passed in."""

from __future__ import annotations

from server.errors import ServingError
from server.request import FinishReason, Request, TokenLogprob
from server.request_stream import Increment, Mailbox, StopKind
from server.stop_checker import StopChecker
from server.tokenizer import Tokenizer


class Answer:
    """Turns tokens into text, looks for stop strings, and fills the client's mailbox."""

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.request = request
        self.mailbox = Mailbox()
        self._tokenizer = tokenizer
        self._decoder = tokenizer.incremental_decoder()
        self._stops = StopChecker(request.params.stop)
        self._prompt_tokens: tuple[TokenLogprob, ...] = ()
        if request.params.prompt_logprobs:
            self.add_prompt_tokens([self.token(request.prompt_ids[0], None)])

    def token(self, token_id: int, logprob: float | None, top: tuple[tuple[int, float], ...] = ()) -> TokenLogprob:
        """A token with its own text."""
        return TokenLogprob(
            token_id=token_id,
            text=self._tokenizer.token_text(token_id),
            special=self._tokenizer.is_special(token_id),
            logprob=logprob,
            top=top,
        )

    def add_prompt_tokens(self, tokens: list[TokenLogprob]) -> None:
        """More of the prompt's tokens, to be sent with the first token of the answer."""
        self._prompt_tokens += tuple(tokens)

    def add_token(self, token: TokenLogprob, reason: FinishReason | None) -> FinishReason | None:
        """Pass on the answer's next token. ``reason``: why the scheduler ended the request with it, if it did.

        Returns why the answer ends here: a stop string in the text ends it where the scheduler did not.
        """
        text = "" if reason == "stop" else self._decoder.feed((token.token_id,))
        if reason:
            text += self._decoder.flush()
        text = self._stops.feed(text)
        if self._stops.stopped:
            reason = "stop"
        elif reason:
            text += self._stops.flush()
        self.mailbox.put(
            Increment(
                text=text,
                tokens=(token,),
                prompt_tokens=self._prompt_tokens,
                finish_reason=reason,
                stop_kind=self._stop_kind(token, reason),
            )
        )
        self._prompt_tokens = ()
        return reason

    def abort(self) -> None:
        """End the answer with what there is."""
        self.mailbox.put(Increment(text=self._rest(), finish_reason="abort"))

    def cut(self) -> None:
        """End the answer with what there is, as one that has become too long."""
        self.mailbox.put(Increment(text=self._rest(), finish_reason="length", stop_kind="length"))

    def fail(self, error: ServingError) -> None:
        """End the answer with an error after what there is."""
        if rest := self._rest():
            self.mailbox.put(Increment(text=rest))
        self.mailbox.fail(error)

    def _rest(self) -> str:
        text = self._stops.feed(self._decoder.flush())
        return text + self._stops.flush()

    def _stop_kind(self, token: TokenLogprob, reason: FinishReason | None) -> StopKind | None:
        if self._stops.stopped:
            return "stop_string"
        if reason == "stop":
            is_eos = token.token_id in self._tokenizer.eos_token_ids and not self.request.params.ignore_eos
            return "eos" if is_eos else "stop_token"
        return "length" if reason else None
