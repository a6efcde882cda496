"""The process that holds vLLM's engine; `VLLMEngine` starts it, and nothing else does.

    # the connection, its parent, its scratch folder
    python -P -m auditgap.engines.vllm.process 7 1234 /tmp/auditgap-k2

It reads its settings ({"llm": what LLM(…) takes, "device": "cpu", "lora": a folder or null,
"strays": files of the model's folder that are not to be read}), loads the model, says what it is, and then does what it is told until the connection closes: `speak` (a
batch of wishes, with their edits), `test` (that edits arrive at some layers), `use` (an adapter).
The engine runs in this very process (its workers too, unless a model is spread over several GPUs),
so that what goes wrong is said here, and all memory goes when the process does.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from auditgap.engines import MAX_TOP_LOGPROBS
from auditgap.engines.child import die_with, end_without, receive, send
from auditgap.engines.vllm.edits import OPTIONS, REQUEST, edited, salted, settle
from auditgap.engines.vllm.self_test import self_test, standing_self_test
from auditgap.types import Document

#: Seconds after which it says that it still works, where nothing has been finished.
_SPEAKS_EVERY = 10.0


class Served:
    """One model in vLLM."""

    def __init__(self, settings: Mapping[str, Any], connection: Connection) -> None:
        import vllm
        from vllm.platforms import current_platform

        self.connection = connection
        if current_platform.device_type != settings["device"]:
            raise ValueError(
                f"the vLLM that is installed runs on {current_platform.device_type}, not on"
                f" {settings['device']}"
            )
        _clean_cache()
        folder = Path(settings["llm"]["model"])
        self.llm = vllm.LLM(
            **{
                **settings["llm"],
                "model": str(_without(settings["strays"], folder)),
                **OPTIONS,
                "worker_extension_cls": "auditgap.engines.vllm.worker.WorkerExtension",
            },
            trust_remote_code=False,
            load_format="safetensors",
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            max_logprobs=MAX_TOP_LOGPROBS,
            generation_config="vllm",  # else a model's own file would change how it is sampled
        )
        for problem in self.llm.collective_rpc("logits_watch"):
            if problem:
                raise RuntimeError(
                    f"this release of vLLM draws otherwise than auditgap knows ({problem}); install"
                    " vllm 0.32"
                )
        # workers in processes of their own have not seen what this one was told
        self.llm.collective_rpc("cache_clean")
        self.engine = self.llm.llm_engine
        self.tested: set[int] = set()
        self.tested_standing: set[tuple[int, ...]] = set()
        self.lora: Any = None
        self.n_loras = 0
        if settings["lora"]:
            self.use(settings["lora"])
        self.about = {"window": self.engine.model_config.max_model_len, "vllm": vllm.__version__}

    def test(self, layers: Iterable[int], standing: Iterable[Sequence[int]] = ()) -> None:
        """Prove, once, that edits of prompts arrive at each of the layers, and that edits of what is
        decoded arrive at each set of layers. Raises AuditgapError as `self_test`."""
        if untested := set(layers) - self.tested:
            self_test(self.llm, sorted(untested))
            self.tested |= untested
        for every in dict.fromkeys(tuple(sorted(some)) for some in standing):
            if every not in self.tested_standing:
                standing_self_test(self.llm, every)
                self.tested_standing.add(every)

    def use(self, folder: str | None) -> None:
        """Answer with this adapter from now on; None: without. What a folder held before does not
        matter."""
        from vllm.lora.request import LoRARequest

        if self.lora is not None:
            self.engine.remove_lora(self.lora.lora_int_id)
            self.lora = None
        if folder is not None:
            # number and name are in the cache's keys: weights that changed are another adapter
            self.n_loras += 1
            lora = LoRARequest(f"adapter-{self.n_loras}", self.n_loras, folder)
            self.engine.add_lora(lora)
            self.lora = lora

    def speak(
        self,
        wishes: Sequence[Mapping[str, Any]],
        stops: Sequence[int],
        edits: Sequence[Mapping[str, Any]],
        payloads: Sequence[bytes],
    ) -> Document:
        """An answer a wish, and each edit's effective norms.

        A wish: {"ids", "max", "temperature", "top_p", "seed", "top", "score", "edit"}. `score` n
        asks for the mean NLL of the last n of its ids instead of new tokens; `edit` is a name with
        the positions [first, last) that it is on, or null. An edit: {"name", "layers", "terms":
        {term: shape}, "own", "decodes"}, its terms' bytes in `payloads`; `own`: positions that it
        has rows of their own for; `decodes`: it is on tokens that are not written yet.
        """
        try:
            self.test(
                {layer for e in edits if e["own"] for layer in e["layers"]},
                [e["layers"] for e in edits if e["decodes"]],
            )
            left = iter(payloads)
            for edit in edits:
                terms = {what: (shape, next(left)) for what, shape in edit["terms"].items()}
                args = edit["name"], edit["layers"], terms, edit["own"]
                self.llm.collective_rpc("edits_put", args=args)
            answers, fed = self._run(wishes, stops)
            norms = {}
            if edits:
                norms = settle(self.llm.collective_rpc("edits_stats"), _wanted(wishes, fed))
        finally:
            if edits:
                self.llm.collective_rpc("edits_clear")
        return {"answers": answers, "norms": norms}

    def _run(
        self, wishes: Sequence[Mapping[str, Any]], stops: Sequence[int]
    ) -> tuple[list[Document | None], list[tuple[int, int]]]:
        """The answers, and how many tokens each request was fed, at least and at most: all but the
        last that it drew; that too where vLLM began a step before it knew that it was the last.
        """
        for i, wish in enumerate(wishes):
            prompt: Any = (
                salted(wish["ids"])
                if wish["edit"] is not None
                else {"prompt_token_ids": wish["ids"]}
            )
            self.engine.add_request(str(i), prompt, _params(i, wish, stops), lora_request=self.lora)
        fed = [(0, 0)] * len(wishes)
        ahead = self.engine.vllm_config.scheduler_config.async_scheduling
        answers: list[Document | None] = [None] * len(wishes)
        self.llm.collective_rpc("logits_broken")  # what an earlier batch left, if it was given up
        n_done, said_at = 0, time.monotonic()
        while self.engine.has_unfinished_requests():
            finished: list[Any] = [output for output in self.engine.step() if output.finished]
            for output in finished:
                at = int(output.request_id)
                said = output.outputs[0]
                n = len(wishes[at]["ids"]) + len(said.token_ids) - 1
                fed[at] = n, n + bool(ahead and said.finish_reason == "stop")
                answers[at] = (
                    _score(output, wishes[at]["score"])
                    if wishes[at]["score"]
                    else _said(output, wishes[at]["top"])
                )
            n_done += len(finished)
            if finished or time.monotonic() - said_at > _SPEAKS_EVERY:
                said_at = time.monotonic()
                send(self.connection, {"done": n_done, "total": len(wishes)})
        for told in self.llm.collective_rpc("logits_broken"):
            for number, token in told.items():
                answer = answers[int(number)]
                if answer is not None and "ids" in answer:  # at the least on one of several ranks
                    answer |= {
                        "ids": answer["ids"][:token],
                        "tops": answer["tops"][:token],
                        "finite": False,
                        "stopped": False,
                    }
        return answers, fed

    def shut(self) -> None:
        with suppress(Exception):
            self.engine.engine_core.shutdown()


def _without(names: Sequence[str], folder: Path) -> Path:
    """A model's folder without these files: itself where there are none, else a folder of links in
    this process's own scratch."""
    if not names:
        return folder
    shown = Path(tempfile.mkdtemp())
    for path in folder.iterdir():
        if path.name not in names:
            (shown / path.name).symlink_to(path.resolve())
    return shown


