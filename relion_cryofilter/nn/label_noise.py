"""Labels that are wrong: how many, and what scores say of the particles behind the labels.

Scores of labelled good and labelled bad particles, from models that have not seen them, are two
mixtures of the same two distributions [1]_. Where bad particles alone have scores (the lower
tail), labelled good particles are as many as are wrong; with better scores the true good ones come
in, slowly at first: the share of labelled good below a score is a·f + c·f⁴, f that of labelled bad.
The tail's slope `a` is π₁ / (1 - π₀), π₁ the share of junk among the labelled good and π₀ that of
good ones among the labelled bad; the upper tail gives π₀ / (1 - π₁) in the same way.

Labels whose errors go with the image, as those of classes do, are learnt like any others: the
scores then agree with them, and no wrong ones are found.

.. [1] C. Scott, "A rate of convergence for mixture proportion estimation", AISTATS 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, nan
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from relion_cryofilter.errors import CryoFilterError
from relion_cryofilter.kinds import ThresholdRequest
from relion_cryofilter.thresholds import (
    DECIMALS,
    MAX_QUANTILES,
    Interval,
    OperatingCurve,
    choose_threshold,
)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

GRID = np.array([0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6])
POWER = 4
LOOK_ALIKE = 0.7
"""Some junk scores as high as good particles do, and looks like good ones labelled bad: on
correct labels the upper tail gave .4 to 1.1 (1 - AUC), in eight runs on four sets."""
FEWEST, LOWEST_AUC, MOST_WRONG = 50, 0.65, 0.4
FEWEST_ACCEPTED = 10  # or a precision is an accident of the best scores
RESAMPLES, BINS = 100, 200
TEMPERATURES, SHIFTS = np.geomspace(0.2, 5, 81), np.linspace(-4, 4, 161)


class Shares(NamedTuple):
    """π₁, junk among labelled good, and π₀, good among labelled bad; zeros: labels are true."""

    junk_among_good: float = 0.0
    good_among_bad: float = 0.0

    @property
    def left(self) -> float:
        """1 - π₁ - π₀, what wrong labels leave of a difference of the two kinds."""
        return 1 - self.junk_among_good - self.good_among_bad

    def auc(self, auc_of_labels: float) -> float:
        """Return the AUC of the particles behind the labels."""
        return min(1.0, 0.5 + (auc_of_labels - 0.5) / self.left)


@dataclass(frozen=True)
class LabelNoise:
    """How many labels look wrong.

    Attributes
    ----------
    junk_among_good, good_among_bad
        Shares with 95 % intervals over micrographs, nan of a single one; zeros where labels are
        taken as true.
    reason
        Why they are taken as true though they may not be; "" where the shares are estimates.
    """

    junk_among_good: Interval
    good_among_bad: Interval
    reason: str = ""

    @property
    def shares(self) -> Shares:
        """The two shares."""
        return Shares(self.junk_among_good.value, self.good_among_bad.value)

    @property
    def corrects(self) -> bool:
        """Whether particles behind the labels differ from the labels."""
        return sum(self.shares) > 0

    def describe(self) -> str:
        """Return what is known, as a sentence for the log."""
        if self.reason:
            return (
                f"How many labels are wrong can't be told ({self.reason}), so they are taken as "
                "true."
            )
        good, bad = (
            f"{100 * share.value:.0f} %"
            + (f" [{100 * share.low:.0f}, {100 * share.high:.0f}]" if isfinite(share.low) else "")
            for share in (self.junk_among_good, self.good_among_bad)
        )
        return (
            f"By the out-of-fold scores about {good} of the labelled good particles look like "
            f"junk, and {bad} of the labelled bad ones like particles."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the shares and the reason, for JSON."""
        return {
            "junk_among_good": self.junk_among_good.to_list(),
            "good_among_bad": self.good_among_bad.to_list(),
            "reason": self.reason,
        }

    @classmethod
    def unknown(cls, reason: str) -> LabelNoise:
        """Return that labels are taken as true, and why."""
        nothing = Interval(0.0, 0.0, 0.0)
        return cls(nothing, nothing, reason)


def measure_label_noise(
    scores: Floats, labels: Bools, clusters: NDArray[np.int64], seed: int
) -> LabelNoise:
    """Estimate the shares of wrong labels, with intervals that draw whole micrographs.

    Parameters
    ----------
    scores
        (n,) of models that have not seen the particles, on any scale.
    labels, clusters
        (n,) True for labelled good, and what each particle has neighbours in.
    seed
        Of the bootstrap.
    """
    reason = _doubt(*_cumulated(scores, labels, None))
    if reason:
        return LabelNoise.unknown(reason)
    shares = estimate(scores, labels)
    groups = np.unique(clusters, return_inverse=True)[1].reshape(-1)
    rng, n_groups, drawn = np.random.default_rng(seed), int(groups.max()) + 1, []
    if n_groups == 1:
        first, second = (Interval(share, nan, nan) for share in shares)
        return LabelNoise(first, second)
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)
        drawn.append(estimate(scores, labels, times[groups].astype(np.float64)))
    low, high = np.quantile(np.array(drawn), (0.025, 0.975), axis=0)
    first, second = (
        Interval(share, min(share, float(a)), max(share, float(b)))
        for share, a, b in zip(shares, low, high)
    )
    return LabelNoise(first, second)


