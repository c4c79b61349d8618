"""Tokens that passes over chains and trees commit, as the adaptive policy expects them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dflash_plugin.adaptive.acceptance_rates import MEMORY, PRIOR, AcceptanceRates


class TreeTokens:
    """Learns from outcomes what rows beside the chain gain.

    The rows of a tree are in the order of their weight. So a pass tells, too, what a tree of fewer
    rows would have gained. Before anything is known a tree gains nothing.

    Args:
        num_drafts: K.
        sizes: numbers of rows beside the chain, rising.

    Attributes:
        chain: acceptance of chains.
        passes: judged passes of each size, older ones faded.
        gained: tokens that they committed beyond the chain's.
    """

    def __init__(self, num_drafts: int, sizes: Sequence[int]) -> None:
        self.num_drafts = num_drafts
        self.sizes = tuple(sizes)
        self.chain = AcceptanceRates(num_drafts)
        self.passes = dict.fromkeys(self.sizes, 0.0)
        self.gained = dict.fromkeys(self.sizes, 0.0)

    def observe_chain(self, verified: int, accepted: Iterable[int]) -> None:
        """Learn from a pass over chains; arguments of ``AcceptanceRates.observe``."""
        self.chain.observe(verified, accepted)

    def observe_trees(self, size: int, paths: Sequence[Sequence[int]]) -> None:
        """Learn from a pass over trees.

        Args:
            size: rows beside the chain.
            paths: accepted rows of each request's tree, in order.
        """
        on_chain = [reached(path, self.num_drafts) for path in paths]
        self.chain.observe(self.num_drafts, on_chain)
        keep = max(0.0, 1.0 - len(paths) / MEMORY)
        for judged in self.sizes:
            if judged > size:
                break
            with_tree = sum(reached(path, self.num_drafts + judged) for path in paths)
            self.passes[judged] = keep * self.passes[judged] + len(paths)
            self.gained[judged] = keep * self.gained[judged] + with_tree - sum(on_chain)

    def expected(self) -> list[float]:
        """Tokens that a request commits in a pass of 1, 2, … rows.

        Rows beside the chain count where they make one of the sizes.
        """
        found = self.chain.expected()
        whole = found[-1]
        for size in self.sizes:
            found += [found[-1]] * (self.num_drafts + size - len(found))
            # More rows never gain less than fewer, however few passes have judged them.
            gain = self.gained[size] / (self.passes[size] + PRIOR)
            found.append(max(found[-1], whole + gain))
        return found


def reached(path: Sequence[int], last_row: int) -> int:
    """How many tokens a tree without the rows behind ``last_row`` would have accepted.

    Args:
        path: accepted rows, in order.
        last_row: the last row that counts.
    """
    return next((depth for depth, row in enumerate(path) if row > last_row), len(path))
