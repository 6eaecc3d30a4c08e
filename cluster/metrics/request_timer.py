"""The times and counts of one generation, told message by message."""

from __future__ import annotations

import time

from cluster.metrics.gateway import GatewayMetrics


class RequestTimer:
    """Tells a gateway's metrics what becomes of a generation."""

    def __init__(self, metrics: GatewayMetrics, tenant: str = "") -> None:
        self._metrics = metrics
        self._tenant = tenant
        self._start_s = time.perf_counter()
        self._last_s: float | None = None
        self._thinking_start_s: float | None = None
        """None: it does not think, or not yet."""
        self._num_thinking = 0
        self._num_answer = 0

    def sibling(self) -> RequestTimer:
        """For another generation of the same request."""
        timer = RequestTimer(self._metrics, self._tenant)
        timer._start_s = self._start_s
        return timer

    def on_resumed(self, num_thinking: int, num_answer: int) -> None:
        """So many tokens were generated in an earlier call."""
        self._last_s, self._num_thinking, self._num_answer = time.perf_counter(), num_thinking, num_answer

    def on_admitted(self, prompt_tokens: int, cached_tokens: int) -> None:
        """The generation took a slot."""
        metrics = self._metrics
        metrics.prompt_tokens.inc(self._tenant, by=prompt_tokens)
        metrics.cached_prompt_tokens.inc(self._tenant, by=cached_tokens)
        metrics.request_prompt_tokens.observe(prompt_tokens)

    def on_tokens(self, num_thinking: int, num_answer: int) -> None:
        """Totals of the generation after a message with new tokens."""
        new_thinking, new_answer = num_thinking - self._num_thinking, num_answer - self._num_answer
        if new_thinking + new_answer == 0:
            return
        now_s, metrics = time.perf_counter(), self._metrics
        if self._last_s is None:
            metrics.time_to_first_token.observe(now_s - self._start_s)
        else:
            metrics.inter_token_latency.observe((now_s - self._last_s) / (new_thinking + new_answer))
        if new_thinking:
            if self._thinking_start_s is None:
                self._thinking_start_s = now_s
            metrics.generation_tokens.inc("thinking", self._tenant, by=new_thinking)
        if new_answer:
            if self._num_answer == 0:
                metrics.time_to_first_answer.observe(now_s - self._start_s)
            metrics.generation_tokens.inc("answer", self._tenant, by=new_answer)
        self._last_s, self._num_thinking, self._num_answer = now_s, num_thinking, num_answer

    def on_thinking_ended(self, reason: str, num_forced: int) -> None:
        """The thoughts ended; `num_forced` tokens of the output were forced to end them."""
        self._metrics.thinking_ended.inc(reason)
        self._metrics.forced_tokens.inc(by=num_forced)
        if self._thinking_start_s is not None:
            self._metrics.thinking_time.observe(time.perf_counter() - self._thinking_start_s)

    def on_finished(self, finish_reason: str, phase: str) -> None:
        """The generation ended well."""
        metrics = self._metrics
        metrics.requests_finished.inc(finish_reason, phase, self._tenant)
        metrics.e2e_request_latency.observe(time.perf_counter() - self._start_s)
        metrics.thinking_tokens.observe(self._num_thinking)
        metrics.answer_tokens.observe(self._num_answer)

    def on_failed(self, code: str) -> None:
        """The request ended with a status code other than OK."""
        self._metrics.requests_failed.inc(code, self._tenant)
