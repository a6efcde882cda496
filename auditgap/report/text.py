"""How a report writes numbers and strangers' text: nulls as words, control characters out, hidden
ones made visible.

    percent(0.958)             -> '96 %'
    number(None)               -> 'not measured'
    with_interval(4.914, 3.2, 6.83)  -> '4.914 [3.200, 6.830]'
    with_interval(0.58, 0.38, 0.79, percent)  -> '58 % [38, 79]'
    clean("a\\x1b[31mb\\u202ec")  -> 'ab⟦U+202E⟧c'

Everything that comes from a model, a prompt or a user passes `clean` before it reaches a page. That
makes it legible, not safe: the escaping is jinja2's and markupsafe's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

NOT_MEASURED = "not measured"
UNSCORED = "unscored"
CANNOT_TELL = "could not tell"

#: Terminal escapes: CSI (also the one-byte C1 form), OSC/DCS strings with their terminator,
#: two-character escapes.
_ANSI = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[\\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\\\|\x9c)|\x1b["
    " -/]*[0-~]"
)
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
#: What a reader cannot see but a page obeys: bidi controls, zero-width characters, separators,
#: tags, lone surrogates.
#: ZWJ and ZWNJ stay as they are: emoji and several scripts need them.
_HIDDEN = re.compile(
    "[\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
_SECRET = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{12,}|sk-[A-Za-z0-9_-]{16,})|(?<=_TOKEN=)\S+|(?<=_KEY=)\S+"
)
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:token|api_?key|secret|password|authorization)$", re.IGNORECASE
)


def clean(text: object) -> str:
    """`text` without terminal escapes and control characters, with invisible characters written as
    ⟦U+XXXX⟧."""
    text = str(text).replace("\r\n", "\n")
    text = _CONTROL.sub("", _ANSI.sub("", text))
    text = _HIDDEN.sub(lambda m: f"⟦U+{ord(m.group()):04X}⟧", text)
    return _SECRET.sub("[secret removed]", text)


def shorten(text: object, width: int = 28) -> str:
    """`text` cleaned and cut in the middle, so that two long names with equal beginnings stay
    apart."""
    text = " ".join(clean(text).split())
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[-(width - 1 - head) :]}"


def called(names: Mapping[str, str], name: object) -> str:
    """A subject as the page calls it."""
    return names.get(str(name), str(name))


_FOLDER = re.compile(r"(?:\.{0,2}|~)/\S+|[A-Za-z]:\\\S+|\S+/\S+/\S+")


def short_names(names: Iterable[str]) -> dict[str, str]:
    """What a page calls subjects: their own names, and of a folder its last part, with as many
    folders before it as tell it from the others."""
    every = list(dict.fromkeys(names))
    short = dict(zip(every, every, strict=True))
    parts = {
        name: re.split(r"[/\\]+", name.rstrip("/\\")) for name in every if _FOLDER.fullmatch(name)
    }
    for name, mine in parts.items():
        for k in range(1, len(mine) + 1):
            tail = "/".join(mine[-k:])
            others = (o for o in every if o != name)
            if not any(
                o == tail or o.replace("\\", "/").rstrip("/").endswith(f"/{tail}") for o in others
            ):
                short[name] = tail
                break
    return short


def is_null(value: object) -> bool:
    """None, NaN, NaT and pandas' NA: values that were not measured."""
    if value is None:
        return True
    try:
        return bool(value != value)
    except TypeError:  # pandas.NA answers `!=` with NA, which has no truth
        return True


def _signed(text: str) -> str:
    return text.replace("-", "\u2212")


def number(value: object, digits: int = 3, null: str = NOT_MEASURED) -> str:
    """A number with `digits` decimals; one too small for them keeps its size (4e−05), and null
    stays null."""
    if is_null(value):
        return null
    value = float(value)  # type: ignore[arg-type]
    if math.isinf(value):
        return "∞" if value > 0 else "\u2212∞"
    if value and abs(value) < 0.5 * 10**-digits:
        return _signed(f"{value:.1e}")
    return _signed(f"{value:.{digits}f}")


def percent(value: object, digits: int = 0, null: str = NOT_MEASURED) -> str:
    """A share (0–1) as a percentage. A share that is not 0 or 1 is never printed as 0 % or 100
    %."""
    if is_null(value):
        return null
    hundred = 100.0 * float(value)  # type: ignore[arg-type]
    text = f"{hundred:.{digits}f}"
    if float(text) in (0.0, 100.0) and 1e-9 < hundred < 100 - 1e-9:
        step = 10.0**-digits
        text = f"<\u2009{step:g}" if hundred < 50 else f">\u2009{100 - step:g}"
    return _signed(f"{text}\u00a0%")


def points(
    value: object, digits: int = 0, null: str = NOT_MEASURED, unit: str = "\u00a0points"
) -> str:
    """A difference of two shares (−1 to 1) in percentage points; one that is not 0 is never printed
    as 0."""
    if is_null(value):
        return null
    hundred = 100.0 * float(value)  # type: ignore[arg-type]
    text = f"{hundred:.{digits}f}"
    if float(text) == 0:
        text = f"{hundred:.1g}" if abs(hundred) > 1e-9 else "0"
    return _signed(text) + unit


def with_interval(
    value: object, lo: object, hi: object, form: Any = number, null: str = NOT_MEASURED
) -> str:
    """`value [lo, hi]`, each through `form`; the unit is named once. Says so when a value has no
    interval."""
    if is_null(value):
        return null
    return f"{form(value)}\u00a0{interval(lo, hi, form)}"


def interval(lo: object, hi: object, form: Any = number) -> str:
    """`[lo, hi]` without the unit that `form` puts after a number; `?` for an end that could not be
    told."""
    if is_null(lo) and is_null(hi):
        return "[no interval]"
    ends = (
        "?" if is_null(end) else form(end).removesuffix("\u00a0%").removesuffix("\u00a0points")
        for end in (lo, hi)
    )
    return "[{},\u00a0{}]".format(*ends)


def plain(value: Any) -> str:
    """A config or info value as one readable line: lists joined by commas, mappings as `key:
    value`."""
    if isinstance(value, (Mapping, list, tuple, set, frozenset)):
        if not value:
            return "none"
    elif is_null(value):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return "; ".join(f"{key}: {plain(item)}" for key, item in without_secrets(value).items())
    if isinstance(value, (list, tuple, set, frozenset)):
        return ", ".join(plain(item) for item in value)
    return str(value)


def without_secrets(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping with the values of keys such as `hf_token` or `api_key` taken out, at every
    depth."""

    def safe(key: object, value: Any) -> Any:
        if isinstance(value, str) and value and _SECRET_NAME.search(str(key)):
            return "[secret removed]"
        return without_secrets(value) if isinstance(value, Mapping) else value

    return {str(key): safe(key, value) for key, value in mapping.items()}
