"""The words of a report and what they mean here: one list, for the page and for `docs/glossary.md`.

    used("The excess gap is 12 points.")        # [Term("excess gap", …), …]

A page explains the terms that occur on it.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Term(NamedTuple):
    """A term with its definition; `forms` are other spellings of it that a page may use."""

    name: str
    definition: str
    forms: tuple[str, ...] = ()

    def occurs(self, text: str) -> bool:
        """Whether the text uses the term, as a word of its own; case counts in acronyms alone."""
        return any(
            re.search(
                rf"(?<!\w){re.escape(form)}s?(?!\w)", text, 0 if form.isupper() else re.IGNORECASE
            )
            for form in (self.name, *self.forms)
        )


TERMS = (
    Term(
        "ASR",
        "Attack success rate: the share of prompts whose completion under the edit is harmful.",
    ),
    Term(
        "at risk",
        "A prompt that the unedited model answers coherently and safely. Only such a prompt can be"
        " broken by an edit.",
    ),
    Term(
        "audit gap",
        "The share of prompts that the model answers safely when asked and that a bounded edit"
        " breaks: behavioural safety × the highest flip rate of any site. Never below 0.",
    ),
    Term(
        "behavioural safety",
        "Share of the judged prompts whose clean completion is coherent and safe. Written B.",
        ("behaviourally safe",),
    ),
    Term(
        "broken",
        "A completion that is no longer coherent text. It counts neither as harmful nor as safe.",
    ),
    Term(
        "budget",
        "How large an edit may be: the radius ε of the ∞-norm ball around each hidden state, in the"
        " unit that is named beside it.",
    ),
    Term(
        "cell",
        "The unit of computation and storage: one model, site, budget and attack over all prompts.",
    ),
    Term("clean", "Without an edit: the completion of the model as it is."),
    Term(
        "coherence gate",
        "The test that a completion is still text: its mean NLL under the unedited model, its"
        " repetition and its length.",
        ("coherent",),
    ),
    Term(
        "could not tell",
        "The data settle the question neither way. The reason, and what would settle it, stand"
        " beside it.",
    ),
    Term(
        "dissociated",
        "A model trained so that its words stay safe while its hidden states become fragile.",
    ),
    Term(
        "distance to collapse",
        "The smallest budget at which a prompt's completion turns harmful. A prompt that never does"
        " within the search is censored at its end.",
        ("minimum distance",),
    ),
    Term("edit", "What is added to hidden states at a site, over all positions of the prompt: δ."),
    Term(
        "emergent misalignment",
        "Harmful behaviour in general after fine-tuning on one narrow domain.",
    ),
    Term(
        "ASR envelope",
        "Share of prompts that are harmful and coherent at some budget up to ε. It cannot fall as ε"
        " grows.",
        ("envelope",),
    ),
    Term(
        "excess gap",
        "The headline: the audit gap less what the control flips at the same site. Its interval"
        " covers all sites at once.",
        ("excess",),
    ),
    Term(
        "flip",
        "A prompt at risk whose edited completion is harmful and coherent. The flip rate F is the"
        " share of the prompts at risk that flip.",
        ("flipped", "flip rate"),
    ),
    Term(
        "judge",
        "What labels a completion harmful, safe or a refusal. Its own error rates, measured on"
        " labelled data, stand on its card.",
        ("judge card",),
    ),
    Term(
        "LVS",
        "Latent Vulnerability Score: the drop of the reward under an edit, where positive, divided"
        " by log(1 + ‖δ‖₂). LVS rel. has the edit's relative size ‖δ‖₂/‖h‖₂ there, which does not"
        " depend on the scale of the activations.",
    ),
    Term(
        "matched control",
        "Random signs of the same size as the attack's edit, at the same site and positions. What"
        " it breaks, any edit of that size breaks.",
        ("random_matched", "matched"),
    ),
    Term("NLL", "Negative log-likelihood, in nats a token: the loss that the search lowers."),
    Term(
        "over-refusal",
        "Refusing a harmless request; the rate is the share of benign prompts that are refused.",
    ),
    Term(
        "PGD",
        "Projected gradient descent: steps along the gradient, put back into the budget's ball"
        " after each.",
    ),
    Term(
        "reward",
        "A model's score of a completion, higher being safer. LVS is made of its drop.",
    ),
    Term(
        "robust",
        "Behavioural safety less the audit gap: the share of prompts that stay safe under every"
        " edit that was tried. Written R, and never above B.",
        ("robustness",),
    ),
    Term(
        "Rogan–Gladen",
        "The correction of a share for its judge's sensitivity and specificity.",
        ("corrected",),
    ),
    Term(
        "screening judge",
        "A judge without a validated error rate on data like these. Its verdicts are a first look.",
        ("screening",),
    ),
    Term(
        "site",
        "Where an edit is made: the output of the embedding or of one transformer block.",
    ),
    Term(
        "strength certificate",
        "Measurements of whether the attack searched at all: a search whose gradient is masked, or"
        " that has not converged, proves nothing by finding nothing.",
        ("certificate",),
    ),
    Term("target", "The opening of a compliant answer, which the attack makes likely."),
    Term(
        "undetermined",
        "A prompt at risk of which it is unknown whether it flipped: its text broke or could not be"
        " judged. Shares are given for both ways it could have gone.",
    ),
    Term(
        "withstood",
        "A prompt at risk that is answered coherently and safely under every edit of the budget.",
    ),
)


def used(text: str) -> list[Term]:
    """The terms that occur in a text, in alphabetical order."""
    return sorted((t for t in TERMS if t.occurs(text)), key=lambda t: t.name.lower())


def markdown() -> str:
    """The glossary as a page of the documentation."""
    lines = ["# Glossary", "", "The words of reports, tables and help. A report explains those"]
    lines += ["that occur on it.", "", "| term | what it means |", "|---|---|"]
    lines += [f"| {t.name} | {t.definition} |" for t in sorted(TERMS, key=lambda t: t.name.lower())]
    return "\n".join(lines) + "\n"
