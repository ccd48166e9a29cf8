"""Every key of every recipe and overlay, damaged by name or type or left empty: five lines at most that name it."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import yaml

from hornet_lit import recipes

from .command import Accepted, Answer, ask, empty_folder
from .row import Row

FEW = 12  # of the fast subset
RANGES = {
    "model": {
        "lr": (0, -1, ".nan", ".inf"),
        "min_lr": (-1, ".nan"),
        "weight_decay": (-0.1, ".nan", ".inf"),
        "layer_decay": (0, 2, ".nan"),
        "warmup_epochs": (-1, ".nan", ".inf"),
        "label_smoothing": (-1, 2, ".nan"),
        "drop_path_rate": (-1, 2, ".nan"),
        "mixup": (-1, ".nan", ".inf"),
        "cutmix": (-1, ".nan"),
        "mix_prob": (-1, 2),
        "mix_switch_prob": (-1, 2),
        "ema_decay": (-1, 1, 2, ".nan"),
        "ema_start_epoch": (-1, ".nan"),
        "num_classes": (0, -1),
        "in_chans": (0, -1, 4),
        "img_size": (0, -1),
    },
    "data": {
        "batch_size": (0, -1),
        "batch_size_per_device": (0, -1),
        "eval_batch_size": (0, -1),
        "num_workers": (-1,),
        "seed": (-1,),
        "img_size": (0, -1),
        "in_chans": (0, 2),
        "hflip": (-1, 2, ".nan"),
        "reprob": (-1, 2, ".nan"),
        "val_fraction": (0, 1, ".nan"),
        "crop_pct": (0, -1, 2, ".nan"),
        "color_jitter": (-1, ".nan"),
        "remode": ("pixels",),
        "views": ("centre",),
        "scale": ("[0, 0]", "[-1, 1]", "[0.5, 0.1]", "[.nan, 1]"),
        "ratio": ("[0, 1]", "[-1, 1]", "[2, 1]"),
        "mean": ("[1]", "[.nan, 0, 0]"),
        "std": ("[0, 1, 1]", "[-1, 1, 1]"),
    },
    "trainer": {
        "max_epochs": (-5,),
        "max_steps": (-5,),
        "devices": (0, -2, 10**9),
        "num_nodes": (0, -1),
        "log_every_n_steps": (-1,),
        "check_val_every_n_epoch": (0, -1),
        "gradient_clip_val": (-1, ".nan"),
        "limit_train_batches": (-1, 2.5),
        "precision": ("bf17",),
        "fast_dev_run": (-1,),
    },
}  # values of the right type that no training can have
ON_CPU = ("--trainer.accelerator", "cpu")
Place = tuple[str | int, ...]


def rows(*, thorough: bool) -> Iterator[Row]:
    """One row per recipe and kind of damage, and one per key that is not answered rightly."""
    damages = [
        (recipe, place, kind)
        for recipe in recipes.all_recipes()
        for place in places(read(recipe))
        for kind in ("wrong name", "wrong type", "no value")
    ]
    if not thorough:
        damages = random.Random(0).sample(damages, FEW)
    counts: dict[tuple[str, str], list[bool]] = {}
    with empty_folder():
        for recipe, place, kind in damages:
            answer, key = damaged(recipe, place, kind)
            # A misspelt key must be answered with the right one.
            hint = str(place[-1]) if kind == "wrong name" else ""
            right = answer.is_told and key in answer.text and hint in answer.text.replace(key, "")
            right = right or (kind == "no value" and isinstance(answer.raised, Accepted))  # null may stand there
            counts.setdefault((recipe.name, kind), []).append(right)
            if not right:
                yield Row(case=f"{recipe.name}: {key}, {kind}", outcome=str(answer), right=False)
    for (name, kind), right in counts.items():
        yield Row(case=f"{name}: {kind}", outcome=f"{sum(right)} of {len(right)} keys told", right=all(right))
    if thorough:
        yield from out_of_range()


def out_of_range() -> Iterator[Row]:
    """One row per value that is not answered rightly, and one for all."""
    right = []
    with empty_folder():
        for room, keys in RANGES.items():
            for key, values in keys.items():
                for value in values:
                    answer = ask(["fit", "--config", "hornet_t_in1k", *ON_CPU, f"--{room}.{key}={value}"])
                    right.append(answer.is_told and key in answer.text)
                    if not right[-1]:
                        yield Row(case=f"{room}.{key} {value}", outcome=str(answer), right=False)
    yield Row(case="values out of range", outcome=f"{sum(right)} of {len(right)} told", right=all(right))


def read(recipe: recipes.Recipe) -> dict[str, Any]:
    return yaml.safe_load(recipe.path.read_text(encoding="utf-8"))


def places(values: Any, place: Place = ()) -> Iterator[Place]:
    """The paths of all keys."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        if isinstance(key, str):
            yield (*place, key)
        yield from places(value, (*place, key))


def damaged(recipe: recipes.Recipe, place: Place, kind: str) -> tuple[Answer, str]:
    """(what fit says, the key that it must name)."""
    values = copy.deepcopy(read(recipe))
    if weights := values.get("model", {}).get("weights"):
        open(weights, "wb").close()  # a missing file would be told first; no weights are read here
    *parents, key = place
    inside = values
    for parent in parents:
        inside = inside[parent]
    assert isinstance(key, str)
    if kind == "wrong name":
        new = misspelt(key, taken=inside)
        items = [(new if name == key else name, value) for name, value in inside.items()]
        inside.clear()
        inside.update(items)
        key = new
    else:
        inside[key] = other_type(inside[key]) if kind == "wrong type" else None
    with open("damaged.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(values, file, sort_keys=False)
    base = []
    if recipe.is_overlay:
        base = ["--config", "hornet_t_in1k" if "imagenet" in recipe.name else "digits"]
    on_cpu = () if place == ("trainer", "accelerator") else ON_CPU
    return ask(["fit", *base, "--config", "damaged.yaml", *on_cpu]), dotted((*parents, key))


def misspelt(key: str, *, taken: Any) -> str:
    """With a letter doubled, dropped or two swapped, by the key's length."""
    half = len(key) // 2
    ways = [key[:half] + key[half - 1 :], key[:half] + key[half + 1 :], key[: half - 1] + key[half] + key[half - 1 :]]
    return next(way for way in ways[len(key) % 3 :] + ways if way not in taken and way != key)


def other_type(value: Any) -> Any:
    """A value that no option takes which takes `value`."""
    match value:
        case bool():
            return "perhaps"
        case int() | float():
            return "many"
        case str():
            return [{"a": 1}]
        case list() | dict():
            return 3
        case None:
            return {"a": [1]}
    raise AssertionError(value)


def dotted(place: Place) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")
