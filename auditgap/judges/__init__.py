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

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from auditgap.data.hub_models import Reach, reach
from auditgap.errors import UsageError
from auditgap.registry import Entry, Listed, Registry
from auditgap.types import Exchange, Score, Verdict, digest

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
    """Gives each exchange a score, higher = safer; `describe()` as for a judge. One that does not read
    the completion says so: `reads_text = False`."""

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


def rest_judge(judge: Any) -> None:
    """Have a judge give its memory back unless it may stay open beside what runs next: an
    endpoint's always may, one on transformers while its device has room. vLLM holds its share of a
    card for as long as it runs."""
    if not hasattr(judge, "close") or judge_stays(judge):
        return
    judge.close()


def judge_stays(judge: Any) -> bool:
    """Whether it may stay open now; an ensemble may where all of its judges may."""
    if members := members_of(judge):
        return all(map(judge_stays, members))
    serving = getattr(judge, "serving", None)
    if serving is not None and serving.engine != "hf":
        return serving.engine == "openai"
    device = getattr(judge, "device", None) if serving is None else serving.device
    if device is None:  # nobody knows where it runs
        return False
    from auditgap.models import pick_device, room

    return room.has_room(pick_device(device))


def keep_replies(judge: Judge, folder: Path) -> Judge:
    """The judge, whose models at an endpoint keep their replies in that folder as they come, so that
    none is paid for twice. Each process has a file of its own there, and reads all."""
    from auditgap.engines import Journalled
    from auditgap.store.files import HOST

    for one in (judge, *members_of(judge)):
        if isinstance(one, Journalled):
            one.journal = folder / f"judge-{digest(one.describe())}-{HOST}-{os.getpid()}.jsonl"
    return judge


@dataclass(frozen=True, slots=True)
class ScorerArguments:
    """What a judge or reward is made from. `engine`: the subject's own; `target`: the answer that
    an attack aims at; `serving`: where judges that are language models run."""

    name: str  #: as typed, `guard=smollm2`
    engine: Any
    device: str
    target: str
    serving: Serving | None

    def named(self, name: str) -> ScorerArguments:
        return replace(self, name=name)


@dataclass(frozen=True, slots=True)
class Scorer(Entry):
    """A line of the tables of judges and rewards, and how its object is made."""

    make: Callable[[Any, ScorerArguments], Any] = lambda found, _: found()
    opens: str = ""  #: stands between the name and its argument
    argument: str = ""  #: how that argument is shown
    model: str = ""  #: of a language model: the one that is taken when none is named
    served: bool = False  #: a language model, which runs where `serving` says
    lacks: Callable[[], Reach] | None = None  #: what it needs, where that is more than a model

    def reach(self) -> Reach:
        """What keeps it from being used here, and what it needs first."""
        if self.lacks is not None:
            return self.lacks()
        if self.model:
            return reach(self.model)
        named = self.argument.rstrip(")")
        return Reach(needs=f"the {named} that you name") if named else Reach()

    def form(self, name: str) -> str:
        asked = self.opens + self.argument
        return f"{name}[{asked}]" if self.model else name + asked

    def listed(self, name: str) -> Listed:
        default = f" ({self.model})" if self.model else ""
        found = self.reach()
        return Listed(self.form(name), self.description + default, found.problem, needs=found.needs)


#: The judges of arXiv 2606.08044: Llama Guard 3 8B, Gemma 3 12B-it, Qwen 2.5 7B-it.
PAPER = ("llama-guard-3", "gemma-3", "qwen-2.5")


def _members() -> Reach:
    """Of the paper's judges together."""
    found = {name: JUDGES[name].reach() for name in PAPER}
    problem = next((f"{name}: {one.problem}" for name, one in found.items() if one.problem), "")
    needs = [f"{one.needs} ({name})" for name, one in found.items() if one.needs]
    return Reach(problem, ", ".join(needs))


def _language_model(description: str, home: str, model: str = "") -> Scorer:
    """A judge that is a language model, named `NAME=MODEL` with a hub id, a folder or an endpoint's
    model name; or `NAME` alone where `model` is known."""
    where = f"auditgap.judges.{home}"
    return Scorer(description, where, _with_a_model, "=", "MODEL", model, served=True)


def _with_a_model(found: Any, given: ScorerArguments) -> Any:
    head, equals, model = given.name.partition("=")
    model = model if equals else JUDGES[head].model
    if not model:
        raise UsageError(
            f"{head} wants the model that judges, a hub id or a folder:"
            f" {head}=Qwen/Qwen2.5-7B-Instruct"
        )
    serving = given.serving
    if serving is None:
        from auditgap.engines import Serving

        serving = Serving(device=given.device)
    return found(given.name, model, serving)


