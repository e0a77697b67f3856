"""Routing configurations of rows: which experts were chosen, and the name that the data give the configuration.

Dimensions: n rows, E experts.
"""

import numpy as np

from moe_posterior.prediction import ConfigurationName

__all__ = ["MOST", "Routes"]

MOST = 4_096  # beyond those met first, configurations are not told apart
_NARROW = 40  # experts whose choice fits into one integer, beside the number of a name


class Routes:
    """Numbers of configurations, in the order in which they are met; those beyond :data:`MOST` share the number ``MOST``."""

    def __init__(self) -> None:
        self.names: list[ConfigurationName] = []
        self._number: dict[ConfigurationName, int] = {}

    def codes(self, weights: np.ndarray | None, named: np.ndarray | None, names: list) -> np.ndarray:  # -> (n,) int64
        """The configuration of each row.

        Args:
            weights: (n, E); the experts with a weight above 0 are the chosen ones.
            named: (n,) into ``names``: the configurations that the data name, for instance clusters.
            names: those names.
        """
        chosen = np.zeros((len(named) if named is not None else 0, 0), bool) if weights is None else weights > 0
        width = chosen.shape[1]
        which = np.zeros(len(chosen), np.int64) if named is None else named
        if width <= _NARROW:
            powers = np.int64(1) << np.arange(width, dtype=np.int64)
            _, first, index = np.unique(which * (1 << width) + chosen @ powers, return_index=True, return_inverse=True)
        else:
            packed = np.hstack([np.packbits(chosen, axis=1), which[:, None].view(np.uint8).reshape(-1, 8)])
            keys = np.ascontiguousarray(packed).view(f"V{packed.shape[1]}").reshape(-1)
            _, first, index = np.unique(keys, return_index=True, return_inverse=True)
        numbers = np.empty(len(first), np.int64)
        for place in np.argsort(first):  # numbered as they are met
            row = int(first[place])
            cluster = None if named is None else names[int(which[row])]
            numbers[place] = self._numbered((cluster, tuple(np.flatnonzero(chosen[row]).tolist())))
        return numbers[index.reshape(-1)]

    def _numbered(self, name: ConfigurationName) -> int:
        if name not in self._number:
            if len(self.names) >= MOST:
                return MOST
            self._number[name] = len(self.names)
            self.names.append(name)
        return self._number[name]
