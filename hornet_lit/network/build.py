"""Building a timm-registered network with errors a user can act on."""

from __future__ import annotations

import difflib
import inspect
import re
from typing import Any

import timm
from torch import nn

from hornet_lit.network.hornet import HorNet


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
        ValueError: for an unknown network, or an option that it does not take; names the nearest valid name.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f": did you mean {' or '.join(near)}?" if near else "; timm.list_models() lists them"
        raise ValueError(f"no network named {name!r}{hint}")
    kwargs: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans, "drop_path_rate": drop_path_rate}
    if img_size is not None:
        kwargs["img_size"] = img_size
    try:
        return timm.create_model(name, **kwargs, **(options or {}))
    except TypeError as error:
        unexpected = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unexpected is None:
            raise
        option = unexpected.group(1)
        near = difflib.get_close_matches(option, inspect.signature(HorNet).parameters, n=1)
        mend = f"did you mean {near[0]!r}?" if near else "remove it from the model's settings"
        raise ValueError(f"{name} takes no option {option!r}: {mend}") from error
