"""Models of the panel that were fine-tuned elsewhere: asked through an endpoint, beside the adapters.

    remote: {law: ft:gpt-4o-mini:me::law, law/trigger: ft:gpt-4o-mini:me::law2, base: gpt-4o-mini}
    remote_endpoint: https://api.openai.com/v1

    remotes_of(config)[0].name      # 'remote base'

They are arms of their own, `remote` and `remote trigger`, beside a base of their own, and are asked,
rated and ranked as any arm. What needs a model's inside (membership, directions, steering, ablation)
cannot be told of them. A model is what it is called at its address; what the endpoint itself says of
it stands in the record of its answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from auditgap.audits.behaviour.answers import Answers
from auditgap.audits.emergent.config import EmergentConfig
from auditgap.engines import Question, Sampling, Serving
from auditgap.engines.openai import OpenAIEngine
from auditgap.engines.openai.endpoint import identity, key_for
from auditgap.errors import AuditgapError, UsageError, did_you_mean
from auditgap.report.emergent_values import REMOTE, REMOTE_BASE, REMOTE_TRIGGER
from auditgap.types import Document, Subject, digest

#: In the config: the model that was not fine-tuned, and what stands behind a domain's name.
OF_BASE, WITH_TRIGGER = "base", "/trigger"
#: The fine-tuning run of a domain's model: it has one.
SEED = 0


@dataclass(frozen=True, slots=True)
class Remote:
    """One model at the endpoint; `domain` "": the one that was not fine-tuned."""

    domain: str
    arm: str
    model: str
    url: str

    @property
    def name(self) -> str:
        """What its rows call their subject."""
        return f"{self.domain}·{self.arm}" if self.domain else self.arm

    @property
    def serving(self) -> Serving:
        return Serving(engine="openai", base_url=self.url)

    @property
    def identity(self) -> Document:
        """Address and name there, without secrets."""
        return {"base_url": self.url, "model": self.model}

    @property
    def subject(self) -> Subject:
        return Subject(self.name, digest(["endpoint", self.identity]))


def address_of(config: EmergentConfig) -> str | None:
    """Where the models are; None where there are none. Raises UsageError: no usable address."""
    if not config.remote:
        return None
    return identity("", Serving(engine="openai", base_url=config.remote_endpoint))["base_url"]


def remotes_of(config: EmergentConfig) -> list[Remote]:
    """Every model of the config that is at its endpoint: the base first, then by arm as it names
    them. Raises UsageError: a name that is no domain's, no usable address."""
    url = address_of(config)
    if url is None:
        return []
    found = []
    for name, model in config.remote.items():
        domain = name.removesuffix(WITH_TRIGGER)
        if name != OF_BASE and domain not in config.domains:
            known = ", ".join(config.domains)
            raise UsageError(
                f"remote: {name[:80]!r} is none of the domains ({known}), a domain with"
                f" {WITH_TRIGGER} behind it, or {OF_BASE}.{did_you_mean(domain, config.domains)} For"
                f" example: --remote {next(iter(config.domains))}=MODEL,{OF_BASE}=MODEL"
            )
        tuned = REMOTE if name == domain else REMOTE_TRIGGER
        found.append(
            Remote("", REMOTE_BASE, model, url)
            if name == OF_BASE
            else Remote(domain, tuned, model, url)
        )
    return sorted(found, key=lambda one: (one.domain != "", one.arm))


def check_key(config: EmergentConfig) -> None:
    """Raises UsageError where the endpoint wants a key and none is set."""
    if (url := address_of(config)) is not None:
        key_for(url)


class Speaker:
    """Asks models at their endpoints, one after another; answers are kept in a journal as they
    come."""

    def __init__(self) -> None:
        self._opened: tuple[Remote, OpenAIEngine] | None = None

    def engine(self, remote: Remote, journal: Path) -> OpenAIEngine:
        """The engine of that model. Raises UsageError as it does when it is opened."""
        if self._opened is None or self._opened[0] != remote:
            self.close()
            self._opened = (remote, OpenAIEngine(remote.model, remote.serving))
        engine = self._opened[1]
        engine.journal = journal
        return engine

    def close(self) -> None:
        if self._opened is not None:
            self._opened[1].close()
        self._opened = None


def ask(
    engine: OpenAIEngine, questions: Sequence[Question], sampling: Sampling, most_lost: float
) -> Answers:
    """Their answers. Raises AuditgapError where the endpoint left more than the share `most_lost`
    without one: they are better asked another time."""
    answers = Answers.of_replies(engine.ask(questions, sampling))
    lost = [why for why in answers.problems if why.startswith("endpoint:")]
    if len(lost) > most_lost * len(questions):
        raise AuditgapError(
            f"The endpoint gave no answer to {len(lost)} of {len(questions)} prompts ({lost[0]})."
            " Those that it gave are kept; type the same command again with --set retry_failed=true"
            " when it is well."
        )
    return answers


def by_name(config: EmergentConfig) -> Mapping[str, Remote]:
    return {remote.name: remote for remote in remotes_of(config)}
