"""Models at an endpoint, on the page.

remote(view)     # () in a study without any, else one section
"""

from __future__ import annotations

from collections.abc import Iterator

from auditgap.report.emergent_columns import ARM, count, domain_name, given, key
from auditgap.report.emergent_remote import INSIDE, UNTOLD
from auditgap.report.emergent_view import StudyView
from auditgap.report.section import Prose, Section

REMOTE = (
    given("domain", "Domain", domain_name),
    ARM,
    given("model", "Model"),
    given("endpoint", "Endpoint"),
    given("reported", "It says of itself"),
    count("n", "Answers"),
    count("rated", "Rated"),
    key(next(iter(INSIDE)), "Its inside", css="word"),  # all of them say the same
)
_NOTE = (
    "A model is what it is called at its address; which weights stand behind the name only the"
    " endpoint’s owner knows. Its rates are in the tables above, in arms of their own, beside the base"
    " that the endpoint has."
)


def remote(view: StudyView) -> Iterator[Section]:
    table = view.data["remote"]
    if table.empty:
        return
    said = (
        f"Models asked through an endpoint, whose weights are not here: {len(table)}. Their"
        f" {', '.join(INSIDE.values())}: {UNTOLD}."
    )
    yield Section(
        id="em-remote",
        title="Models fine-tuned elsewhere",
        contents="Elsewhere",
        blocks=(Prose(said), view.table("remote", REMOTE, "Models at an endpoint", _NOTE)),
    )
