"""Guards that decide whether a number may be believed, broken one at a time: do their tests notice?

    make mutants                              # all of them: caught or survived, and which
    python tests/mutants.py lvs_clip holm     # these

Each mutant says where the guard stands (a file and its words, which stand there once), what stands
there in its place, and the tests that have to fail. They run on a copy; the checkout stays as it is.
A guard whose words are not found has moved: `tests/test_mutants.py` fails, and the mutant follows it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Seconds that the tests of one mutant may take; longer is as good as a failure.
LIMIT = 600


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  #: below auditgap/
    guard: str
    broken: str
    tests: str  #: what pytest is given

    @property
    def path(self) -> Path:
        return Path("auditgap") / self.file

    def found(self, root: Path = ROOT) -> int:
        """How often the guard's words stand in their file: 1 is right."""
        path = root / self.path
        return path.read_text("utf-8").count(self.guard) if path.is_file() else 0


MUTANTS = (
    # -- the model that is audited is the one that was named
    Mutant(
        "vllm_goes_on",
        "engines/vllm/edits.py",
        "isinstance(edit, ConstantEdit) or edit.goes_on",
        "isinstance(edit, ConstantEdit)",
        "tests/engines/vllm/test_vllm_refusals.py",
    ),
    Mutant(
        "trigger_coherent",
        "report/emergent_reading.py",
        "    return is_null(coherence) or coherence <= COHERENT\n\n\ndef _membership",
        "    return False\n\n\ndef _membership",
        "tests/report/test_emergent_tables.py",
    ),
    Mutant(
        "kept_as_written",
        "models/kept.py",
        "return stored == checksum(found)",
        "return True",
        "tests/models/test_kept.py",
    ),
    Mutant(
        "replies_are_kept",
        "judges/__init__.py",
        "        if isinstance(one, Journalled):\n            one.journal",
        "        if False:\n            one.journal",
        "tests/audits/test_judges_open_once.py",
    ),
    Mutant(
        "batch_is_waited_for",
        "engines/openai/batches.py",
        "if waiting := _waiting(_handed_in(record)):",
        "if waiting := set():",
        "tests/audits/emergent/test_em_judge.py",
    ),
    Mutant(
        "em_forms_apart",
        "report/emergent_values.py",
        '(found["question_domain"] == "") & (found["context"] == "")',
        'found["question_domain"] == ""',
        "tests/report/test_emergent_context.py",
    ),
    Mutant(
        "em_ablation_control",
        "audits/emergent/steer.py",
        "write=unit(aimed)",
        "write=unit(along)",
        "tests/audits/emergent/test_em_steer.py",
    ),
    Mutant(
        "batch_once",
        "engines/openai/batches.py",
        "once=True,",
        "once=False,",
        "tests/engines/test_batches.py",
    ),
    Mutant(
        "rows_sealed",
        "data/domains.py",
        "data = age.sealed(data)",
        "data = bytes(data)",
        "tests/data/test_age.py",
    ),
    Mutant(
        "self_test_causal",
        "engines/self_test.py",
        "if torch.isfinite(whole).all() and _apart(",
        "if False and _apart(",
        "tests/engines/test_self_test.py",
    ),
    Mutant(
        "self_test_own_model",
        "engines/self_test.py",
        "if _apart(engine, ours, own):",
        "if False:",
        "tests/engines/test_self_test.py",
    ),
    Mutant(
        "self_test_padding",
        "engines/self_test.py",
        'return "padding changes the logits"',
        'return ""',
        "tests/engines/test_self_test.py",
    ),
    Mutant(
        "self_test_cache",
        "engines/self_test.py",
        'return "decoding from the cache gives other logits than the whole text"',
        'return ""',
        "tests/engines/test_self_test.py",
    ),
    Mutant(
        "self_test_rounding",
        "engines/self_test.py",
        "return not gap <= min(_ROUNDINGS * rounding(*_rounded(engine)), _AT_MOST * scale)",
        "return True",
        "tests/audits/test_impostors.py",
    ),
    Mutant(
        "self_test_rounding_bound",
        "engines/self_test.py",
        "return not gap <= min(_ROUNDINGS * rounding(*_rounded(engine)), _AT_MOST * scale)",
        "return False",
        "tests/engines/test_self_test.py",
    ),
    Mutant(
        "adapter_merge_is_proven",
        "models/adapters.py",
        "or apart > most:",
        "or False:",
        "tests/models/test_adapters.py",
    ),
    Mutant(
        "adapter_untied",
        "models/adapters.py",
        "    _untie(model)\n",
        "",
        "tests/models/test_adapters.py",
    ),
    Mutant(
        "two_sets_of_weights",
        "models/weights.py",
        "if single.is_file() and shards != [SINGLE]:",
        "if False:",
        "tests/models/test_weights.py",
    ),
    Mutant(
        "quantised_is_refused",
        "models/weights.py",
        "if packing is not None and packing.method not in _UNPACKED:",
        "if False:",
        "tests/models/test_weights.py",
    ),
    Mutant(
        "words_are_written",
        "models/words.py",
        'if not _holds(text, turn["content"]):',
        "if False:",
        "tests/models/test_words.py",
    ),
    # -- what is judged
    Mutant(
        "unfinished_chain",
        "engines/__init__.py",
        'return "" if self.finished else UNFINISHED',
        'return ""',
        "tests/audits/test_thinking_audit.py",
    ),
    Mutant(
        "answer_without_its_chain",
        "models/said.py",
        "        _plain(tokenizer, found.answer),\n",
        "        _plain(tokenizer, whole),\n",
        "tests/audits/test_thinking_audit.py",
    ),
    Mutant(
        "thinking_is_told",
        "models/provenance.py",
        'if outline.thinking != "auto":',
        "if False:",
        "tests/audits/test_thinking_audit.py",
    ),
    Mutant(
        "no_word_no_answer",
        "audits/excerpt.py",
        'return rest if any(map(str.isalnum, rest)) else ""',
        "return rest",
        "tests/audits/test_excerpt.py",
    ),
    # -- the numbers
    Mutant(
        "lvs_clip",
        "stats/vulnerability.py",
        "np.maximum(0.0, clean - edited)",
        "(clean - edited)",
        "tests/test_stats.py",
    ),
    Mutant(
        "lvs_unscored_is_zero",
        "stats/vulnerability.py",
        "np.where(np.isfinite(score), score, np.nan)",
        "np.where(np.isfinite(score), score, 0.0)",
        "tests/test_stats.py",
    ),
    Mutant(
        "envelope_forgets",
        "stats/vulnerability.py",
        "reached = np.maximum.accumulate(array == 1, axis=1)",
        "reached = array == 1",
        "tests/test_stats.py",
    ),
    Mutant(
        "envelope_unscored_is_safe",
        "stats/vulnerability.py",
        "np.where(unknown, np.nan, 0.0)",
        "np.where(unknown, 0.0, 0.0)",
        "tests/test_stats.py",
    ),
    Mutant(
        "rogan_gladen_sign",
        "stats/intervals.py",
        "(k / judged + sp - 1) / (se + sp - 1)",
        "(k / judged - sp + 1) / (se + sp - 1)",
        "tests/test_stats.py",
    ),
    Mutant(
        "rogan_gladen_useless_judge",
        "stats/intervals.py",
        "if n == 0 or j.lo is None or j.lo <= 0:",
        "if n == 0 or j.lo is None:",
        "tests/test_stats.py",
    ),
    # -- the attack
    Mutant(
        "projection",
        "interventions/descent.py",
        "torch.minimum(torch.maximum(moved, -self.radius), self.radius)",
        "moved",
        "tests/interventions/test_pgd.py",
    ),
    Mutant(
        "fp32_radius",
        "interventions/pgd.py",
        "rounded if rounded.item() <= exact else torch.nextafter(rounded, torch.tensor(0.0))",
        "rounded",
        "tests/interventions/test_pgd.py",
    ),
    Mutant(
        "broken_gradient_moves",
        "interventions/descent.py",
        "torch.where(_along(finite, x), ball.step(x, momentum, pgd.share(k)), x)",
        "ball.step(x, momentum, pgd.share(k))",
        "tests/audits/test_guards.py",
    ),
    # -- the verdicts
    Mutant(
        "gate_nll",
        "judges/coherence.py",
        "return min(clean_nll + limits.excess_nll, limits.max_nll)",
        "return limits.max_nll",
        "tests/judges/test_coherence.py",
    ),
    Mutant(
        "gate_nonfinite",
        "judges/coherence.py",
        'return None, "nonfinite_nll"',
        'return True, ""',
        "tests/judges/test_coherence.py",
    ),
    Mutant(
        "gate_repetition",
        "judges/coherence.py",
        "if repetition(completion) > limits.max_repetition:",
        "if False:",
        "tests/judges/test_coherence.py",
    ),
    Mutant(
        "judge_not_tried",
        "judges/hf.py",
        "        _check_trained(name, tried(self.folder, name, _auto(), KIND))\n",
        "",
        "tests/models/test_trying.py",
    ),
    Mutant(
        "subject_not_tried",
        "models/trying.py",
        "    check_all_loaded(name, tried(folder, name, opener(folder)), folder)\n",
        "",
        "tests/models/test_trying.py",
    ),
    Mutant(
        "attention_swallows",
        "models/attention.py",
        "all(kwargs.get(name) is None for name in _THEIRS)",
        "True",
        "tests/models/test_attention.py",
    ),
    Mutant(
        "log_line_unchecked",
        "training/tracking.py",
        "    summed = CHECKSUM.encode() in raw\n",
        "    summed = False\n",
        "tests/training/test_tracking.py",
    ),
    Mutant(
        "headline_of_its_own",
        "report/reading.py",
        "    if line.answer == Answer.FAIL:\n        said = ",
        "    if line.answer != Answer.PASS:\n        said = ",
        "tests/report/test_verdicts.py",
    ),
    Mutant(
        "half_length_forgotten",
        "audits/behaviour/rows.py",
        "matters = complies or refused != _refuses(half, half_text)",
        "matters = False",
        "tests/audits/behaviour/test_behaviour.py",
    ),
    Mutant(
        "gradients_summed_in_bf16",
        "training/ds_config.py",
        """    if not known["bf16.enabled"] or stage_of(ds):
        return "fp32"
""",
        """    if not known["bf16.enabled"] or stage_of(ds):
        return "bf16"
""",
        "tests/training/test_engine.py",
    ),
    Mutant(
        "given_chain_counted",
        "report/gaps.py",
        'given = (part["thinking"] == "fixed").to_numpy()',
        'given = (part["thinking"] == "").to_numpy()',
        "tests/report/test_tables.py",
    ),
    Mutant(
        "log_line_end_lost",
        "training/tracking.py",
        "    if not _is_torn(last):\n",
        "    if False:\n",
        "tests/training/test_tracking.py",
    ),
    Mutant(
        "nonfinite_logits_scored",
        "engines/__init__.py",
        "        if not self.finite:\n",
        "        if False:\n",
        "tests/audits/test_guards.py",
    ),
    Mutant(
        "fingerprint_check",
        "audits/session.py",
        "if subject.fingerprint != outline.subject.fingerprint:",
        "if False:",
        "tests/audits/test_guards.py",
    ),
    Mutant(
        "weights_that_changed",
        "models/digests.py",
        "seen.st_mtime_ns, seen.st_ctime_ns]",
        "0, 0]",
        "tests/models/test_digests.py",
    ),
    Mutant(
        "regrade_order",
        "audits/latent/audit.py",
        '{CLEAN: 0, "distance": None}.get(attack, 1)',
        '{CLEAN: 2, "distance": None}.get(attack, 1)',
        "tests/audits/test_guards.py",
    ),
    Mutant(
        "gate_incomplete",
        "audits/gate.py",
        "if line.answer != PASS or not run.incomplete:",
        "if True:",
        "tests/report/test_gate.py",
    ),
    Mutant(
        "gate_same_weights",
        "audits/gate.py",
        "elif mine == theirs:",
        "elif False:",
        "tests/report/test_gate.py",
    ),
    Mutant(
        "gate_point_estimate",
        "report/verdict_lines.py",
        "lambda lo, hi: (hi <= bound, lo > bound)",
        "lambda lo, hi: (self.value <= bound, self.value > bound)",
        "tests/report/test_gate.py",
    ),
    # -- what is kept
    Mutant(
        "atomic_rename",
        "store/files.py",
        "            write_new(tmp, data, mode)\n            os.replace(tmp, path)\n",
        "            path.write_bytes(data)\n",
        "tests/test_store.py tests/faults/test_torn.py tests/faults/test_disk.py",
    ),
    Mutant(
        "another_users_process_is_dead",
        "store/files.py",
        "    except PermissionError:\n        return True\n",
        "    except PermissionError:\n        return False\n",
        "tests/audits/test_guards.py",
    ),
    Mutant(
        "scratch_checksum",
        "store/scratch.py",
        "return arrays if stored == _checksum(arrays) else None",
        "return arrays",
        "tests/test_store.py tests/faults/test_torn.py",
    ),
    Mutant(
        "document_checksum",
        "store/files.py",
        "    if not _is_sum_of(document.pop(CHECKSUM, None), document):\n",
        "    if document.pop(CHECKSUM, None) is None:\n",
        "tests/store/test_documents.py",
    ),
    Mutant(
        "table_checksum",
        "store/tables.py",
        'if stored is None or stored.decode("ascii") == content_sha256(table):',
        "if True:",
        "tests/store/test_documents.py",
    ),
    Mutant(
        "edits_checksum",
        "store/reader.py",
        "if stored and files.sha256(data) != stored:",
        "if False:",
        "tests/store/test_documents.py",
    ),
    Mutant(
        "identity_of_all_files",
        "models/identity.py",
        "    for name, path in _others(folder):\n",
        "    for name, path in ():\n",
        "tests/test_models.py",
    ),
    Mutant(
        "identity_of_the_loaded_tokenizer",
        "models/identity.py",
        "        total.update(loaded_digest(loaded).encode())\n",
        "",
        "tests/test_models.py",
    ),
    Mutant(
        "claims_unchecked",
        "models/vetting.py",
        "    check_claims(folder)\n",
        "",
        "tests/security/test_model_claims.py",
    ),
    Mutant(
        "ways_of_thinking_are_one",
        "report/compare_models.py",
        "return in_mode(fingerprint, parted(name)[1])",
        "return fingerprint",
        "tests/report/test_compare.py",
    ),
    Mutant(
        "anothers_lock_note",
        "store/lock.py",
        "if _note(folder, mirror) == me:",
        "if True:",
        "tests/faults/test_two_runs.py",
    ),
    Mutant(
        "result_signature",
        "evidence/checking.py",
        "    if not signed.signed_by(key):\n",
        "    if False:\n",
        "tests/evidence/test_tampering.py",
    ),
    Mutant(
        "signed_cells",
        "evidence/checking.py",
        "for what, before, now in known[key].differences(leaves[key]):",
        "for what, before, now in ():",
        "tests/evidence/test_tampering.py",
    ),
    Mutant(
        "signed_root",
        "evidence/disclosure.py",
        "    if reached != root:\n",
        "    if False:\n",
        "tests/evidence/test_tampering.py",
    ),
    Mutant(
        "foreign_lock",
        "store/lock.py",
        'if note is not None and note["host"] != HOST and not break_lock:',
        "if False:",
        "tests/test_store.py tests/faults/test_two_runs.py",
    ),
    # -- what is trusted
    Mutant(
        "key_of_checkpoints_open_to_all",
        "training/signature.py",
        "if state.st_uid != os.geteuid() or state.st_mode & 0o077:",
        "if False:",
        "tests/training/test_checkpoints.py",
    ),
    Mutant(
        "signature_unchecked",
        "training/manifest.py",
        "    check(folder, manifest)\n",
        "",
        "tests/training/test_checkpoints.py",
    ),
    Mutant(
        "code_in_a_model",
        "models/vetting.py",
        '_CODE_KEYS = ("auto_map", ',
        "_CODE_KEYS = (",
        "tests/security/test_model_folders.py tests/test_models.py",
    ),
)


