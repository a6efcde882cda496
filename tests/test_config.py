"""Flags and YAML into one frozen config: what is refused, in which words, and who wins."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from auditgap.audits.latent import LatentConfig
from auditgap.audits.latent.audit import LATENT
from auditgap.config import overrides
from auditgap.errors import Refused, UsageError
from auditgap.types import ATTACKS, Budget


def written(tmp_path: Path, text: str | bytes) -> Path:
    file = tmp_path / "audit.yaml"
    file.write_bytes(text.encode("utf-8") if isinstance(text, str) else text)
    return file


def refused(tmp_path: Path, text: str | bytes, kind: type[Exception] = UsageError) -> str:
    """The one sentence that a config file gets."""
    with pytest.raises(kind) as caught:
        LATENT.read(written(tmp_path, text), {})
    said = str(caught.value)
    assert said and "\n" not in said and len(said) < 1500
    assert type(caught.value) is kind
    return said


# -- what is read
# ------------------------------------------------------------------------------------------------------


def test_defaults_are_the_method():
    config, options = LATENT.read(None, {"models": "smollm2"})
    assert config.models == ("smollm2",)
    assert (config.unit, config.eps) == ("rms", (0.01, 0.03, 0.1))
    assert (config.steps, config.pgd.schedule, config.pgd.iterate, config.max_new_tokens) == (
        10,
        "decreasing",
        "best",
        128,
    )
    assert (
        config.attacks == tuple(ATTACKS)
        and config.target == "Sure, here is {topic}"
        and config.layers == "embedding,mid,last"
    )
    assert (options.executor, options.device, options.out) == ("local", "auto", None)


@pytest.mark.parametrize("unit", ["max", "absolute"])
def test_the_papers_sizes_are_the_defaults_of_its_units(unit):
    assert LATENT.read(None, {"models": "m", "unit": unit})[0].eps == (0.0005, 0.001, 0.005)


def test_file_and_flags_say_the_same(tmp_path):
    file = written(
        tmp_path,
        "models: [a, b]\nlayers: [embedding, 3]\neps: [0.1, 0.02]\nattacks: [random,"
        " targeted]\nlimit: 7\n",
    )
    flags = {
        "models": ["a", "b"],
        "layers": "embedding,3",
        "eps": "0.02,0.1",
        "attacks": "targeted,random",
        "limit": 7,
    }
    assert LATENT.read(file, {}) == LATENT.read(None, flags)


def test_flags_win_over_the_file(tmp_path):
    file = written(tmp_path, "models: [a]\nunit: max\neps: [0.5]\nsteps: 3\nout: there\n")
    config, options = LATENT.read(
        file, {"models": ["b"], "eps": "0.2", "steps": None, "out": "here"}
    )
    assert (config.models, config.unit, config.eps, config.steps, options.out) == (
        ("b",),
        "max",
        (0.2,),
        3,
        "here",
    )


def test_a_flag_that_was_not_given_does_not_win(tmp_path):
    config, _ = LATENT.read(written(tmp_path, "models: [a]\ndistance: true\n"), {"distance": None})
    assert config.distance


@pytest.mark.parametrize(
    "eps", ["1e-3,0.001", [0.001, "1e-3"], "0.001, 1e-3 ,1.0e-03", [1e-3, 0.001]]
)
def test_one_size_written_in_two_ways_is_one_size(eps):
    assert LATENT.read(None, {"models": "m", "eps": eps})[0].eps == (0.001,)


def test_sizes_come_in_order():
    config, _ = LATENT.read(None, {"models": "m", "eps": "0.1,0.02,0.3"})
    assert config.budgets == (Budget(0.02, "rms"), Budget(0.1, "rms"), Budget(0.3, "rms"))


def test_a_config_is_frozen():
    config = LatentConfig(models="m")
    with pytest.raises(ValueError):
        config.steps = 3
    # the run folder keeps it as JSON
    assert LatentConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    assert LATENT.read(written(tmp_path, b"\xef\xbb\xbfmodels: [a]\n"), {})[0].models == ("a",)


# -- what is refused
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [k for k in ("epss", "model", "layer", "max_new_token", "max-new-tokens", "Eps", "retry_fail")],
)
def test_an_unknown_key_and_what_was_meant(tmp_path, key):
    said = refused(tmp_path, f"models: [m]\n{key}: 1\n")
    meant = {
        "epss": "eps",
        "model": "models",
        "layer": "layers",
        "max_new_token": "max_new_tokens",
        "Eps": "eps",
        "max-new-tokens": "max_new_tokens",
        "retry_fail": "retry_failed",
    }[key]
    assert f"Unknown config key '{key}'" in said and f"Did you mean '{meant}'?" in said


@pytest.mark.parametrize("key", ["1", "null", "true", "[a]", "2020-01-01"])
def test_keys_that_are_no_words(tmp_path, key):
    refused(tmp_path, f"models: [m]\n? {key}\n: 1\n")


BAD_EPS = [
    "0",
    "-0.1",
    "nan",
    "inf",
    "-inf",
    "abc",
    "1e999",
    "0.01,abc",
    "0.01;0.03",
    "0x1",
    "1e-400",
]


@pytest.mark.parametrize("eps", BAD_EPS)
def test_eps_on_the_command_line(eps):
    with pytest.raises(
        UsageError, match=r"^--eps must be .*finite.*above 0.*came.*xample: --eps 0"
    ):
        LATENT.read(None, {"models": "m", "eps": eps})


@pytest.mark.parametrize(
    "eps",
    [
        *(f"['{e}']" for e in BAD_EPS),
        "0",
        "-0.1",
        ".nan",
        "-.inf",
        "[null]",
        "[[0.1]]",
        "{a: 1}",
        "[{a: 1}]",
        "2020-01-01",
        "no",
    ],
)
def test_eps_in_a_file(tmp_path, eps):
    assert refused(tmp_path, f"models: [m]\neps: {eps}\n").startswith("--eps must be")


@pytest.mark.parametrize("eps", ["true", "[yes, 0.1]"])
def test_eps_that_is_yes(tmp_path, eps):
    refused(tmp_path, f"models: [m]\neps: {eps}\n")


@pytest.mark.parametrize("eps", ["", ",", " , "])
def test_eps_of_nothing(eps):
    with pytest.raises(UsageError):
        LATENT.read(None, {"models": "m", "eps": eps})


def test_eps_beyond_floats(tmp_path):
    refused(tmp_path, f"models: [m]\neps: [{10**400}]\n")


WRONG = {
    "steps": ["0", "-1", "1.5", "ten", "[1]", "null"],
    "restarts": ["0", "x"],
    "draws": ["0", "65"],
    "max_new_tokens": ["0", "many"],
    "limit": ["0", "-3", "all", "1.5"],
    "iterate": ["first", "1"],
    "schedule": ["cosine", "1"],
    "unit": ["RMS", "l2", "1"],
    "executor": ["slurm", "null"],
    "target": ["''", "[a]", "1", "'{topic}'"],
    "seed": ["x", "1.5"],
    "distance": ["2", "perhaps"],
    "distance_limit": ["1", "nothing"],
    "bisections": ["-1", "21"],
    "models": ["{a: 1}", "[1]", "[[a]]", "3"],
    "judge": ["[a]", "1"],
    "batch_tokens": ["15", "x"],
    "workers": ["0"],
    "gpus_per_worker": ["-1"],
    "untargeted_tokens": ["0"],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_wrong_values_name_their_key(tmp_path, key, value):
    said = refused(
        tmp_path, f"models: [m]\n{key}: {value}\n" if key != "models" else f"{key}: {value}\n"
    )
    assert key in said or f"--{key}" in said
    assert "came" in said


@pytest.mark.parametrize("text", ["unit: [rms]", "unit: {a: 1}"])
def test_a_unit_that_is_a_list(tmp_path, text):
    refused(tmp_path, f"models: [m]\n{text}\n")


@pytest.mark.parametrize("attack", ["target", "randomm", "clean", "PGD", "Targeted"])
def test_an_unknown_attack(attack):
    with pytest.raises(UsageError, match="--attacks takes targeted") as caught:
        LATENT.read(None, {"models": "m", "attacks": f"random,{attack}"})
    assert repr(attack) in str(caught.value)
    assert attack != "randomm" or "Did you mean 'random'" in str(caught.value)


@pytest.mark.parametrize("models", [None, [], "", ","])
def test_no_model(models):
    with pytest.raises(UsageError):
        LATENT.read(None, {"models": models})


@pytest.mark.parametrize("value", ["true", "1", "'yes'", "[a]"])
def test_foreign_code_is_refused(tmp_path, value):
    said = refused(tmp_path, f"models: [m]\ntrust_remote_code: {value}\n", Refused)
    assert "trust_remote_code" in said
    with pytest.raises(Refused) as caught:
        LATENT.read(None, {"models": "m", "trust_remote_code": True})
    assert caught.value.exit_code == 4


# -- files that are no configs
# -----------------------------------------------------------------------------------------

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "mapping"),
    "only a comment": ("# nothing\n", "mapping"),
    "a list": ("- models\n- eps\n", "mapping"),
    "a word": ("models\n", "mapping"),
    "not UTF-8": (b"models: [caf\xe9]\n", "UTF-8"),
    "UTF-16": ("models: [a]\n".encode("utf-16"), "UTF-8"),
    "a bomb of aliases": (BOMB, "aliases"),
    "an alias of itself": ("models: &a [*a]\n", "aliases"),
    "a merge key": ("x: &x {models: [m]}\n<<: *x\n", "aliases"),
    "broken": ("models: [a\n", "YAML"),
    "tabs": ("models:\n\t- a\n", "YAML"),
    "a control character": (b"models: [a\x00b]\n", "YAML"),
    "a Python object": ("models: !!python/object/apply:os.system ['true']\n", "YAML"),
    "two documents": ("models: [a]\n---\nmodels: [b]\n", "YAML"),
    "too deep": ("[" * 5000 + "]" * 5000, "YAML"),
    "a key that is a mapping": ("? {a: 1}\n: 2\n", "YAML"),
    "too large": ("#" * 1_000_001, "bytes"),
    "a pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00", "UTF-8"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_config(tmp_path, case):
    text, word = FILES[case]
    said = refused(tmp_path, text)
    assert word in said and "--config" in said and "audit.yaml" in said


@pytest.mark.parametrize(
    "text", ["limit: 2020-13-45", f"limit: {'9' * 5000}"], ids=["a 13th month", "5,000 digits"]
)
def test_scalars_that_yaml_cannot_make(tmp_path, text):
    refused(tmp_path, f"models: [m]\n{text}\n")


def test_no_file(tmp_path):
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(UsageError, match="no such file"):
            LATENT.read(path, {})


# -- budgets
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1.0, math.nan, math.inf, True, "0.1", None, [0.1]])
def test_a_budget_is_a_finite_number_above_0(size):
    with pytest.raises(UsageError, match="--eps"):
        Budget(size, "rms")


def test_a_budget_has_a_unit():
    with pytest.raises(UsageError, match="--unit must be one of rms, max, absolute"):
        Budget(0.1, "l2")
    assert str(Budget(1e-3, "max")) == "0.001 max" and Budget(1, "rms") == Budget(1.0, "rms")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("models: smollm2\nmodels: other\n", "models"),
        ("models: smollm2\nshard: {a: 1, a: 2}\n", "a"),
        ("models: smollm2\n1: a\n0x1: b\n", "0x1"),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, text, key):
    """YAML has the last one count, at any depth and however it is written."""
    said = refused(tmp_path, text)
    assert f"the key '{key}' stands twice" in said and "line" in said


def test_a_key_that_stands_twice_in_set_is_refused():
    with pytest.raises(UsageError, match="--set lvs: the key 'a' stands twice"):
        overrides(["lvs={a: 1, a: 2}"])