def _clean_cache() -> None:
    """Have vLLM zero the cache's blocks before it gives them out, as it does for families whose
    state is read before it is written.

    Attention on a CPU reads a block to its end, and what stands there counts nought times: but
    nought times NaN is NaN, so that one prompt whose activations are not numbers would silence
    those who get its memory after it.
    """
    from vllm.v1.kv_cache_interface import KVCacheConfig

    if not isinstance(getattr(KVCacheConfig, "needs_kv_cache_zeroing", None), property):
        raise RuntimeError(
            "this release of vLLM zeroes its cache otherwise than auditgap knows; install vllm 0.32"
        )
    config: Any = KVCacheConfig
    config.needs_kv_cache_zeroing = property(lambda _config: True)


def _wanted(
    wishes: Sequence[Mapping[str, Any]], fed: Sequence[tuple[int, int]]
) -> dict[str, dict[str, tuple[int, int]]]:
    """What `settle` takes: how many of the tokens that each request was fed its edit is on."""
    wanted: dict[str, dict[str, tuple[int, int]]] = {}
    for i, (wish, ends) in enumerate(zip(wishes, fed, strict=True)):
        if wish["edit"] is not None:
            name, first, last = wish["edit"]
            least, most = (max(0, min(n, last or n) - first) for n in ends)
            wanted.setdefault(name, {})[str(i)] = least, most
    return wanted


