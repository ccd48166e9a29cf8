"""What a training leaves for later: its whole configuration, in its folder and (the data part) in its checkpoints."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from hornet_lit import __version__
from hornet_lit.cli_checkpoint import KEY

# Lightning's Timer has an Enum as default where its type says str; jsonargparse cannot write that.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))


class RunRecord(SaveConfigCallback):
    """Writes config.yaml into the run's folder, and the data settings into every checkpoint.

    Unlike Lightning's it writes nothing where there is no logger, hence no run folder (Lightning's fills the current
    folder), and a second run in the same folder adds config_2.yaml instead of aborting.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or trainer.logger is None or self.already_saved:
            return
        folder = trainer.log_dir  # a broadcast: every process must ask
        self.already_saved = True
        if folder is None or not trainer.is_global_zero:
            return
        text = self.parser.dump(self.config, skip_unset=False)
        Path(folder).mkdir(parents=True, exist_ok=True)
        number = 1
        while (path := Path(folder, "config.yaml" if number == 1 else f"config_{number}.yaml")).exists():
            if path.read_text(encoding="utf-8") == text:
                return
            number += 1
        path.write_text(text, encoding="utf-8")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        whole = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        checkpoint[KEY] = {"version": __version__, "data": whole["data"]}
