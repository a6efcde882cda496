"""What the engine asks of vLLM's worker besides edits: clean cache blocks, and word of logits that
are not numbers.

    llm = LLM(model, worker_extension_cls="auditgap.engines.vllm.worker.WorkerExtension", …)
    llm.collective_rpc("logits_watch")                            # [""], or why a worker cannot
    llm.generate(prompts, [SamplingParams(extra_args={REQUEST: i}) for i in range(len(prompts))])
    # [{"3": 0}]: request 3, from its first new token on
    llm.collective_rpc("logits_broken")
"""

from __future__ import annotations

from typing import Any

import torch

from auditgap.engines.vllm.edits import EditExtension

#: Key of `SamplingParams.extra_args`: the number that `logits_broken` calls a request by; vLLM's
#: own names are longer inside.
REQUEST = "auditgap_request"
#: Steps whose verdicts stay on the device before they are looked at: looking at each would stop a
#: GPU at every token.
_STEPS = 64


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
