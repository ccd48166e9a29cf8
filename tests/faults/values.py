"""Property tests: whatever a recipe holds, the command accepts it, or says in at most five lines why not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from hornet_lit import recipes

from .command import Accepted, Answer, ask, empty_folder
from .keys import places, read
from .row import Row

THOROUGH, FAST = 2500, 50
PLAIN = ["digits", "cifar10_quick", "hornet_t_in1k", "finetune_folder"]

numbers = st.one_of(
    st.integers(-(10**6), 10**6),
    st.sampled_from([2**31, 2**63, -(2**63), 2**64, 10**30, 10**400]),
    st.floats(),
    st.sampled_from([0, -1, 1, 0.5, 1e308, -0.0]),
)
texts = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "null", "~", ".nan", "0x10", "1_000", "1e3", "yes", "../..", "/dev/zero", "a" * 5000, "\u202e", "\x1b[31m"]
    ),
    st.sampled_from(
        ["os.system", "evil.Thing", "lightning.pytorch.callbacks.Timer", "!!python/object:os.system", "${x}"]
    ),
    st.sampled_from(["{", "[1, 2", "{a: 1}", "[[]]", "class_path: x", "@file", "--x", "-1", "*", "&a", "2020-13-45"]),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts, st.binary(max_size=8), st.dates())
names = st.one_of(
    st.sampled_from(["class_path", "init_args", "dict_kwargs", "lr", "0", "", "a.b", "callbacks+", "<<"]),
    st.text(max_size=8),
)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(names, numbers), inner, max_size=4)),
    max_leaves=12,
)
raw = st.sampled_from(
    [
        "!!python/object/apply:os.system ['touch proof']",
        "!!python/name:os.system",
        "!!python/object/new:subprocess.Popen [['touch', 'proof']]",
        "!!binary aGVsbG8=",
        "!!set {a, b}",
        "!!omap [a: 1]",
        "!!timestamp 2020-99-99",
        "!!int 'x'",
        "!!float ''",
        "!unknown x",
        "&a [*a]",
        "*nowhere",
        "{<<: {lr: 1}}",
        "{<<: 3}",
        "[" * 3000,
        "{a: " * 3000,
        "? [a]\n: b",
        "1" * 5000,
        "0b_",
        "1:60:60",
        "{1: 2, 1: 3}",
        "|\n  text",
        "\x00",
        "\u2028",
        "%TAG ! x",
        "--- 1\n--- 2",
    ]
)


def rows(*, thorough: bool) -> Iterator[Row]:
    """One row per property; the example that a failure shrinks to in its outcome."""
    most = THOROUGH if thorough else FAST
    with empty_folder():
        yield tried("random values at random keys of recipes", changed_recipe, values_at_keys(), most * 7 // 10)
        yield tried("tags and broken YAML at random keys", changed_text, st.tuples(anywhere(), raw), most // 10)
        yield tried("random text as a recipe", as_recipe, st.text().map(encoded), most // 10)
        yield tried("random bytes as a recipe", as_recipe, st.binary(max_size=300), most // 10)


def encoded(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def tried(case: str, command: Callable[[Any], Answer], strategy: st.SearchStrategy[Any], most: int) -> Row:
    count, wrong = 0, []

    @settings(
        max_examples=most,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],  # each try takes a tenth of a second: all failures are collected, none is shrunk
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def holds(example: Any) -> None:
        nonlocal count
        count += 1
        answer = command(example)
        accepted = isinstance(answer.raised, Accepted) or (answer.code == 0 and answer.raised is None)
        steered = any(not (c.isprintable() or c in "\n\t") for c in answer.text)
        if not (accepted or answer.is_told) or steered or Path("proof").exists():
            wrong.append(f"{example!r:.200}: {answer}")

    holds()
    outcome = f"{count} tries, {len(wrong)} not told" + "".join(f"\n{each}" for each in wrong[:8])
    return Row(case=case, outcome=outcome, right=not wrong)


def anywhere() -> st.SearchStrategy[tuple[str, tuple[str | int, ...]]]:
    """(recipe, path of a key in it)."""
    found = [(name, place) for name in PLAIN for place in places(_recipe(name))]
    return st.sampled_from(found)


def values_at_keys() -> st.SearchStrategy[tuple[tuple[str, tuple[str | int, ...]], Any, str | None]]:
    """(where, value, name of a key to add there; None: the value takes the place of what is there)."""
    return st.tuples(anywhere(), values, st.one_of(st.none(), st.none(), names))


def changed_recipe(example: tuple[tuple[str, tuple[str | int, ...]], Any, str | None]) -> Answer:
    (name, place), value, added = example
    whole = copy.deepcopy(_recipe(name))
    inside = whole
    for part in place[:-1]:
        inside = inside[part]
    inside[place[-1] if added is None else added] = value
    return as_recipe(encoded(yaml.safe_dump(whole, allow_unicode=True)))


def changed_text(example: tuple[tuple[str, tuple[str | int, ...]], str]) -> Answer:
    (name, place), text = example
    whole = copy.deepcopy(_recipe(name))
    inside = whole
    for part in place[:-1]:
        inside = inside[part]
    mark = "HERE"
    inside[place[-1]] = mark
    return as_recipe(encoded(yaml.safe_dump(whole).replace(mark, text)))


def as_recipe(content: bytes) -> Answer:
    Path("random.yaml").write_bytes(content)
    return ask(["fit", "--config", "random.yaml"])


def _recipe(name: str) -> dict[str, Any]:
    recipe = recipes.find(name)
    assert recipe is not None
    found = read(recipe)
    found["trainer"]["accelerator"] = "cpu"
    found["model"].pop("weights", None)  # a missing file would be told before anything else
    return found