def estimate(scores: Floats, labels: Bools, weights: Floats | None = None) -> Shares:
    """Return the shares of wrong labels, of (n,) scores that did not see their labels.

    Zeros where there is too little to tell: few labels, scores that hardly separate, or more
    wrong labels than could be told from a bad score.
    """
    good, bad = _cumulated(scores, labels, weights)
    return Shares() if _doubt(good, bad) else _shares(good, bad)


def _shares(good: Floats, bad: Floats) -> Shares:
    """Return the shares of wrong labels, of cumulated counts."""
    auc = _auc(good, bad)
    a = min(_slope(bad, good), 0.8)
    upper = _slope(bad=(good[-1] - good)[-2::-1], good=(bad[-1] - bad)[-2::-1])
    half = Shares(a, min(upper / 2, 0.9 - a))
    b = min(max(0.0, upper - LOOK_ALIKE * (1 - half.auc(auc))), 0.9)
    found = Shares(a * (1 - b) / (1 - a * b), b * (1 - a) / (1 - a * b))
    most = 2 * (1 - auc)  # or the AUC behind the labels were above 1
    if sum(found) > most:
        found = Shares(*(share * most / sum(found) for share in found))
    junk_among_good, good_among_bad = found
    return Shares(junk_among_good, min(good_among_bad, max(0.0, MOST_WRONG - junk_among_good)))


def _doubt(good: Floats, bad: Floats) -> str:
    """Return why nothing can be said, of cumulated counts; "" if something can."""
    fewest = min(good[-1], bad[-1])
    if fewest < FEWEST:
        return f"{fewest:.0f} labels of a kind are too few"
    auc = _auc(good, bad)
    if auc < LOWEST_AUC:
        return f"scores of AUC {auc:.2f} hardly tell the labels apart"
    if _shares(good, bad).junk_among_good > MOST_WRONG:
        return "more labels look wrong than could be told from bad scores"
    return ""


def recall_and_precision(
    scores: Floats, labels: Bools, shares: Shares
) -> tuple[Floats, Floats, Floats]:
    """Return rising thresholds and the recall and precision of true classes at each, (n,).

    F_good = ((1 - π₀) F_labelled-good - π₁ F_labelled-bad) / (1 - π₀ - π₁), made to rise.
    """
    order = np.argsort(scores, kind="stable")
    good, bad = _cumulated(scores, labels, None)
    n_good, n_bad = good[-1], bad[-1]
    # What is below each score; those that tie have the same below them.
    first = np.searchsorted(scores[order], scores[order], side="left")
    below = [np.concatenate([[0.0], counts])[first] for counts in (good, bad)]
    pi1, pi0 = shares
    lost = ((1 - pi0) * below[0] / n_good - pi1 * below[1] / n_bad) / shares.left
    up, down = np.maximum.accumulate(lost), np.minimum.accumulate(lost[::-1])[::-1]
    recall = 1 - np.clip((up + down) / 2, 0, 1)
    true_good = n_good * (1 - pi1) + n_bad * pi0
    return scores[order], recall, np.minimum(true_good * recall / (len(scores) - first), 1)


def threshold_behind(
    request: ThresholdRequest, scores: Floats, labels: Bools, shares: Shares
) -> float:
    """Return the threshold that fulfils a request for the particles behind the labels.

    As `choose_threshold`, which is called where the shares are zero or the request is not for a
    recall or a precision. `scores` (n,) have six decimals.

    Raises
    ------
    CryoFilterError
        The precision can't be reached.
    """
    if request.kind not in ("recall", "precision") or not sum(shares):
        return choose_threshold(request, scores, labels)
    cuts, recalls, precisions = recall_and_precision(scores, labels, shares)
    if request.kind == "recall":
        reached = np.flatnonzero(recalls >= request.value)
        return float(cuts[reached[-1]])
    usable = precisions[: max(1, len(cuts) - FEWEST_ACCEPTED + 1)]
    reached = np.flatnonzero(usable >= request.value)
    if not reached.size:
        best = int(usable.argmax())
        raise CryoFilterError(
            f"The threshold {request} can't be reached: the best precision of the particles behind "
            f"the labels is {usable[best]:.4f}, at a recall of {recalls[best]:.4f}. Ask for less, "
            "or for a recall."
        )
    return float(cuts[reached[0]])


