"""The tolerance of a comparison, from how much runs differ that should be equal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist, median
from typing import Final

from .laws import mean_of, predicted_ratio, value_of
from .profile import SegmentProfile

# One kind of layer may be off by more than all kinds together: it follows what it learns, which the laws do not know. In pairs
# of real runs under their rule, at four times the width, single kinds were off by up to 1.8, and the median by up to 1.13.
ONE_KIND: Final = 1.25
PER_OCTAVE: Final = 1.15  # for each octave between the widths, a single kind may be off by so much more
# A comparison in which nothing is wrong names a difference with this probability, over all that it judges.
FALSE_ALARM: Final = 0.05

Type = tuple[str, str]  # role, and name with layer numbers as `*`; or the whole name, when compared layer by layer
Types = Mapping[Type, Sequence[SegmentProfile]]


class Calibration:
    """Tolerances for every statistic and type of segment, from the spread over several proxies.

    The proxies are seeds of one setting, or runs at several widths. Of each proxy, the part that learning rates, weight
    decays and widths predict is taken out. What remains is noise. Its variance is pooled over all types of segments, for
    each statistic by itself. A target differs from the mean of k proxies by noise of sqrt(1 + 1/k) times that size, if its
    noise is as large as theirs. The tolerance is so many of these standard deviations that a comparison names anything
    with a probability of 5 % when nothing is wrong. A type gets at least the factor between its own extreme proxies.

    Args:
        proxies: the segments by type of every proxy.
        statistics: the statistics that are compared.
        floor: the smallest tolerance of the median over all types, a factor above 1.
        after: number of tau after which a type is judged.
        octaves: octaves between the widths of the proxies and of the target. The smallest tolerance of a single type is
            floor * ONE_KIND * PER_OCTAVE^octaves.

    Attributes:
        count: the number of proxies.
    """

    def __init__(
        self, proxies: Sequence[Types], statistics: Sequence[str], floor: float, after: float, octaves: float = 0.0
    ) -> None:
        self.count, self._median = len(proxies), floor
        self._floor = floor * ONE_KIND * float(PER_OCTAVE**octaves)
        self._common: dict[str, float] = {}
        self._own: dict[tuple[Type, str], float] = {}
        self._pooled: dict[str, float] = {}
        if self.count < 2:
            return
        types = [key for key in proxies[0] if all(key in other for other in proxies)]
        judged = [key for key in types if all(x.taus >= after for proxy in proxies for x in proxy[key])]
        rests = {
            (key, statistic): rest
            for key in judged
            for statistic in statistics
            if (rest := _rest([proxy[key] for proxy in proxies], statistic))
        }
        for statistic in statistics:
            some = [rest for (_, name), rest in rests.items() if name == statistic]
            if some:
                freedom = len(some) * (self.count - 1)
                sigma = math.sqrt(math.fsum(x * x for rest in some for x in rest) / freedom)
                far = student(1 - FALSE_ALARM / (2 * len(rests)), freedom)
                middles = [median(rest[i] for rest in some) for i in range(self.count)]
                self._common[statistic] = math.exp(max(middles) - min(middles))
                self._pooled[statistic] = math.exp(min(far * sigma * math.sqrt(1 + 1 / self.count), 700.0))
        self._own = {place: math.exp(max(rest) - min(rest)) for place, rest in rests.items()}

    def tolerance(self, key: Type, statistic: str) -> float:
        """Return the factor by which the ratio of one type may differ from the prediction.

        Args:
            key: role and name of the type.
            statistic: name of the statistic.
        """
        return max(self._floor, self._pooled.get(statistic, 1.0), self._own.get((key, statistic), 1.0))

    def of_median(self, statistic: str) -> float:
        """Return the factor by which the median of the ratios of all types may differ from the prediction.

        Args:
            statistic: name of the statistic.
        """
        return max(self._median, self._common.get(statistic, 1.0))

    def __str__(self) -> str:
        """Return the tolerances in words."""
        usual = f"tolerance {self._median:.3g} for the median, {self._floor:.3g} for one kind"
        if not self._pooled:
            return usual
        wide = [f"{name} {value:.3g}" for name, value in self._pooled.items() if value > self._floor]
        more = f"; {', '.join(wide)} from the spread of {self.count} proxies" if wide else ""
        return usual + (more or f", more than the spread of {self.count} proxies asks for")


def _rest(proxies: Sequence[Sequence[SegmentProfile]], statistic: str) -> list[float]:
    """Return what no law predicts of the logarithm of a statistic in each proxy, around 0. Empty if it is not known."""
    logs = []
    for segments in proxies:
        value = mean_of(value_of(statistic), segments)
        predicted = predicted_ratio(statistic, proxies[0], segments)
        if not (value > 0 and predicted > 0):
            return []
        logs.append(math.log(value / predicted))
    middle = math.fsum(logs) / len(logs)
    return [x - middle for x in logs]


def student(probability: float, freedom: int) -> float:
    """Return a quantile of Student's distribution, to 1 % for 3 or more degrees of freedom and up to 0.999.

    It is the expansion of Cornish and Fisher around the normal quantile. For 1 and 2 degrees of freedom it is exact.

    Args:
        probability: between 0.5 and 1.
        freedom: number of degrees of freedom.
    """
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        u = 2 * probability - 1
        return u * math.sqrt(2 / (1 - u * u))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom ** (i + 1) for i, term in enumerate(terms))
