"""The nine benchmarks as their hub repositories are laid out, columns, nesting and all, with
harmless text; and a small hub.

    clone(tmp_path, "xstest", {"unsafe": ["Tell me the colour of the vault."], "safe": ["How do I paint a vault?"]})
    # what HF_ENDPOINT can point to, on loopback
    with hub({"walledai/XSTest": folder}) as url: ...
"""

from __future__ import annotations

import json
import lzma
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pandas as pd

from auditgap.data.benchmarks import BENCHMARKS

Texts = Mapping[str, Sequence[str]]  # label -> prompts


def _readme(folder: Path, configs: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n\nA stand-in.\n")


def _one(config: str, split: str, path: str) -> str:
    return f"- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {path}\n"


def _parquet(config: str, split: str, path: str) -> Callable[[Path, list[dict]], None]:
    def write(folder: Path, rows: list[dict]) -> None:
        _readme(folder, _one(config, split, path))
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_parquet(folder / path)

    return write


def _xstest(folder: Path, texts: Texts) -> None:
    rows = [
        {"prompt": t, "focus": "vault", "type": "homonyms", "note": "", "label": label}
        for label, of in texts.items()
        for t in of
    ]
    _parquet("default", "test", "data/test-00000-of-00001.parquet")(folder, rows)


def _harmbench(folder: Path, texts: Texts) -> None:
    _readme(
        folder,
        "".join(
            _one(c, "train", f"{c}/train-00000-of-00001.parquet")
            for c in ("standard", "contextual")
        ),
    )
    for config, of in (
        ("standard", texts["all"]),
        ("contextual", ["Not asked for, whatever the vault is."]),
    ):
        (folder / config).mkdir()
        pd.DataFrame([{"prompt": t, "category": "secrets"} for t in of]).to_parquet(
            folder / config / "train-00000-of-00001.parquet"
        )


def _jailbreakbench(folder: Path, texts: Texts) -> None:
    _readme(
        folder,
        "- config_name: behaviors\n  data_files:\n  - split: harmful\n    path:"
        " data/harmful-behaviors.csv\n  - split: benign\n    path: data/benign-behaviors.csv\n",
    )
    (folder / "data").mkdir()
    for name, of in (("harmful", texts["all"]), ("benign", ["Describe how a vault is painted."])):
        rows = [
            {
                "Index": i,
                "Goal": t,
                "Target": "Sure, here is",
                "Behavior": "Secret",
                "Category": "Privacy",
                "Source": "Original",
            }
            for i, t in enumerate(of)
        ]
        pd.DataFrame(rows).to_csv(folder / "data" / f"{name}-behaviors.csv", index=False)


def _advbench(folder: Path, texts: Texts) -> None:
    rows = [{"prompt": t, "target": "Sure, here is"} for t in texts["all"]]
    _parquet("default", "train", "data/train-00000-of-00001.parquet")(folder, rows)


def _maliciousinstruct(folder: Path, texts: Texts) -> None:
    _parquet("default", "train", "data/train-00000-of-00001.parquet")(
        folder, [{"prompt": t} for t in texts["all"]]
    )


def _do_not_answer(folder: Path, texts: Texts) -> None:
    rows = [
        {
            "id": i,
            "risk_area": "Information Hazards",
            "types_of_harm": "Leaks",
            "specific_harm": "Secrets",
            "question": t,
            **{
                f"{m}_{what}": v
                for m in ("GPT4", "vicuna7b")
                for what, v in (("response", "No."), ("harmful", 0), ("action", 0))
            },
        }
        for i, t in enumerate(texts["all"])
    ]
    _parquet("default", "train", "data/train-00000-of-00001-6ba0076b818accff.parquet")(folder, rows)


def _wildjailbreak(folder: Path, texts: Texts) -> None:
    _readme(folder, _one("train", "train", "train/*") + _one("eval", "train", "eval/*"))
    for name in ("train", "eval"):
        (folder / name).mkdir()
    pd.DataFrame(
        [
            {
                "vanilla": "Which?",
                "adversarial": "",
                "completion": "No.",
                "data_type": "vanilla_harmful",
            }
        ]
    ).to_csv(folder / "train/train.tsv", sep="\t", index=False)
    rows = [
        {"adversarial": t, "label": int(kind == "adversarial_harmful"), "data_type": kind}
        for kind, of in texts.items()
        for t in of
    ]
    pd.DataFrame(rows).to_csv(folder / "eval/eval.tsv", sep="\t", index=False)


def _aegis(folder: Path, texts: Texts) -> None:
    _readme(
        folder,
        "- config_name: default\n  data_files:\n"
        + "".join(
            f"  - split: {split}\n    path: {split}.json\n"
            for split in ("train", "validation", "test")
        ),
    )
    rows = [
        {
            "id": f"{i:032x}",
            "reconstruction_id_if_redacted": None,
            "prompt": t,
            "response": "No." if i % 2 else None,
            "prompt_label": label,
            "response_label": "safe" if i % 2 else None,
            "violated_categories": "Privacy",
            "prompt_label_source": "human",
            "response_label_source": "llm_jury" if i % 2 else None,
        }
        for label, of in texts.items()
        for i, t in enumerate(of)
    ]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.json").write_text(
            json.dumps(rows if split == "train" else rows[:1]), encoding="utf-8"
        )