def curve_behind(
    scores: Floats, labels: Bools, clusters: NDArray[np.int64], shares: Shares
) -> OperatingCurve:
    """Return recall and precision at every threshold, of the particles behind the labels."""
    if not sum(shares):
        return OperatingCurve.from_scores(labels, scores, clusters)
    # The other kind is the same with both signs turned.
    n, junk, good = len(scores), *shares
    n_good = round(labels.sum() * (1 - junk) + (~labels).sum() * good)
    cuts, recalls, _ = recall_and_precision(scores, labels, shares)
    turned, kept, _ = recall_and_precision(-scores, ~labels, Shares(good, junk))
    below, up_to = 1 - recalls, kept[::-1]  # of the good; of the bad
    highest, lowest = np.append(np.diff(below) > 0, True), np.append(True, np.diff(up_to) > 0)
    sides = []
    for count, values, shares_there in (
        (n_good, cuts[highest], below[highest]),
        (n - n_good, -turned[::-1][lowest], up_to[lowest]),
    ):
        levels = np.linspace(0, 1, min(count, MAX_QUANTILES))
        quantiles = np.interp(levels, shares_there, values)
        sides.append(tuple(np.round(quantiles, DECIMALS).tolist()))
    return OperatingCurve(sides[0], sides[1], n_good, n - n_good, len(np.unique(clusters)))


def calibrate(logits: Floats, labels: Bools, shares: Shares) -> tuple[float, float]:
    """Return temperature and shift: sigmoid(logit / temperature + shift) is P(truly good).

    The likeliest for the labels as they are, wrong ones and all (forward correction: Patrini et
    al., CVPR 2017). Of 200 bins of equal numbers.
    """
    bins = np.array_split(np.argsort(logits, kind="stable"), min(BINS, len(logits)))
    middle = np.array([logits[rows].mean() for rows in bins])
    n_good = np.array([labels[rows].sum() for rows in bins])
    n_all = np.array([len(rows) for rows in bins])
    good, bad = float(labels.sum()), float((~labels).sum())
    pi1, pi0 = shares
    missed = bad * pi0 / (good * (1 - pi1) + bad * pi0)  # of the good, labelled bad
    let_in = good * pi1 / (good * pi1 + bad * (1 - pi0))  # of the bad, labelled good
    best = (np.inf, 1.0, 0.0)
    for temperature in TEMPERATURES:
        moved = middle / temperature + SHIFTS[:, None]
        p = 1 / (1 + np.exp(-np.clip(moved, -40, 40)))
        p = np.clip(p * (1 - missed) + (1 - p) * let_in, 1e-6, 1 - 1e-6)
        losses = -(n_good * np.log(p) + (n_all - n_good) * np.log(1 - p)).sum(axis=1)
        k = int(losses.argmin())
        best = min(best, (float(losses[k]), float(temperature), float(SHIFTS[k])))
    return best[1], best[2]


def _cumulated(scores: Floats, labels: Bools, weights: Floats | None) -> tuple[Floats, Floats]:
    """Return how many labelled good and how many bad have each score or less, (n,) rising."""
    order = np.argsort(scores, kind="stable")
    each = np.ones(len(scores)) if weights is None else weights[order]
    return np.cumsum(each * labels[order]), np.cumsum(each * ~labels[order])


def _auc(good: Floats, bad: Floats) -> float:
    """Return the AUC of cumulated counts."""
    return float((np.diff(good, prepend=0) * bad).sum() / (good[-1] * bad[-1]))


def _slope(bad: Floats, good: Floats) -> float:
    """Return a of good = a·f + c·f⁴, f the share of bad; both cumulated from the tail on.

    Least squares of the increments, which are independent, by their binomial errors; a, c >= 0.
    """
    n = good[-1]
    at = np.minimum(np.searchsorted(bad, GRID * bad[-1]), len(good) - 1)
    found = np.diff(good[at] / n, prepend=0)
    terms = np.stack([np.diff(GRID, prepend=0), np.diff(GRID**POWER, prepend=0)])
    variance, a = (found + 1 / n) / n, 0.0
    for _ in range(3):
        x, y = terms / np.sqrt(variance), found / np.sqrt(variance)
        gram, moment = x @ x.T, x @ y
        a, c = np.linalg.solve(gram, moment)
        if a < 0:
            a, c = 0.0, moment[1] / gram[1, 1]
        elif c < 0:
            a, c = moment[0] / gram[0, 0], 0.0
        variance = (np.array([a, c]) @ terms + 0.5 / n) / n
    return float(a)