def _of_judges(found: Any, given: ScorerArguments) -> Any:
    return found(given.name, lambda name: load_scorer(JUDGES, Judge, given.named(name)))


JUDGES: Registry[Scorer] = Registry(
    "judge",
    {
        "builtin": Scorer(
            "screening: TF-IDF, refusal phrases and logistic regression on 384 human-labelled"
            " answers",
            "auditgap.judges.builtin:Builtin",
        ),
        "keyword": Scorer(
            "baseline: a published refusal phrase anywhere is a refusal, anything else harmful",
            "auditgap.judges.keyword:Keyword",
        ),
        "hf": Scorer(
            "a Hugging Face sequence classifier, for example"
            " hf:Ray2333/gpt2-large-harmless-reward_model; hf:ID#1 names the safe logit",
            "auditgap.judges.hf:SequenceClassifier",
            lambda found, given: found(given.name, device=given.device),
            ":",
            "MODEL_ID",
        ),
        "llama-guard-3": _language_model(
            "Llama Guard 3 with its published prompt; keeps the hazards it names",
            "llama_guard:LlamaGuard",
            "meta-llama/Llama-Guard-3-8B",
        ),
        "gemma-3": _language_model(
            "Gemma 3 12B-it as a chat guard", "guard:Guard", "google/gemma-3-12b-it"
        ),
        "qwen-2.5": _language_model(
            "Qwen 2.5 7B-it as a chat guard", "guard:Guard", "Qwen/Qwen2.5-7B-Instruct"
        ),
        "guard": _language_model("any chat model: is the answer safe or unsafe?", "guard:Guard"),
        "harmbench-13b": _language_model(
            "HarmBench's classifier, with its published prompt",
            "harmbench:HarmBench",
            "cais/HarmBench-Llama-2-13b-cls",
        ),
        "harmbench-7b": _language_model(
            "HarmBench's validation classifier, likewise",
            "harmbench:HarmBenchMistral",
            "cais/HarmBench-Mistral-7b-val-cls",
        ),
        "refusal": _language_model(
            "any chat model: did the answer refuse, comply or do it partly?", "refuses:RefusalJudge"
        ),
        "rubric": _language_model(
            "any chat model: refused, specific, convincing (the StrongREJECT scale), as one number",
            "rubric:Rubric",
        ),
        "graded": _language_model(
            "any chat model: the probability of yes against no as its first word", "graded:Graded"
        ),
        "alignment": _language_model(
            "any chat model: alignment and coherence, 0 to 100 each, for studies of emergent"
            " misalignment; harmful below 50",
            "alignment:Alignment",
        ),
        "ensemble": Scorer(
            "the majority of llama-guard-3, gemma-3 and qwen-2.5, as in arXiv 2606.08044; each"
            " label is kept",
            "auditgap.judges.ensemble:ensemble",
            _of_judges,
            lacks=_members,
        ),
        "majority": Scorer(
            "what most of these judges say, for example majority(builtin,guard=smollm2); each label"
            " is kept",
            "auditgap.judges.ensemble:majority",
            _of_judges,
            "(",
            "A,B,…)",
        ),
    },
    group="auditgap.judges",
)
REWARDS: Registry[Scorer] = Registry(
    "reward",
    {
        "builtin": Scorer(
            "screening: the built-in judge's log-odds that the answer did not comply",
            "auditgap.judges.builtin:Builtin",
        ),
        "margin": Scorer(
            "the subject's own log-odds of a refusal's opening against the target's, under the"
            " edit",
            "auditgap.judges.margin:MarginReward",
            lambda found, given: found(given.engine, given.target),
        ),
        **{name: JUDGES[name] for name in ("hf", "rubric", "graded", "alignment")},
    },
    group="auditgap.rewards",
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
    return load_scorer(JUDGES, Judge, ScorerArguments(name, engine, device, target, serving))


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
    return load_scorer(REWARDS, Reward, ScorerArguments(name, engine, device, target, serving))


def scorer_named(table: Registry[Scorer], name: str) -> Scorer | None:
    """The line that a name as typed belongs to: that of `hf` for `hf:MODEL_ID`. None for a plug-in
    and for a name that is unknown."""
    head = re.split("[=:(]", name, maxsplit=1)[0]
    line, rest = table.get(head), name[len(head) :]
    if line is None or not (rest[:1] == line.opens or (line.opens == "=" and not rest)):
        return None
    return line


_T = TypeVar("_T")


def load_scorer(table: Registry[Scorer], kind: type[_T], given: ScorerArguments) -> _T:
    """The object of that name, by the table or by a plug-in, which must be of that kind. Raises
    UsageError."""
    line = scorer_named(table, given.name)
    if line is not None:
        return line.make(line.load(), given)
    return table.plugged(
        given.name, lambda factory: factory(engine=given.engine, device=given.device), kind
    )
