"""Three probes that must lose: TF-IDF of the answer's words, the answer's length, and the monitor
on shuffled labels.

    others = baselines(features, texts, lengths, labels, groups, fitted)
    # what the words alone can tell
    stats.auroc(others.text[evaluation], labels[evaluation])

When the words alone tell safe from unsafe as well as the activations do, the monitor may be reading
words; when shuffled labels are told apart, something leaks. All three are fitted on the monitor's
own training split.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from auditgap.probes.fit import Fitted, fit, logits_of


@dataclass(frozen=True, eq=False)
class Baselines:
    """Scores [n] of every example, larger = more unsafe; nan where a baseline could not be
    fitted."""

    text: np.ndarray
    length: np.ndarray
    shuffled: np.ndarray


def text_scores(texts: Sequence[str], labels: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Log-odds [n] of TF-IDF (words and word pairs) with logistic regression, fitted on rows
    `train`; nan without words."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    features = TfidfVectorizer(
        ngram_range=(1, 2), sublinear_tf=True, min_df=1, token_pattern=r"(?u)\b\w+\b"
    )
    try:
        seen = features.fit_transform([texts[i] for i in train])
    except ValueError:  # no answer holds a word
        return np.full(len(texts), np.nan)
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=2000).fit(
        seen, labels[train]
    )
    return model.decision_function(features.transform(texts))


def length_scores(lengths: Sequence[int], labels: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Log-odds [n] of logistic regression on the answer's length in tokens and its logarithm,
    fitted on rows `train`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    n = np.asarray(lengths, dtype=float)
    x = np.stack([n, np.log1p(n)], axis=1)
    scaler = StandardScaler().fit(x[train])
    with warnings.catch_warnings():
        # lengths that are all alike: a flat score, which is the right answer
        warnings.simplefilter("ignore")
        model = LogisticRegression(class_weight="balanced", max_iter=2000).fit(
            scaler.transform(x[train]), labels[train]
        )
    return model.decision_function(scaler.transform(x))


def shuffled_scores(
    features: torch.Tensor,
    labels: np.ndarray,
    groups: Sequence[str],
    rows: np.ndarray,
    *,
    seed: int,
    **options: Any,
) -> np.ndarray:
    """Logits [n] of a monitor fitted (and selected) on `rows` with their labels permuted;
    everything else as for the monitor."""
    mixed = labels.copy()
    mixed[rows] = np.random.default_rng(seed).permutation(labels[rows])
    return logits_of(
        fit(features, mixed, groups, rows=rows, seed=seed, **options).monitor, features
    )


def baselines(
    features: torch.Tensor,
    texts: Sequence[str],
    lengths: Sequence[int],
    labels: Sequence[int] | np.ndarray,
    groups: Sequence[str],
    fitted: Fitted,
    *,
    seed: int = 0,
    **options: Any,
) -> Baselines:
    """All three, fitted on the rows that `fitted` was fitted on, and scored on all n examples.

    `options` are those of `fit` (epochs, standardise, …): the shuffled probe is the monitor with
    nothing to learn.
    """
    y = np.asarray(labels)
    rows = np.sort(np.concatenate([fitted.train_index, fitted.heldout_index]))
    return Baselines(
        text_scores(texts, y, fitted.train_index),
        length_scores(lengths, y, fitted.train_index),
        shuffled_scores(features, y, groups, rows, seed=seed, **options),
    )
