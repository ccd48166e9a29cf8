"""hornet-lit convert: a sharded checkpoint as one file that any strategy resumes, or any checkpoint's weights alone."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

from hornet_lit.cli_errors import UserError
from hornet_lit.cli_parts import OptionParser
from hornet_lit.durable import whole_file

FORMATS = (".ckpt", ".safetensors")


def run(words: list[str]) -> None:
    """Runs `convert` with the options ``words``; UserError for what the user can mend."""
    parser = OptionParser(
        prog="hornet-lit convert",
        description="One file out of a checkpoint. OUTPUT.ckpt: the whole of a sharded checkpoint (weights, averaged "
        "weights, optimizer, position), to resume on any number of devices. OUTPUT.safetensors: weights alone, for "
        "--model.weights and hornet_lit.load_weights, with their digest in OUTPUT.safetensors.sha256.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a .ckpt of hornet-lit, file or folder")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="a new file, *.ckpt or *.safetensors")
    parser.add_argument(
        "--weights",
        choices=("auto", "ema", "raw"),
        help="for *.safetensors: averaged (EMA) or raw weights; auto, the default: averaged where there are any",
    )
    options = parser.parse_args(words)
    _check(options.checkpoint, options.output, options.weights)
    _convert(options.checkpoint, options.output, options.weights or "auto")
    print(options.output)


def _check(checkpoint: Path, output: Path, weights: str | None) -> None:
    if output.suffix not in FORMATS:
        raise UserError(
            f"{output}: its name must end in {' or '.join(FORMATS)}\n"
            ".ckpt is a whole checkpoint, to resume; .safetensors the weights alone"
        )
    if os.path.lexists(output):
        raise UserError(f"{output} exists and is not overwritten\nname another file, or remove it first")
    if not output.absolute().parent.is_dir():
        raise UserError(f"{output}: no such folder {output.parent}\nmake it first")
    if output.suffix == ".ckpt" and weights is not None:
        raise UserError("--weights is for *.safetensors: a whole checkpoint keeps both sets of weights")
    if output.suffix == ".ckpt" and checkpoint.is_file():
        raise UserError(f"{checkpoint} is one file already\nuse it as it is, or name an OUTPUT.safetensors")


def _convert(path: Path, output: Path, weights: str) -> None:
    import torch

    from hornet_lit import sharded
    from hornet_lit.cli_checkpoint import read_checkpoint

    checkpoint = read_checkpoint(path, name=str(path))  # says what is wrong with it, if anything is
    if path.is_dir():
        checkpoint = sharded.read_whole(path)
    if output.suffix == ".ckpt":
        with whole_file(output) as temporary:
            torch.save(checkpoint, temporary)
        return
    from safetensors.torch import save

    from hornet_lit.network.files import digest_file
    from hornet_lit.network.weights import select

    if weights == "ema" and not checkpoint.get("ema"):
        raise UserError(f"{path} has no EMA weights\nleave --weights out, or give --weights raw")
    _, name, state = select(checkpoint, {"auto": None, "ema": True, "raw": False}[weights], path)
    state = {key: value.contiguous() for key, value in state.items()}
    contents = save(state, metadata=_notes(checkpoint, name))  # save_file would make it readable by its owner alone
    # The digest first: killed in between, there is no file that would be loaded unchecked.
    with whole_file(digest_file(output)) as temporary:
        temporary.write_text(f"{sha256(contents).hexdigest()}  {output.name}\n", encoding="utf-8")
    with whole_file(output) as temporary:
        temporary.write_bytes(contents)


def _notes(checkpoint: dict[str, Any], name: str) -> dict[str, str]:
    """What safetensors stores beside the tensors: how to build the network they fit. Values are JSON."""
    settings = checkpoint["hyper_parameters"]
    keys = ("network", "num_classes", "in_chans", "img_size", "network_options")
    notes = {key: settings.get(key) for key in keys} | {"class_names": checkpoint.get("class_names")}
    return {key: json.dumps(value) for key, value in notes.items()} | {"weights": name, "format": "pt"}
