"""Building a timm-registered network with errors a user can act on."""

from __future__ import annotations

import difflib
import inspect
import re
from typing import Any

import timm
from torch import nn

from hornet_lit.network.hornet import HorNet

FILES = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")  # of timm: they load


def build_network(
    name: str,
    *,
    num_classes: int,
    in_chans: int = 3,
    img_size: int | None = None,
    drop_path_rate: float = 0.0,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """`timm.create_model` for any registered network.

    Args:
        name: as registered with timm.
        num_classes, in_chans, drop_path_rate: as timm's.
        img_size: handed on unless None.
        options: further keyword arguments of the network.

    Raises:
        ValueError: for an unknown network, an option that it does not take (names the nearest valid name) or a value
            that it cannot have, and for timm's options that load files: a recipe or checkpoint could name one.
    """
    if not isinstance(name, str) or not timm.is_model(name):
        near = difflib.get_close_matches(str(name), timm.list_models(), n=3)
        hint = f": did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists them"
        raise ValueError(f"model.network: no network named {name!r}{hint}")
    kwargs: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans, "drop_path_rate": drop_path_rate}
    if img_size is not None:
        kwargs["img_size"] = img_size
    for option in set(options or {}) & {*FILES, *kwargs}:
        mend = "weights are given as model.weights, which never runs code" if option in FILES else f"set model.{option}"
        raise ValueError(f"model.network_options.{option} is refused: {mend}")
    try:
        return timm.create_model(name, **kwargs, **(options or {}))
    except Exception as error:  # a value that a network cannot have raises whatever it comes to, anywhere in it
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if isinstance(error, TypeError) and unexpected is not None:
            option = unexpected.group(1)
            if option == "img_size" and img_size is not None:
                raise ValueError(
                    f"model.img_size: {name} takes no option 'img_size': set model.img_size null"
                ) from error
            near = difflib.get_close_matches(option, inspect.signature(HorNet).parameters, n=1)
            mend = f"did you mean {near[0]!r}?" if near else "remove it from the model's settings"
            raise ValueError(f"model.network_options.{option}: {name} takes no option {option!r}: {mend}") from error
        given = ", ".join(f"model.network_options.{key} {value!r}" for key, value in (options or {}).items())
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise ValueError(
                f"{name} with {kwargs} {given[:200]} does not fit into the memory: make it smaller"
            ) from error
        if not options:
            raise
        reason = str(error)[:200] or type(error).__name__
        for key, value in options.items():
            default = getattr(inspect.signature(HorNet).parameters.get(key), "default", None)
            if isinstance(default, int | float) and not isinstance(value, int | float):
                reason = f"expected a number such as {default} for {key}"
        raise ValueError(f"{name} cannot be built with {given[:200]}: {reason}") from error
