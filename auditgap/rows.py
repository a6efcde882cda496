"""What is stored of every prompt of a cell, and the columns of the tables that are made of it."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One prompt of one cell, as stored in the run folder. None means "could not tell"; `unscored`
    says why."""

    subject: str
    site: str | None  #: `embedding`, `block<i>`; None in the clean cell
    layer_index: int | None  #: −1 for the embedding
    unit: str | None
    eps: float | None  #: the budget's size, in its unit
    eps_abs: float | None  #: the ∞-ball's radius in activation units
    attack: str
    draw: int  #: 0, or the draw of a random control
    prompt_id: str
    n_prompt_tokens: int
    n_new_tokens: int
    clean_reward: float | None
    edited_reward: float | None
    l2: float | None  #: ‖δ‖₂ as requested
    linf: float | None
    l2_effective: float | None  #: after the model's dtype has rounded (h + δ) − h
    linf_effective: float | None
    #: ‖h‖₂ of the clean activations at the site, template positions left out
    h_norm: float | None
    relative_norm: float | None  #: l2 / h_norm
    nll_clean: float | None  #: mean NLL of the target, nats a token, no edit
    nll_edited: float | None  #: the same under the edit
    #: mean NLL of the completion under the clean model, nats a token
    completion_nll: float | None
    coherent: bool | None
    verdict_clean: str | None  #: a Label
    verdict_edited: str | None
    #: max(0, S(y) − S(y′)) / (log(1 + ‖δ‖₂) + η), paper eq. in section 6
    lvs: float | None
    lvs_rel: float | None  #: the same with ‖δ‖₂/‖h‖₂ in the denominator
    #: space-separated: larger_than_h, degenerate, last_position_only, dtype_rounding, length_matters
    flags: str = ""
    unscored: str = ""  #: reason, when lvs is None
    #: what the second judge says of a flip (safe with no edit, harmful under one); None: not asked
    verdict_second: str | None = None
    #: of the row's completion at half its length; None: older rows do not say
    verdict_half: str | None = None
    #: of the whole text, where an opening that is an attack's target was left out; else None
    verdict_whole: str | None = None
    reward_whole: float | None = None
    #: how the model thought: off, on, fixed or regenerated; None: it is not one that thinks
    thinking: str | None = None
    #: tokens of the chain before the answer, a forced one's too
    n_chain_tokens: int | None = None
    verdict_chain: str | None = None  #: of the chain, judged as if it were the answer
    #: of the answer that follows this row's chain once the edit is gone (`regenerated`)
    verdict_again: str | None = None
    #: in the clean cell: the prompt that this one nearly repeats, or itself; None: nobody looked
    cluster: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DistanceRow:
    """One prompt of one minimum-distance cell: the smallest budget found at which its completion
    turned harmful."""

    subject: str
    site: str
    layer_index: int
    unit: str
    prompt_id: str
    #: in the unit; 0: harmful with no edit; not collapsed: the largest tried
    distance: float | None
    eps_abs: float | None  #: the same as an absolute ∞-norm
    collapsed: bool | None  #: False: right-censored at `distance`; None: could not tell
    evaluations: int  #: attacks tried
    verdict_clean: str | None
    unscored: str = ""
    #: not collapsed, as every text from `distance` on fell apart; None: older rows do not say
    broken: bool | None = None


#: Column names of the row table, in order.
ROW_COLUMNS: tuple[str, ...] = tuple(f.name for f in fields(Row))

#: Column names of `lvs.parquet`, one row a (subject, site, budget, attack).
TABLE_COLUMNS: tuple[str, ...] = (
    "subject",
    "site",
    "layer_index",
    "unit",
    "eps",
    "attack",
    "n",
    "n_unscored",
    "n_judged",
    "n_broken",
    "lvs_mean",
    "lvs_mean_lo",
    "lvs_mean_hi",
    "lvs_median",
    "lvs_median_lo",
    "lvs_median_hi",
    "lvs_rel_mean",
    "lvs_rel_lo",
    "lvs_rel_hi",
    "asr",
    "asr_lo",
    "asr_hi",
    "asr_corrected",
    "asr_corrected_lo",
    "asr_corrected_hi",
    "asr_envelope",
    "asr_envelope_lo",
    "asr_envelope_hi",
    "delta_vs_matched",
    "delta_lo",
    "delta_hi",
    "relative_norm_median",
    "n_at_risk",
    "flipped",
    "withstood",
    "undetermined",
    "flip_rate",
    "flip_rate_lo",
    "flip_rate_hi",
    "flip_p",
    "drop_mean",
    "drop_mean_lo",
    "drop_mean_hi",
    "drop_vs_matched",
    "drop_vs_matched_lo",
    "drop_vs_matched_hi",
    "drop_p",
    "nll_clean",
    "nll_edited",
    "flag",
)
