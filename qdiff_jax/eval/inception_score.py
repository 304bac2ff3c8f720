"""Inception score: how sharp and how varied the class posteriors of generated images are.

    IS = exp( mean_x KL( p(y|x) || p(y) ) ),   p(y) = mean_x p(y|x)

(Salimans et al. 2016, arXiv:1606.03498, section 4), within each split of the samples, averaged over
splits. The value depends on the size of a split and, for samples ordered by class, on whether they are
shuffled first; published tools differ in both, so both are arguments.

With h = sum_x sum_y p log p and s(y) = sum_x p(y|x) over the n samples of a split,

    log IS = h / n - sum_y q log q,   q = s / n,

so that a split is one number and one vector, in float64, however many samples it has. Kept for each
split and group of samples, the same sums give the score without any group, and with it the jackknife's
interval (`intervals.score_interval`); the spread over the splits, which the tools print, is none.
"""

from typing import NamedTuple

import numpy as np


class InceptionScore(NamedTuple):
    mean: float
    std: float  # over the splits, divided by their number
    splits: np.ndarray  # [S] float64


class ScoreState(NamedTuple):
    """Sums of each split; the leading axis is the split."""

    counts: np.ndarray  # [S] int64
    posteriors: np.ndarray  # [S, C] float64: sum of p(y|x)
    negentropy: np.ndarray  # [S] float64: sum of p log p


def split_index(
    count: int,
    *,
    splits: int | None = 10,
    split_size: int | None = None,
    shuffle: bool = True,
    seed: int = 2020,
) -> np.ndarray:
    """[count] int64: the split that each sample, in the order of the files, belongs to.

    Args:
      count: how many samples there will be.
      splits: that many splits whose sizes differ by at most one (torch-fidelity: 10).
      split_size: instead of `splits`, splits of this size, the last one of what is left (ADM: 5000).
      shuffle: permute first with numpy's legacy generator and `seed` (torch-fidelity: 2020), or take
        the order as it is (ADM).

    Raises ValueError when neither or both of splits and split_size are given, or they do not fit.
    """
    if (splits is None) == (split_size is None):
        raise ValueError("inception score: give either splits or split_size, and not both.")
    if split_size is not None:
        if not 1 <= split_size:
            raise ValueError(f"inception score: split_size={split_size} must be positive.")
        place = np.arange(count) // split_size
    else:
        if not 1 <= splits <= count:
            raise ValueError(f"inception score: {count} samples do not make {splits} splits.")
        ends = [(i + 1) * count // splits for i in range(splits)]
        place = np.searchsorted(ends, np.arange(count), side="right")
    if not shuffle:
        return place
    index = np.empty_like(place)
    # Sample permutation[j] stands at place j of the shuffled order.
    index[np.random.RandomState(seed).permutation(count)] = place
    return index


def grouped_index(split: np.ndarray, groups: int, seed: int = 0) -> np.ndarray:
    """[count] int64: `split * groups + group`, the row of sums that serve the jackknife too.

    Args:
      split: [count], from `split_index`.
      groups: of the jackknife. Every split is dealt out evenly over them, at random, since samples may
        come ordered by class.
      seed: of the deal.
    """
    order = np.random.default_rng(seed).permutation(len(split))
    order = order[np.argsort(split[order], kind="stable")]
    group = np.empty_like(split)
    group[order] = np.arange(len(split)) % groups
    return split * groups + group


def empty_groups(index: np.ndarray, groups: int, classes: int) -> ScoreState:
    """No samples yet, with a row for every split and group of `index` [count], from `grouped_index`."""
    return init((int(index.max()) // groups + 1) * groups, classes)


def without_groups(state: ScoreState, groups: int) -> tuple[InceptionScore, np.ndarray]:
    """The score, and [groups] float64: the score without each group.

    state: sums whose rows are those of `grouped_index`. A split that lies in one group alone keeps its
    own score where that group is left out. Raises ValueError as `finish` does.
    """
    parts = ScoreState(*(field.reshape(-1, groups, *field.shape[1:]) for field in state))
    whole = ScoreState(*(field.sum(axis=1) for field in parts))
    score, without = finish(whole), np.zeros((groups,))
    for group in range(groups):
        rest = ScoreState(*(total - part[:, group] for total, part in zip(whole, parts)))
        some = rest.counts > 0
        left = np.where(some, 1.0, score.splits)
        left[some] = finish(ScoreState(*(field[some] for field in rest))).splits
        without[group] = left.mean()
    return score, without


def init(splits: int, classes: int) -> ScoreState:
    """No samples yet."""
    return ScoreState(
        np.zeros((splits,), np.int64), np.zeros((splits, classes)), np.zeros((splits,))
    )


def update(state: ScoreState, logits, split: np.ndarray) -> ScoreState:
    """Adds a batch of logits [B, C] (floating) of samples in the splits `split` [B]."""
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or logits.shape[1] != state.posteriors.shape[1]:
        raise ValueError(
            f"inception score: logits are {logits.shape}, expected [B, {state.posteriors.shape[1]}]."
        )
    if not np.isfinite(logits).all():
        raise ValueError("inception score: a logit is not finite; look at the images first.")
    logits = logits - logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    counts, posteriors, negentropy = (field.copy() for field in state)
    np.add.at(counts, split, 1)
    np.add.at(posteriors, split, p)
    np.add.at(negentropy, split, (p * log_p).sum(axis=1))
    return ScoreState(counts, posteriors, negentropy)


def finish(state: ScoreState) -> InceptionScore:
    """The score of each split and their mean. Raises ValueError when a split has no sample."""
    if (state.counts == 0).any():
        raise ValueError("inception score: a split has no samples; every sample must be given.")
    counts = state.counts[:, None]
    # Differences of sums may leave a rounding error below 0.
    marginal = np.maximum(state.posteriors, 0.0) / counts
    # p(y) underflows to 0 only where every p(y|x) does, and 0 log 0 is 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.where(marginal > 0, marginal * np.log(marginal), 0.0).sum(axis=1)
    scores = np.exp(state.negentropy / state.counts - entropy)
    return InceptionScore(float(scores.mean()), float(scores.std()), scores)


def inception_score(
    logits,
    *,
    splits: int | None = 10,
    split_size: int | None = None,
    shuffle: bool = True,
    seed: int = 2020,
    batch: int = 4096,
) -> InceptionScore:
    """The inception score of logits [N, C], in the order of the files.

    The defaults are torch-fidelity's; `splits=None, split_size=5000, shuffle=False` are ADM's. The
    tools take logits without the bias of the last layer. See `split_index` for the arguments and what
    raises.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or len(logits) == 0:
        raise ValueError(f"inception score takes logits [N, C], got {logits.shape}.")
    index = split_index(
        len(logits), splits=splits, split_size=split_size, shuffle=shuffle, seed=seed
    )
    state = init(int(index.max()) + 1, logits.shape[1])
    for start in range(0, len(logits), batch):
        part = slice(start, start + batch)
        state = update(state, logits[part], index[part])
    return finish(state)