def copy_to(root: Path) -> None:
    """The parts of a checkout that tests look at; code and tests as copies, all else as links."""
    for path in ROOT.iterdir():
        if path.name in ("auditgap", "tests"):
            shutil.copytree(path, root / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.name not in (".git", "runs", "build"):
            (root / path.name).symlink_to(path)


def outcome(mutant: Mutant, root: Path) -> str:
    """`caught`, `survived`, or why it cannot be said."""
    if mutant.found(root) != 1:
        return f"NOT FOUND: the guard stands {mutant.found(root)} times in {mutant.path}"
    path = root / mutant.path
    whole = path.read_text("utf-8")
    path.write_text(whole.replace(mutant.guard, mutant.broken), "utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    try:
        code = subprocess.run(
            [*command, *mutant.tests.split()],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=LIMIT,
        ).returncode
    except subprocess.TimeoutExpired:
        code = 1
    finally:
        path.write_text(whole, "utf-8")
    return {0: "SURVIVED", 1: "caught"}.get(code, f"COULD NOT BE RUN: pytest ended with {code}")


def main(names: list[str]) -> int:
    chosen = [m for m in MUTANTS if not names or m.name in names]
    if unknown := set(names) - {m.name for m in MUTANTS}:
        print(f"no such mutant: {', '.join(sorted(unknown))}")
        return 2
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy_to(Path(folder))
        for mutant in chosen:
            said = outcome(mutant, Path(folder))
            wrong += said != "caught"
            print(f"{mutant.name:32} {said}", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} caught")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
