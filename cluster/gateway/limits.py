"""What the requests of one tenant have used of this gateway, held against its limits.

Hop 2, and pure: the clock is passed in. Token buckets: each fills at its rate up to one burst. Requests are paid when
they come; tokens are paid when their number is known, so that a bucket may fall below nothing, and whoever comes next
waits until it is paid back. Three numbers and a count per tenant, whatever it sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.errors import LimitReached
from cluster.keys import TenantLimits

MINUTE_S = 60.0
ROUNDING = 1e-6
STREAM_RETRY_S = 1.0
"""After how long to try again where streams must end first: nobody knows when they do."""


class Bucket:
    """An amount that fills up again."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._level = burst
        self._at_s: float | None = None

    def wait_s(self, needed: float, now_s: float) -> float:
        """Seconds until it holds so much; 0 where it does."""
        missing = needed - self._fill(now_s)
        # Who waited as long as it was told must not be refused for a rounding error.
        return missing / self._per_s if missing > ROUNDING else 0.0

    def take(self, amount: float, now_s: float) -> None:
        """Also what it does not hold."""
        self._level = self._fill(now_s) - amount

    def changed(self, per_s: float, burst: float, now_s: float) -> Bucket:
        """The same debt or savings at another rate."""
        bucket = Bucket(per_s, burst)
        bucket.take(max(0.0, self._burst - self._fill(now_s)), now_s)
        return bucket

    def _fill(self, now_s: float) -> float:
        if self._at_s is not None:
            self._level = min(self._burst, self._level + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        return self._level


class Allowance:
    """The use of one tenant."""

    def __init__(
        self,
        tenant: str,
        limits: TenantLimits,
        clock: Callable[[], float],
        on_refused: Callable[[str], object] = lambda _limit: None,
    ) -> None:
        self.num_streams = 0
        """Generations under way."""
        self._tenant = tenant
        self._limits = limits
        self._clock = clock
        self._on_refused = on_refused
        self._buckets = {name: Bucket(*rate) for name, rate in _rates(limits).items()}

    @property
    def limits(self) -> TenantLimits:
        return self._limits

    def change_limits(self, limits: TenantLimits) -> None:
        """What was used counts against the new ones."""
        now_s, old = self._clock(), self._buckets
        self._limits = limits
        self._buckets = {
            name: old[name].changed(*rate, now_s) if name in old else Bucket(*rate)
            for name, rate in _rates(limits).items()
        }

    def count_request(self) -> None:
        """A request that starts no generation. Raises LimitReached."""
        self._check("requests", 1.0, f"{self._limits.max_requests_per_s} requests a second")
        self._take("requests", 1.0)

    @contextmanager
    def streams(self, count: int) -> Iterator[None]:
        """A request that starts so many generations; inside, they run. Raises LimitReached, and takes nothing then."""
        limits = self._limits
        self._check("prompt", 1.0, f"{limits.max_prompt_tokens_per_min} prompt tokens a minute")
        self._check("output", 1.0, f"{limits.max_output_tokens_per_min} output tokens a minute")
        if limits.max_streams is not None and self.num_streams + count > limits.max_streams:
            self._on_refused("streams")
            raise LimitReached(
                f"{self._tenant}: {self.num_streams} generations are under way and {count} more are over the limit of "
                f"{limits.max_streams}; try again when some have ended",
                limit="streams",
                retry_after_s=STREAM_RETRY_S,
            )
        self.count_request()
        self.num_streams += count
        try:
            yield
        finally:
            self.num_streams -= count

    def charge_prompt(self, num_tokens: int) -> None:
        """Tokens of a prompt, once a request."""
        self._take("prompt", num_tokens)

    def charge_output(self, num_tokens: int) -> None:
        """Tokens that were generated."""
        self._take("output", num_tokens)

    def _check(self, name: str, needed: float, words: str) -> None:
        bucket = self._buckets.get(name)
        if bucket is not None and (wait_s := bucket.wait_s(needed, self._clock())) > 0:
            self._on_refused(name)
            raise LimitReached(
                f"{self._tenant}: the limit is {words}; try again in {wait_s:.3g} s", limit=name, retry_after_s=wait_s
            )

    def _take(self, name: str, amount: float) -> None:
        if (bucket := self._buckets.get(name)) is not None:
            bucket.take(amount, self._clock())


def _rates(limits: TenantLimits) -> dict[str, tuple[float, float]]:
    """Per second, and the burst: a second's requests, but one at least; a minute's tokens."""
    rates: dict[str, tuple[float, float]] = {}
    if (per_s := limits.max_requests_per_s) is not None:
        rates["requests"] = per_s, max(1.0, per_s)
    if (prompt := limits.max_prompt_tokens_per_min) is not None:
        rates["prompt"] = prompt / MINUTE_S, float(prompt)
    if (output := limits.max_output_tokens_per_min) is not None:
        rates["output"] = output / MINUTE_S, float(output)
    return rates
