"""metrics.csv that goes on where a resumed run takes it up; Lightning's own writer deletes the file that is there."""

import csv
import io
import os
from pathlib import Path

from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class MetricsWriter(ExperimentWriter):
    """Writer of a CSVLogger that appends to the metrics.csv of its folder, once `keep_before` has looked through it.

    Args:
        log_dir: the run's folder.
    """

    def _check_log_dir_exists(self) -> None:
        """Where Lightning deletes an earlier metrics.csv."""

    def save(self) -> None:
        try:
            super().save()
        except OSError as error:  # of a write, which does not know the file's name
            raise OSError(error.errno, error.strerror, self.metrics_file_path) from error

    def keep_before(self, step: int, *, validated: bool) -> None:
        """Drops what a run that goes on from `step` will log again, and a line that a killed process left unfinished.

        Args:
            step: optimizer steps at the checkpoint; rows count them from 0, so that those from `step` on are dropped.
            validated: False drops the last step's validation as well.
        """
        path = Path(self.metrics_file_path)
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        rows = [row for row in reader if _is_before(row, step, validated=validated)]
        self.metrics_keys = list(reader.fieldnames or ()) if rows else []
        if not rows:
            path.unlink()
            return
        temporary = path.with_name(f"{path.name}.tmp")
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)


def _is_before(row: dict[str, str], step: int, *, validated: bool) -> bool:
    at = int(float(row["step"]))
    repeated = not validated and at == step - 1 and any(text and name.startswith("val/") for name, text in row.items())
    return at < step and not repeated
