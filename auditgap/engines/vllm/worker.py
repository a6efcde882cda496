"""What the engine asks of vLLM's worker: edits, clean cache blocks, and word of logits that are not
numbers.

    llm = LLM(model, worker_extension_cls="auditgap.engines.vllm.worker.WorkerExtension", …)
    llm.collective_rpc("logits_watch")                            # [""], or why a worker cannot
    llm.generate(prompts, [SamplingParams(extra_args={REQUEST: i}) for i in range(len(prompts))])
    # [{"3": 0}]: request 3, from its first new token on
    llm.collective_rpc("logits_broken")

Edits by example: `auditgap.engines.vllm.edits`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from auditgap.engines.vllm.editor import Editor
from auditgap.engines.vllm.edits import REQUEST, unpack
from auditgap.errors import AuditgapError
from auditgap.types import Document

#: Steps whose verdicts stay on the device before they are looked at: looking at each would stop a
#: GPU at every token.
_STEPS = 64


class EditExtension:
    """What `collective_rpc` can call on every worker. Arguments and answers are plain numbers,
    words and bytes."""

    model_runner: Any  # the worker's own
    vllm_config: Any

    def edits_open(self) -> Document:
        """Look whether this worker can be edited: {"problem": a sentence or "", "blocks": L,
        "width": D, "dtype": …}."""
        problem = _unfit(self.model_runner, self.vllm_config)
        if problem:
            return {"problem": problem}
        try:
            self._edits = Editor(self.model_runner)
        except AuditgapError as error:
            return {"problem": str(error)}
        editor = self._edits
        return {
            "problem": "",
            "blocks": len(editor.blocks),
            "width": editor.width,
            "dtype": str(editor.runner.dtype),
        }

    def edits_put(
        self,
        name: str,
        layers: Sequence[int],
        terms: Mapping[str, tuple[Sequence[int], bytes]],
        own: int = 0,
    ) -> None:
        """Keep an edit for requests that name it: its terms [n, D] (see `TERMS`, `pack`), at each
        of the blocks' outputs or (−1) at what block 0 receives; `own`: of one without end, the
        positions that it has rows of their own for, the last of which is for all behind them.

        The first row is that of the first position that a request says it is on. Raises
        AuditgapError for a layer or width that the model has not.
        """
        unpacked = {what: unpack(*packed) for what, packed in terms.items()}
        self._editor().put(name, layers, unpacked, own)

    def edits_drop(self, names: Sequence[str]) -> None:
        """Forget these edits and what is known of them; unknown names are none the worse."""
        self._editor().drop(names)

    def edits_clear(self) -> None:
        """Forget everything and take all hooks off; the model is as it was."""
        self._editor().clear()

    def edits_stats(self) -> Document:
        """{"problem": …, "edits": {name: {request: {"rows", "end", "l2", "linf"}}}}, see `settle`.

        `rows` counts positions that were edited at every layer of the edit, once each, however
        often they were computed again; `end` is the last of them and one, from the edit's first.
        """
        return self._editor().stats()

    def edits_watch(self, layers: Sequence[int]) -> None:
        """From now on record the stream at these layers, edits included, at all positions of
        requests with a RECORD label."""
        self._editor().watch(layers)

    def edits_seen(self) -> dict[str, dict[str, list[Any]]]:
        """{label: {layer: [shape, fp32 bytes]}} (see `pack`) of the stream since the last call."""
        return self._editor().seen()

    def _editor(self) -> Editor:
        if not hasattr(self, "_edits"):
            raise AuditgapError("edits_open comes before every other call.")
        return self._edits


def _unfit(runner: Any, config: Any) -> str:
    """Why edits cannot be trusted under this runner and configuration; the empty string when they
    can."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    parallel = config.parallel_config
    if not isinstance(runner, GPUModelRunner):
        return (
            f"its model runner is {type(runner).__module__}.{type(runner).__name__}, which auditgap"
            " does not know; set VLLM_USE_V2_MODEL_RUNNER=0, or use --engine hf."
        )
    for what, size in (
        ("pipeline", parallel.pipeline_parallel_size),
        ("data", parallel.data_parallel_size),
        ("prefill context", getattr(parallel, "prefill_context_parallel_size", 1)),
    ):
        if size > 1:
            return (
                f"{what} parallelism is on ({size}); edits need every position and block on every"
                " rank: use tensor parallelism."
            )
    if config.speculative_config is not None:
        return "speculative decoding is on, whose draft model does not see the edits; leave it out."
    compiled = config.compilation_config
    if compiled.mode:  # NONE is 0
        return "the model is compiled, and compiled blocks call no hook; give enforce_eager=True."
    if getattr(compiled.cudagraph_mode, "value", 0):
        return (
            "decoding steps are replayed from CUDA graphs, which call no hook; give"
            " enforce_eager=True."
        )
    return ""


class WorkerExtension(EditExtension):
    """A base of vLLM's worker."""

    def cache_clean(self) -> None:
        """Make ready for zeroing cache blocks that the scheduler gives out (see
        `process._clean_cache`).

        A worker in the scheduler's own process has done so, and so has every worker on a CPU.
        """
        runner = self.model_runner
        if runner.device.type != "cpu" and not hasattr(runner, "_kv_block_zeroer"):
            runner._init_kv_zero_meta()

    def logits_watch(self) -> str:
        """From now on look at all logits before a token is drawn; the empty string, or why that
        cannot be done here."""
        runner = self.model_runner
        for part in ("sampler", "input_batch", "requests", "query_start_loc"):
            if not hasattr(runner, part):
                return f"{type(runner).__name__} has no {part}"
        self._watch = _Watch(runner)
        return ""

    def logits_broken(self) -> dict[str, int]:
        """{request: its first new token (from 0) whose logits were not numbers} since the last
        call; most often empty."""
        return self._watch.told()


class _Watch:
    """A hook on the sampler that keeps, for every row, whether its largest logit is a finite
    number.

    A NaN is the largest of its row, +inf is, and a row of −inf alone has no finite one: just where
    log-probabilities fail.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner
        self.steps: list[tuple[list[tuple[int, int]], torch.Tensor]] = []
        self.broken: dict[str, int] = {}
        runner.sampler.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, _sampler: Any, args: tuple, kwargs: dict) -> None:
        logits = kwargs["logits"] if "logits" in kwargs else args[0]
        if logits is None or not len(self.runner.requests):  # a trial run
            return
        self.steps.append((self._rows(), logits.amax(-1).isfinite()))
        if len(self.steps) >= _STEPS:
            self._settle()

    def _rows(self) -> list[tuple[int, int]]:
        """By row: which request, and which of its new tokens is drawn (the last chunk but one of a
        prompt draws none: 0)."""
        batch, starts, rows = self.runner.input_batch, self.runner.query_start_loc.np, []
        for i in range(batch.num_reqs):
            request = self.runner.requests[batch.req_ids[i]]
            number = (request.sampling_params.extra_args or {}).get(REQUEST, -1)
            ends = int(batch.num_computed_tokens_cpu[i]) + int(starts[i + 1]) - int(starts[i])
            rows.append((number, max(0, ends - request.num_prompt_tokens)))
        return rows

    def _settle(self) -> None:
        for rows, finite in self.steps:
            if not bool(finite.all()):
                for (number, token), fine in zip(rows, finite.tolist(), strict=False):
                    if not fine and number >= 0:
                        self.broken[str(number)] = min(token, self.broken.get(str(number), token))
        self.steps.clear()

    def told(self) -> dict[str, int]:
        self._settle()
        told, self.broken = self.broken, {}
        return told
