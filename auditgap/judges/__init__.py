"""Who says what a completion is worth: a judge gives verdicts, a reward gives scores (higher =
safer).

    judge = load_judge("builtin")
    # [Verdict(refusal)]
    judge.judge([Exchange(prompt, "I'm sorry, but I can't tell you the colour.")])

Judges that are language models are named with the model that does it,
`guard=Qwen/Qwen2.5-7B-Instruct`, and served as `serving` says; several make a `majority(…)`. They
open their model when first asked, and `close()` gives its memory back.

To add one: a file in this folder and a line in JUDGES or REWARDS; or, from your own package, an
entry point in the group `auditgap.judges` or `auditgap.rewards` that names a callable `factory(*,
engine, device)`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from auditgap.errors import AuditgapError, UsageError, did_you_mean
from auditgap.types import Exchange, Score, Verdict

if TYPE_CHECKING:
    from auditgap.engines import Serving


@runtime_checkable
class Judge(Protocol):
    """Gives each exchange a verdict. `describe()` is the identity that changes numbers, and goes
    into cell keys."""

    name: str

    def describe(self) -> dict[str, Any]: ...

    def judge(self, exchanges: Sequence[Exchange]) -> list[Verdict]: ...


@runtime_checkable
class Reward(Protocol):
    """Gives each exchange a score, higher = safer; `describe()` as for a judge."""

    name: str

    def describe(self) -> dict[str, Any]: ...

    def score(self, exchanges: Sequence[Exchange]) -> list[Score]: ...


def members_of(judge: Judge) -> tuple[Judge, ...]:
    """The judges that an ensemble is made of; empty for one that is none."""
    return tuple(getattr(judge, "judges", ()))


def close_judge(holder: Any) -> None:
    """Have a judge, a reward or what else holds models give memory and processes back; it opens
    them again when asked."""
    if hasattr(holder, "close"):
        holder.close()


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the table: what it is, and how it is made from (engine, device, target)."""

    description: str
    make: Callable[[Any, str, str], Any]


@dataclass(frozen=True, slots=True)
class ScorerInfo:
    """A line of `auditgap ls judges` or `ls rewards`. `problem` says why a plug-in cannot be
    used."""

    name: str
    description: str
    available: bool = True
    problem: str = ""


