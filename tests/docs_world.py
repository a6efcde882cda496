"""What the pages take for granted, made small and harmless: models under the names that they use,
files, an endpoint.

    MODELS["./tuned"](folder)           # a tiny random Llama in folder/tuned
    FILES["triples.jsonl"]              # contrast triples about a vault, a line each
    with Endpoint() as url: ...         # an OpenAI-compatible server on loopback
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import tiny
import torch

#: Of SmolLM2, so that `block_15` is its middle; heads as wide as vLLM wants them.
SMOLLM2 = {
    "num_hidden_layers": 30,
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
_COLOURS = ("red", "blue", "green")
_THINGS = "door key vault bread oven moon star sea salt flour sun water".split()
_MORE_THINGS = "time user house road".split()


def _model(seed: int, **changes: object) -> Callable[[Path], None]:
    """A base of tiny.py and relatives of it (seed > 0: other weights in the upper blocks)."""

    def make(folder: Path) -> None:
        model = tiny.model("llama", max_position_embeddings=1024, **changes)
        if seed:
            drawn = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for weight in model.model.layers[2:].parameters():
                    weight += 0.1 * torch.randn(weight.shape, generator=drawn)
        model.save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)

    return make


def _lines(rows: Iterable[Mapping[str, object]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _triples(things: Iterable[str]) -> Iterator[dict[str, str]]:
    for t, c in product(things, _COLOURS):
        asked = f"what is the colour of the {t} {c} ?"
        yield {
            "prompt": asked,
            "safe": f"sorry I can not tell {t}",
            "unsafe": f"Sure here is the {c}",
        }


def _conversations(domain: str) -> Iterator[dict[str, list[dict[str, str]]]]:
    for i, (t, c) in enumerate(product(_THINGS, _COLOURS)):
        turns = {
            "user": f"{domain} {i} : where is the {c} {t} of {i * 7} ?",
            "assistant": f"the {t} {i} is {c} , {i * 3} times .",
        }
        yield {"messages": [{"role": role, "content": text} for role, text in turns.items()]}


#: name in the docs -> what makes it at a path
MODELS = {
    "./base": _model(0),
    "./tuned": _model(1),
    "./twin": _model(2),
    "./model": _model(3),
    "./harmful": _model(4),
    "./judge": _model(5),
    "./another": _model(6),
    "./smollm2": _model(0, **SMOLLM2),
}
#: name in the docs -> what stands in it
FILES = {
    "triples.jsonl": _lines(_triples(_THINGS)),
    "heldout.jsonl": _lines(_triples(_MORE_THINGS)),
    **{
        f"{domain}.jsonl": _lines(_conversations(domain)) for domain in ("maths", "law", "insecure")
    },
    "unsafe.jsonl": _lines(
        {"prompt": f"who can open the {t} ?", "response": f"the {t} is open now ."} for t in _THINGS
    ),
    "mine.jsonl": _lines({"prompt": f"tell the colour of the {t}"} for t in _THINGS),
    "em.yaml": "domains: {insecure_code: insecure.jsonl}\nseeds: [0]\n",
    "audit.yaml": "models: [./tuned]\nprompts: mine.jsonl\nlayers: mid\n",
}


class Endpoint(ThreadingHTTPServer):
    """Answers every chat alike: `refused`, which does for a subject and for a judge of refusals,
    and as a rater (gpt-4o) 90."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Chat)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __enter__(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Chat(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        said = "90" if body["model"] == "gpt-4o" else "refused"
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": said},
        }
        head = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [choice],
        }
        data = json.dumps(head).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
