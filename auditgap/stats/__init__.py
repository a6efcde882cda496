"""Pure numbers: scores, rates and distances, each with an interval that says how far to trust it.
No pandas, no torch.

    >>> from auditgap import stats
    >>> stats.wilson(4, 24)
    Interval(estimate=0.16666666666666666, lo=0.06678676328632954, hi=0.3585307064969906)

Values are fp64 arrays in which nan (or None) means "could not be scored". It is left out of an
estimate, never turned into 0, and what cannot be estimated at all is None. Confidence is 95 %
unless told otherwise, and resampling is seeded.
"""

from auditgap.stats.agreement import kappa
from auditgap.stats.classification import (
    Platt,
    auroc,
    ece,
    ece_by_chance,
    ece_difference,
    paired_auroc_difference,
    paired_separation_difference,
    platt,
    separation,
)
from auditgap.stats.crossing import Crossing, area_under, steps_to
from auditgap.stats.curves import (
    FEWEST_SEEDS,
    CurveDifference,
    CurveEstimate,
    curve,
    curve_difference,
)
from auditgap.stats.diversity import one_minus_cosine, vendi
from auditgap.stats.gap import GapEstimate, GoldCounts, audit_gap
from auditgap.stats.geometry import Agreement, chance_cosine, compare, direction, split_half
from auditgap.stats.incidence import Incidence, incidence
from auditgap.stats.intervals import (
    Interval,
    bootstrap,
    effective_size,
    informedness,
    paired_difference,
    resampled,
    rogan_gladen,
    wilson,
)
from auditgap.stats.membership import (
    membership_auroc,
    min_k,
    min_k_pp,
    premia,
    roc,
    standardise,
    zlib_ratio,
)
from auditgap.stats.paired import (
    Paired,
    holm,
    p_of_interval,
    paired_gaps,
    paired_means,
    paired_shares,
    welch,
)
from auditgap.stats.power import detectable_difference, detectable_excess, prompts_for_excess
from auditgap.stats.prediction import (
    Correlation,
    Prediction,
    leave_one_out,
    predict_left_out,
    rank_correlation,
)
from auditgap.stats.ranking import Place, ranking
from auditgap.stats.seeds import seeded_mean, seeded_rate
from auditgap.stats.vulnerability import (
    asr_envelope,
    lvs,
)

__all__ = [
    "FEWEST_SEEDS",
    "Agreement",
    "Correlation",
    "Crossing",
    "CurveDifference",
    "CurveEstimate",
    "GapEstimate",
    "GoldCounts",
    "Incidence",
    "Interval",
    "Paired",
    "Place",
    "Platt",
    "Prediction",
    "area_under",
    "asr_envelope",
    "audit_gap",
    "auroc",
    "bootstrap",
    "chance_cosine",
    "compare",
    "curve",
    "curve_difference",
    "detectable_difference",
    "detectable_excess",
    "direction",
    "ece",
    "ece_by_chance",
    "ece_difference",
    "effective_size",
    "holm",
    "incidence",
    "informedness",
    "kappa",
    "leave_one_out",
    "lvs",
    "membership_auroc",
    "min_k",
    "min_k_pp",
    "one_minus_cosine",
    "p_of_interval",
    "paired_auroc_difference",
    "paired_difference",
    "paired_gaps",
    "paired_means",
    "paired_separation_difference",
    "paired_shares",
    "platt",
    "predict_left_out",
    "premia",
    "prompts_for_excess",
    "rank_correlation",
    "ranking",
    "resampled",
    "roc",
    "rogan_gladen",
    "seeded_mean",
    "seeded_rate",
    "separation",
    "split_half",
    "standardise",
    "steps_to",
    "vendi",
    "welch",
    "wilson",
    "zlib_ratio",
]