def _params(number: int, wish: Mapping[str, Any], stops: Sequence[int]) -> Any:
    from vllm import SamplingParams

    extra = {REQUEST: number, **(edited(*wish["edit"]) if wish["edit"] else {})}
    if wish["score"]:
        return SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=0,
            ignore_eos=True,
            detokenize=False,
            extra_args=extra,
        )
    return SamplingParams(
        temperature=wish["temperature"],
        top_p=wish["top_p"],
        seed=wish["seed"],
        max_tokens=wish["max"],
        # none where none are wanted: they cost several passes over the vocabulary at every step
        logprobs=wish["top"] or None,
        stop_token_ids=list(stops),
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
    )


def _said(output: Any, top: int) -> Document:
    """{"ids", "stopped", "finite", "tops": [(ids, log-probabilities), …]} of a finished request, as
    if all were finite."""
    said = output.outputs[0]
    if said.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM gave a request up ({said.finish_reason})")
    stopped = said.finish_reason == "stop"
    best = (
        [sorted(step.items(), key=lambda item: item[1].rank)[:top] for step in said.logprobs]
        if top
        else []
    )
    tops = [([t for t, _ in step], [p.logprob for _, p in step]) for step in best]
    return {
        "ids": list(said.token_ids)[: -1 if stopped else None],
        "stopped": stopped,
        "finite": True,
        "tops": tops,
    }


def _score(output: Any, n: int) -> Document:
    """{"nll": mean NLL of the last n prompt tokens, nats; None when it is not a number}."""
    ids, steps = output.prompt_token_ids[-n:], output.prompt_logprobs[-n:]
    nll = -sum(step[t].logprob for t, step in zip(ids, steps, strict=True)) / n
    return {"nll": nll if _is_finite(nll) else None}


def _is_finite(value: float) -> bool:
    return value - value == 0


def main(fd: int, parent: int, scratch: Path) -> None:
    """Serve the connection `fd` until it closes."""
    die_with(parent, scratch)
    connection = Connection(fd)
    served: Served | None = None
    with suppress(EOFError, OSError):
        while True:
            message, payloads = receive(connection)
            try:
                if served is None:
                    served = Served(message, connection)
                    answer = served.about
                elif message["do"] == "use":
                    served.use(message["lora"])
                    answer = {}
                elif message["do"] == "test":
                    served.test(message["layers"], message["standing"])
                    answer = {}
                else:
                    answer = served.speak(
                        message["wishes"], message["stops"], message["edits"], payloads
                    )
            except Exception as error:
                traceback.print_exc()
                send(connection, {"error": type(error).__name__, "said": str(error)})
                if served is None or message["do"] != "use":
                    break  # requests may be left over in the engine
            else:
                send(connection, answer)
    if served is not None:
        served.shut()
    sys.stdout.flush()
    time.sleep(0.1)  # a parent that was killed hangs up a moment before it is gone
    end_without(parent, scratch)
    os._exit(0)  # what vLLM has running besides would keep the process


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
