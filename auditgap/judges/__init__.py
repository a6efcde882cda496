"""Who says what a completion is worth: a judge gives verdicts, a reward gives scores (higher = safer).

    judge = load_judge("builtin")
    judge.judge([Exchange(prompt, "I'm sorry, but I can't tell you the colour.")])      # [Verdict(refusal)]

To add one: a file in this folder and a line in JUDGES or REWARDS; or, from your own package, an entry point in the
group `auditgap.judges` or `auditgap.rewards` that names a callable `factory(*, engine, device)`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from auditgap.errors import AuditgapError, UsageError, did_you_mean
from auditgap.types import Exchange, Score, Verdict


@runtime_checkable
class Judge(Protocol):
    """Gives each exchange a verdict. `describe()` is the identity that changes numbers, and goes into cell keys."""

    name: str

    def describe(self) -> dict[str, Any]: ...

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]: ...


@runtime_checkable
class Reward(Protocol):
    """Gives each exchange a score, higher = safer; `describe()` as for a judge."""

    name: str

    def describe(self) -> dict[str, Any]: ...

    def score(self, exchanges: Sequence[Exchange]) -> list[Score]: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the table: what it is, and how it is made from (engine, device, target)."""

    description: str
    make: Callable[[Any, str, str], Any]


@dataclass(frozen=True, slots=True)
class ScorerInfo:
    """A line of `auditgap ls judges` or `ls rewards`. `problem` says why a plug-in cannot be used."""

    name: str
    description: str
    available: bool = True
    problem: str = ""


# Imports stay inside the factories: a run loads what it uses, and `import auditgap.judges` stays fast.
def _builtin(engine: Any, device: str, target: str) -> Any:
    from auditgap.judges.builtin import Builtin

    return Builtin()


def _keyword(engine: Any, device: str, target: str) -> Any:
    from auditgap.judges.keyword import Keyword

    return Keyword()


def _margin(engine: Any, device: str, target: str) -> Any:
    from auditgap.judges.margin import MarginReward

    return MarginReward(engine, target)


JUDGES: Mapping[str, Entry] = {
    "builtin": Entry("screening: TF-IDF, refusal phrases and logistic regression on 384 human-labelled answers", _builtin),
    "keyword": Entry("baseline: a published refusal phrase anywhere is a refusal, anything else harmful", _keyword),
}
REWARDS: Mapping[str, Entry] = {
    "builtin": Entry("screening: the built-in judge's log-odds that the answer did not comply", _builtin),
    "margin": Entry("the subject's own log-odds of a refusal's opening against the target's, under the edit", _margin),
}
#: Shown with both tables; handled by hf.py.
HF_PREFIX = "hf:"
HF_HELP = (
    "a Hugging Face sequence classifier, for example hf:Ray2333/gpt2-large-harmless-reward_model; hf:ID#1 names the safe logit"
)


def load_judge(name: str, *, engine: Any = None, device: str = "cpu", target: str = "Sure, here is") -> Judge:
    """The judge of that name. Raises UsageError: unknown name, broken plug-in."""
    return _load("judge", name, JUDGES, Judge, engine, device, target)


def load_reward(name: str, *, engine: Any = None, device: str = "cpu", target: str = "Sure, here is") -> Reward:
    """The reward of that name. `margin` scores with the subject's own `engine`; without one it can only describe itself."""
    return _load("reward", name, REWARDS, Reward, engine, device, target)


def judges() -> list[ScorerInfo]:
    """Every judge that can be named here, broken plug-ins with their cause."""
    return _listing("judge", JUDGES)


def rewards() -> list[ScorerInfo]:
    """Every reward that can be named here, broken plug-ins with their cause."""
    return _listing("reward", REWARDS)


def _load(kind: str, name: str, table: Mapping[str, Entry], protocol: type, engine: Any, device: str, target: str) -> Any:
    if name in table:
        return table[name].make(engine, device, target)
    if name.startswith(HF_PREFIX):
        from auditgap.judges.hf import SequenceClassifier

        return SequenceClassifier(name, device=device)
    plugins = _plugins(kind)
    if name not in plugins:
        known = [*table, *plugins]
        raise UsageError(f"Unknown {kind} {name!r}.{did_you_mean(name, known)} There is {', '.join(known)}, or hf:MODEL_ID.")
    try:
        made = plugins[name].load()(engine=engine, device=device)
    except AuditgapError:
        raise
    except Exception as error:  # another package's code: whatever it raises is its own fault, and is named
        raise UsageError(
            f"The {kind} {name!r} comes from a plug-in that fails: {_cause(error)} ({plugins[name].value})."
        ) from error
    if not isinstance(made, protocol):
        wanted = "name, describe() and " + ("judge(exchanges)" if kind == "judge" else "score(exchanges)")
        raise UsageError(
            f"The plug-in {plugins[name].value} gave a {type(made).__name__}, which is no {kind}: {wanted} are wanted."
        )
    return made


def _listing(kind: str, table: Mapping[str, Entry]) -> list[ScorerInfo]:
    infos = [ScorerInfo(name, entry.description) for name, entry in table.items()]
    infos.append(ScorerInfo(HF_PREFIX + "MODEL_ID", HF_HELP))
    for name, point in _plugins(kind).items():
        if name in table:
            infos.append(
                ScorerInfo(name, f"plug-in {point.value}", False, f"the name {name} is taken by auditgap's own {kind}")
            )
            continue
        try:
            made = point.load()
        except Exception as error:  # as above
            infos.append(ScorerInfo(name, f"plug-in {point.value}", False, _cause(error)))
        else:
            first = (getattr(made, "__doc__", None) or "").strip().partition("\n")[0]
            infos.append(ScorerInfo(name, first or f"plug-in {point.value}"))
    return infos


def _plugins(kind: str) -> dict[str, importlib.metadata.EntryPoint]:
    return {point.name: point for point in importlib.metadata.entry_points(group=f"auditgap.{kind}s")}


def _cause(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