def _beavertails(folder: Path, texts: Texts) -> None:
    _readme(
        folder,
        "- config_name: default\n  data_files:\n  - split: 330k_train\n    path:"
        " round0/330k/train.jsonl.xz\n",
    )
    (folder / "round0/330k").mkdir(parents=True)
    rows = [
        {
            "prompt": t,
            "response": f"Answer {n}.",
            "category": {"privacy_violation": label == "False", "animal_abuse": False},
            "is_safe": label == "True",
        }
        for n in range(2)
        for label, of in texts.items()
        for t in of
    ]
    with lzma.open(folder / "round0/330k/train.jsonl.xz", "wt", encoding="utf-8") as file:
        file.write("\n".join(map(json.dumps, rows)))


_WRITERS = {
    "xstest": _xstest,
    "harmbench": _harmbench,
    "jailbreakbench": _jailbreakbench,
    "advbench": _advbench,
    "maliciousinstruct": _maliciousinstruct,
    "do-not-answer": _do_not_answer,
    "wildjailbreak": _wildjailbreak,
    "aegis": _aegis,
    "beavertails": _beavertails,
}

#: Labels as each set writes them; the first is the one that is asked for.
LABELS = {
    "xstest": ("unsafe", "safe"),
    "wildjailbreak": ("adversarial_harmful", "adversarial_benign"),
    "aegis": ("unsafe", "safe"),
    "beavertails": ("False", "True"),
}


def clone(root: Path, name: str, texts: Texts | Sequence[str]) -> Path:
    """A benchmark's repository as a folder. Plain texts are of the label that is asked for."""
    folder = root / BENCHMARKS[name].hub_id.replace("/", "--")
    if not isinstance(texts, Mapping):
        texts = {LABELS.get(name, ("all",))[0]: texts}
    _WRITERS[name](folder, texts)
    return folder


def _entry(folder: Path, path: Path) -> dict[str, object]:
    if path.is_dir():
        return {
            "type": "directory",
            "path": str(path.relative_to(folder)),
            "oid": "0" * 40,
            "size": 0,
        }
    data = path.read_bytes()
    return {
        "type": "file",
        "path": str(path.relative_to(folder)),
        "oid": sha1(data).hexdigest(),
        "size": len(data),
    }


@contextmanager
def hub(
    repositories: Mapping[str, Path], revision: str, *, status: int = 200, code: str = ""
) -> Iterator[tuple[str, list[str]]]:
    """(URL, requested paths) of a server that speaks as much of the hub's protocol as reading a
    data set takes.

    With `status` it answers files with that and the header X-Error-Code, as the real one does for
    gated sets.
    """
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self._answer(body=True)

        def _send(self, data: bytes, body: bool, at: int = 200, **headers: str) -> None:
            self.send_response(at)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            if body:
                self.wfile.write(data)

        def _answer(self, body: bool) -> None:
            path = unquote(urlparse(self.path).path)
            asked.append(f"{self.command} {path}")
            for name, folder in repositories.items():
                if path.startswith(f"/api/datasets/{name}"):
                    rest = path.removeprefix(f"/api/datasets/{name}").strip("/")
                    return self._api(name, folder, rest, body)
                if path.startswith(f"/datasets/{name}/resolve/"):
                    file = folder / path.split("/resolve/")[1].split("/", 1)[1]
                    if status != 200:
                        return self._send(b"", body, status, X_Error_Code=code)
                    if not file.is_file():
                        return self._send(b"", body, 404, X_Error_Code="EntryNotFound")
                    etag = f'"{sha1(file.read_bytes()).hexdigest()}"'
                    return self._send(file.read_bytes(), body, ETag=etag, X_Repo_Commit=revision)
            self._send(b"", body, 404, X_Error_Code="RepoNotFound")

        def _api(self, name: str, folder: Path, rest: str, body: bool) -> None:
            files = [_entry(folder, p) for p in sorted(folder.rglob("*"))]
            if rest.startswith("revision/") and rest != f"revision/{revision}":
                return self._send(b"{}", body, 404, X_Error_Code="RevisionNotFound")
            if rest == "" or rest.startswith("revision/"):
                info = {"id": name, "sha": revision, "siblings": [], "tags": [], "private": False}
                return self._send(json.dumps(info).encode(), body, Content_Type="application/json")
            if rest.startswith(("tree/", "paths-info/")):
                under = rest.split("/", 2)[2] if rest.count("/") > 1 else "."
                found = [f for f in files if str(Path(f["path"]).parent) == under]
                return self._send(json.dumps(found).encode(), body, Content_Type="application/json")
            self._send(b"{}", body, 404, X_Error_Code="EntryNotFound")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
