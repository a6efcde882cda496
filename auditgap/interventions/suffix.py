"""A discrete suffix: tokens behind the prompt, found by greedy coordinate gradient (GCG) on one
half, tried on the other.

    min over s ∈ Vⁿ of the mean NLL(target | prompt + s)        V: tokens that print as ASCII, n their number

The search is the package nanogcg's (Zou et al. 2023, arXiv 2307.15043), run on a few prompts of the
half that is learned from; of the suffixes found the one with the lowest mean NLL over that whole
half is put behind every prompt that is asked. The control is as many random tokens of V. It has no
size inside the model and no strength; it stands where a prompt goes in, at the embedding.

nanogcg takes the gradient at `embedding weights`, without the scale that some families (Gemma) put
behind them; what it then chooses among is computed by the model itself.
"""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from auditgap.data.packages import BRINGING
from auditgap.engines.hf import HFEngine
from auditgap.errors import AuditgapError, UsageError
from auditgap.interventions import CONTROL, EDIT, Bench, Settings, Trial
from auditgap.interventions.controls import generator
from auditgap.models import Rendered
from auditgap.types import Prompt, Suffix

_PLACE = "{optim_str}"


class DiscreteSuffix:
    """See the module. `steps` of Settings are other searches': a suffix has `suffix_steps`."""

    name = "suffix"

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        try:
            import nanogcg
        except ImportError:
            raise UsageError(
                f"--interventions suffix wants the package nanogcg: {BRINGING['nanogcg'].install} (without its list of"
                " versions, which is older than what it works with)."
            ) from None
        self.gcg: Any = nanogcg

    def describe(self) -> dict[str, Any]:
        told = self.settings.of(
            "suffix_tokens",
            "suffix_steps",
            "suffix_width",
            "suffix_prompts",
            "target",
            "draws",
            "seed",
        )
        return {"intervention": self.name, "version": 1, **told}

    def trials(self) -> list[Trial]:
        return [
            Trial(EDIT, 1.0),
            *(Trial(CONTROL, 1.0, draw=draw) for draw in range(self.settings.draws)),
        ]

    def learn(self, bench: Bench) -> dict[str, torch.Tensor]:
        """`suffix` [n] long, the tokens; `suffix_nll` []: their mean target NLL over the half, in
        nats a token; `searched` []."""
        found = [
            self._search(bench.engine, one) for one in bench.fit[: self.settings.suffix_prompts]
        ]
        told = [ids for ids in found if ids]
        if not told:
            raise AuditgapError(
                "No suffix was found that the tokenizer reads back as it was written; try fewer"
                " suffix_tokens."
            )
        nlls = [
            self._mean_nll(bench.engine, bench.fit, self._text(bench.engine, ids)) for ids in told
        ]
        best = min(range(len(told)), key=lambda i: (nlls[i], told[i]))
        return {
            "suffix": torch.tensor(told[best], dtype=torch.int64),
            "suffix_nll": torch.tensor(nlls[best]),
            "searched": torch.tensor(len(told), dtype=torch.int64),
        }

    def edit(
        self, bench: Bench, learned: Mapping[str, torch.Tensor], p: int, trial: Trial
    ) -> Suffix:
        ids = learned["suffix"].tolist()
        if trial.arm == CONTROL:
            allowed = self._allowed(bench.engine)
            rng = generator(
                self.settings.seed, self.name, bench.asked[p].prompt.id, bench.site, trial.draw
            )
            ids = [
                allowed[i] for i in torch.randint(len(allowed), (len(ids),), generator=rng).tolist()
            ]
        return Suffix(self._text(bench.engine, ids))

    # -- the search
    # ----------------------------------------------------------------------------------------------------

    def _search(self, engine: HFEngine, one: Rendered) -> list[int]:
        """The best suffix for one prompt, as tokens; [] where the prompt cannot be searched."""
        if _PLACE in one.prompt.text:
            return []
        s = self.settings
        config = self.gcg.GCGConfig(
            num_steps=s.suffix_steps,
            search_width=s.suffix_width,
            topk=min(256, len(self._allowed(engine))),
            optim_str_init=" ".join(["x"] * s.suffix_tokens),
            verbosity="ERROR",
            use_prefix_cache=False,  # its form of a cache is older than transformers 5
        )
        # its progress bar is not ours
        with torch.random.fork_rng(), _settled(), contextlib.redirect_stderr(io.StringIO()):
            torch.manual_seed(
                int(
                    torch.randint(
                        2**31, (1,), generator=generator(s.seed, self.name, one.prompt.id)
                    )
                )
            )
            try:
                best = self.gcg.run(
                    engine.model,
                    _Tokenizer(engine),
                    f"{one.prompt.text} {_PLACE}",
                    s.target,
                    config,
                ).best_string
            except RuntimeError as error:  # every candidate reads back as other tokens
                if "after decoding and re-encoding" not in str(error):
                    raise
                return []
        return list(engine.encode(best))

    def _mean_nll(self, engine: HFEngine, prompts: Sequence[Rendered], text: str) -> float:
        target = engine.encode(self.settings.target)
        put = [engine.render(Suffix(text).behind(r.prompt)) for r in prompts]
        told = [n for n in engine.nll(put, [target] * len(put)) if n is not None]
        return sum(told) / len(told) if told else float("inf")

    def _text(self, engine: HFEngine, ids: Sequence[int]) -> str:
        return engine.loaded.tokenizer.decode(list(ids))

    def _allowed(self, engine: HFEngine) -> list[int]:
        """Tokens that print as ASCII, as nanogcg has them."""
        tokenizer = engine.loaded.tokenizer
        special = set(tokenizer.all_special_ids)
        texts = ((i, tokenizer.decode([i])) for i in range(tokenizer.vocab_size))
        return [
            i
            for i, text in texts
            if i not in special and text and text.isascii() and text.isprintable()
        ]


@contextlib.contextmanager
def _settled() -> Iterator[None]:
    """While open, the collections that nanogcg asks for at every step pass over all that was there
    before."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Tokenizer:
    """A subject's tokenizer whose chat template is filled by auditgap: in a child, with bounds, as
    everywhere."""

    def __init__(self, engine: HFEngine) -> None:
        self._chat = engine.loaded.chat
        self._tokenizer = engine.loaded.tokenizer
        self.chat_template = "filled by auditgap"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._tokenizer(*args, **options)

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]], **_: Any) -> str:
        return self._chat.text(Prompt(messages[-1]["content"]))
