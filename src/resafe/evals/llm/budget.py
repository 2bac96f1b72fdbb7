"""Money: an estimate before the first request, and a limit that no request can cross. Knows no endpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass

from resafe.errors import InputError


@dataclass(frozen=True)
class Prices:
    """What a million tokens cost, in any currency; given by the user, since prices change."""

    input: float
    output: float

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """The cost of that many tokens."""
        return (input_tokens * self.input + output_tokens * self.output) / 1e6


@dataclass(frozen=True)
class Estimate:
    """What judging would cost at most.

    Attributes:
        requests: Requests that would be sent; what is in the cache is not.
        cached: Requests answered from the cache.
        input_tokens: Of all prompts, from their length in bytes (see `estimated_tokens`).
        output_tokens: If every reply were as long as it may be.
        cost: At the user's prices; None without prices.
    """

    requests: int
    cached: int
    input_tokens: int
    output_tokens: int
    cost: float | None

    def __str__(self) -> str:
        money = "" if self.cost is None else f", at most {self.cost:.4g} at the prices given"
        return (
            f"{self.requests} requests ({self.cached} more are cached), about {self.input_tokens} tokens in, "
            f"at most {self.output_tokens} out{money}"
        )


class Ledger:
    """What was spent and what requests under way may still cost, against a limit."""

    def __init__(self, prices: Prices | None, limit: float | None) -> None:
        if limit is not None and prices is None:
            raise InputError("max_cost is given, but no prices", "give price_in and price_out per million tokens")
        self.prices = prices
        self.limit = limit
        self.spent = 0.0
        self._held = 0.0
        self._open = 0

    @property
    def waiting(self) -> bool:
        """Whether a request is under way whose cost is not known yet."""
        return self._open > 0

    def hold(self, input_tokens: int, output_tokens: int) -> float | None:
        """Sets aside what a request may cost; None where that would cross the limit."""
        cost = self.prices.cost(input_tokens, output_tokens) if self.prices else 0.0
        if self.limit is not None and self.spent + self._held + cost > self.limit * (1 + 1e-12):
            return None
        self._held += cost
        self._open += 1
        return cost

    def settle(self, held: float, spent: float) -> None:
        """Gives back what was set aside and books what was spent."""
        self._held -= held
        self._open -= 1
        self.spent += spent

    def check(self, estimate: Estimate) -> None:
        """Refuses to start what may not end within the limit.

        Raises:
            InputError: The estimate, with what is spent already, is over the limit.
        """
        if self.limit is None or estimate.cost is None or self.spent + estimate.cost <= self.limit:
            return
        raise InputError(
            f"judging may cost {estimate.cost:.4g}, with {self.spent:.4g} spent already, and max_cost is "
            f"{self.limit:.4g}: nothing was sent ({estimate})",
            "raise max_cost, judge fewer responses, choose a cheaper model, or lower max_tokens",
        )


def estimated_tokens(text: str) -> int:
    """Tokens of a text, on the high side: a token for every three bytes of UTF-8.

    English has about four bytes a token; Chinese has three bytes a character and at most about a token for each.
    """
    return math.ceil(len(text.encode("utf-8", "surrogatepass")) / 3)