# Imports stay inside the factories: a run loads what it uses, and `import auditgap.judges` stays
# fast.
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
    "builtin": Entry(
        "screening: TF-IDF, refusal phrases and logistic regression on 384 human-labelled answers",
        _builtin,
    ),
    "keyword": Entry(
        "baseline: a published refusal phrase anywhere is a refusal, anything else harmful",
        _keyword,
    ),
}
REWARDS: Mapping[str, Entry] = {
    "builtin": Entry(
        "screening: the built-in judge's log-odds that the answer did not comply", _builtin
    ),
    "margin": Entry(
        "the subject's own log-odds of a refusal's opening against the target's, under the edit",
        _margin,
    ),
}


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A judge that is a language model: what it is, its class in this folder, and the model it
    takes when none is named."""

    description: str
    home: str  #: module:class
    model: str = ""  #: empty: one must be named
    reward: bool = False  #: can be named as a reward, too


#: Named `NAME`, or `NAME=MODEL` with a hub id, folder or endpoint's model name.
MODEL_JUDGES: Mapping[str, ModelEntry] = {
    "llama-guard-3": ModelEntry(
        "Llama Guard 3 with its published prompt; keeps the hazards it names",
        "llama_guard:LlamaGuard",
        "meta-llama/Llama-Guard-3-8B",
    ),
    "gemma-3": ModelEntry("Gemma 3 12B-it as a chat guard", "guard:Guard", "google/gemma-3-12b-it"),
    "qwen-2.5": ModelEntry(
        "Qwen 2.5 7B-it as a chat guard", "guard:Guard", "Qwen/Qwen2.5-7B-Instruct"
    ),
    "guard": ModelEntry("any chat model: is the answer safe or unsafe?", "guard:Guard"),
    "harmbench-13b": ModelEntry(
        "HarmBench's classifier, with its published prompt",
        "harmbench:HarmBench",
        "cais/HarmBench-Llama-2-13b-cls",
    ),
    "harmbench-7b": ModelEntry(
        "HarmBench's validation classifier, likewise",
        "harmbench:HarmBenchMistral",
        "cais/HarmBench-Mistral-7b-val-cls",
    ),
    "refusal": ModelEntry(
        "any chat model: did the answer refuse, comply or do it partly?", "refuses:RefusalJudge"
    ),
    "rubric": ModelEntry(
        "any chat model: refused, specific, convincing (the StrongREJECT scale), as one number",
        "rubric:Rubric",
        reward=True,
    ),
    "graded": ModelEntry(
        "any chat model: the probability of yes against no as its first word",
        "graded:Graded",
        reward=True,
    ),
    "alignment": ModelEntry(
        "any chat model: alignment and coherence, 0 to 100 each, for studies of emergent"
        " misalignment; harmful below 50",
        "alignment:Alignment",
        reward=True,
    ),
}
ENSEMBLE, MAJORITY = "ensemble", "majority("
ENSEMBLE_HELP = (
    "the majority of llama-guard-3, gemma-3 and qwen-2.5, as in arXiv 2606.08044; each label is"
    " kept"
)
MAJORITY_HELP = (
    "what most of these judges say, for example majority(builtin,guard=smollm2); each label is kept"
)
#: Shown with both tables; handled by hf.py.
HF_PREFIX = "hf:"
HF_HELP = (
    "a Hugging Face sequence classifier, for example hf:Ray2333/gpt2-large-harmless-reward_model;"
    " hf:ID#1 names the safe logit"
)


def load_judge(
    name: str,
    *,
    engine: Any = None,
    device: str = "cpu",
    target: str = "Sure, here is",
    serving: Serving | None = None,
) -> Judge:
    """The judge of that name. `serving`: where judges that are language models run; None:
    transformers on `device`.

    Raises UsageError: unknown name, no model named, broken plug-in.
    """
    if name == ENSEMBLE or name.startswith(MAJORITY):
        from auditgap.judges.ensemble import PAPER, Majority, members

        named = PAPER if name == ENSEMBLE else members(name)
        return Majority(
            name,
            [
                load_judge(n, engine=engine, device=device, target=target, serving=serving)
                for n in named
            ],
        )
    return _load("judge", name, JUDGES, Judge, engine, device, target, serving)


def load_reward(
    name: str,
    *,
    engine: Any = None,
    device: str = "cpu",
    target: str = "Sure, here is",
    serving: Serving | None = None,
) -> Reward:
    """The reward of that name; as `load_judge`. `margin` scores with the subject's own `engine`;
    without one it can only describe itself."""
    return _load("reward", name, REWARDS, Reward, engine, device, target, serving)


def judges() -> list[ScorerInfo]:
    """Every judge that can be named here, broken plug-ins with their cause."""
    return _listing("judge", JUDGES)


def rewards() -> list[ScorerInfo]:
    """Every reward that can be named here, broken plug-ins with their cause."""
    return _listing("reward", REWARDS)


def _load(
    kind: str,
    name: str,
    table: Mapping[str, Entry],
    protocol: type,
    engine: Any,
    device: str,
    target: str,
    serving: Serving | None,
) -> Any:
    if name in table:
        return table[name].make(engine, device, target)
    if name.startswith(HF_PREFIX):
        from auditgap.judges.hf import SequenceClassifier

        return SequenceClassifier(name, device=device)
    head, equals, model = name.partition("=")
    models = _models(kind)
    if head in models:
        return _language_model(
            name, models[head], model if equals else models[head].model, device, serving
        )
    plugins = _plugins(kind)
    if name not in plugins:
        known, several = (
            [*table, *plugins],
            [ENSEMBLE, f"{MAJORITY}A,B,…)"] if kind == "judge" else [],
        )
        raise UsageError(
            f"Unknown {kind} {name!r}.{did_you_mean(head, [*known, *models, *several])} There is"
            f" {', '.join(known)}, or hf:MODEL_ID, or a language model, NAME=MODEL, with NAME one"
            f" of {', '.join(models)}" + (f"; or {' or '.join(several)}." if several else ".")
        )
    try:
        made = plugins[name].load()(engine=engine, device=device)
    except AuditgapError:
        raise
    except (
        Exception
    ) as error:  # another package's code: whatever it raises is its own fault, and is named
        raise UsageError(
            f"The {kind} {name!r} comes from a plug-in that fails: {_cause(error)}"
            f" ({plugins[name].value})."
        ) from error
    if not isinstance(made, protocol):
        wanted = "name, describe() and " + (
            "judge(exchanges)" if kind == "judge" else "score(exchanges)"
        )
        raise UsageError(
            f"The plug-in {plugins[name].value} gave a {type(made).__name__}, which is no {kind}:"
            f" {wanted} are wanted."
        )
    return made


def _models(kind: str) -> dict[str, ModelEntry]:
    return {name: entry for name, entry in MODEL_JUDGES.items() if kind == "judge" or entry.reward}


def _language_model(
    name: str, entry: ModelEntry, model: str, device: str, serving: Serving | None
) -> Any:
    if not model:
        wanted = name.partition("=")[0]
        raise UsageError(
            f"{wanted} wants the model that judges, a hub id or a folder:"
            f" {wanted}=Qwen/Qwen2.5-7B-Instruct"
        )
    if serving is None:
        from auditgap.engines import Serving

        serving = Serving(device=device)
    module, _, found = entry.home.partition(":")
    return getattr(importlib.import_module(f"auditgap.judges.{module}"), found)(
        name, model, serving
    )


def _listing(kind: str, table: Mapping[str, Entry]) -> list[ScorerInfo]:
    infos = [ScorerInfo(name, entry.description) for name, entry in table.items()]
    infos.append(ScorerInfo(HF_PREFIX + "MODEL_ID", HF_HELP))
    for name, entry in _models(kind).items():
        shown, default = (
            (f"{name}[=MODEL]", f" ({entry.model})") if entry.model else (f"{name}=MODEL", "")
        )
        infos.append(ScorerInfo(shown, entry.description + default))
    if kind == "judge":
        infos += [
            ScorerInfo(ENSEMBLE, ENSEMBLE_HELP),
            ScorerInfo(f"{MAJORITY}A,B,…)", MAJORITY_HELP),
        ]
    for name, point in _plugins(kind).items():
        if name in table:
            infos.append(
                ScorerInfo(
                    name,
                    f"plug-in {point.value}",
                    False,
                    f"the name {name} is taken by auditgap's own {kind}",
                )
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
    return {
        point.name: point for point in importlib.metadata.entry_points(group=f"auditgap.{kind}s")
    }


def _cause(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
