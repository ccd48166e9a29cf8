"""Finding the packaged recipes: whole trainings in recipes/*.yaml, additions to them in recipes/overlays/*.yaml, and
job scripts in recipes/*.sbatch.

A recipe's first comment lines say what it is: a title, then `Result:`, `Cost:` and `Command:`. This room reads them
and nothing else of the file. It imports neither torch nor yaml, so that `hornet-lit recipes` answers at once.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

SUFFIX = ".yaml"
SCRIPT_SUFFIX = ".sbatch"
OVERLAYS = "overlays"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One recipe file: `name` is what `--config` takes; the other texts come from the file's first comment lines."""

    name: str
    path: Path
    title: str
    result: str
    cost: str

    @property
    def is_overlay(self) -> bool:
        return self.name.startswith(f"{OVERLAYS}/")


def folder() -> Path:
    """The folder of the recipes: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "_recipes", package.parent / "recipes"):
        if (candidate / OVERLAYS).is_dir():
            return candidate
    raise FileNotFoundError(2, "the packaged recipes are missing; install hornet-lit again", str(package / "_recipes"))


def all_recipes() -> list[Recipe]:
    """Every recipe by name, then every overlay."""
    root = folder()
    paths = sorted(root.glob(f"*{SUFFIX}")) + sorted((root / OVERLAYS).glob(f"*{SUFFIX}"))
    return [read_header(path, name=path.relative_to(root).with_suffix("").as_posix()) for path in paths]


def all_scripts() -> list[Recipe]:
    """Every job script, its suffix in its name."""
    return [read_header(path, name=path.name) for path in sorted(folder().glob(f"*{SCRIPT_SUFFIX}"))]


def read_header(path: Path, *, name: str) -> Recipe:
    """Reads the comment lines at the top of `path`; a line that continues another is indented after its `#`."""
    fields: dict[str, str] = {}
    current = "title"
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if line.startswith("#!"):
            continue
        text = line[1:].removeprefix(" ")
        head, colon, rest = text.partition(":")
        if text.startswith(" ") and current in fields:
            fields[current] += " " + text.strip()
        elif colon and head in ("Result", "Cost", "Command"):
            current = head.lower()
            fields[current] = rest.strip()
        elif "title" not in fields:
            fields["title"] = text.strip()
        else:
            current = ""
    return Recipe(
        name=name,
        path=path,
        title=fields.get("title", ""),
        result=fields.get("result", ""),
        cost=fields.get("cost", ""),
    )


def find(name: str) -> Recipe | None:
    """The recipe called `name`, or None; `digits`, `recipes/digits.yaml`, `ddp` and `overlays/ddp` all work."""
    wanted = name.removeprefix("./").removeprefix("recipes/").removesuffix(SUFFIX)
    by_name = {recipe.name: recipe for recipe in all_recipes()}
    return by_name.get(wanted) or by_name.get(f"{OVERLAYS}/{wanted}")


def nearest(name: str) -> list[str]:
    """Up to three recipe names that resemble `name`, best first."""
    wanted = Path(name).name.removesuffix(SUFFIX)
    names = [recipe.name for recipe in all_recipes()]
    short = {full.removeprefix(f"{OVERLAYS}/"): full for full in names}
    return [short[match] for match in get_close_matches(wanted, short, n=3, cutoff=0.6)]


def listing() -> str:
    """The text of `hornet-lit recipes`: a line per recipe with its result and cost, then a line per overlay."""
    recipes = all_recipes()
    width = max(len(recipe.name) for recipe in recipes)
    lines = ["recipes: hornet-lit fit --config NAME"]
    lines += [f"  {r.name:{width}}  {r.result} | {r.cost}" for r in recipes if not r.is_overlay]
    lines += ["", "overlays, added to a recipe: hornet-lit fit --config NAME --config OVERLAY"]
    lines += [f"  {r.name:{width}}  {r.title}" for r in recipes if r.is_overlay]
    lines += ["", "job scripts, to be adapted: hornet-lit recipes copy NAME"]
    lines += [f"  {r.name:{width}}  {r.title}" for r in all_scripts()]
    return "\n".join(lines)


def copy(recipe: Recipe, destination: Path) -> Path:
    """Copies the recipe to a file, or into a folder under its own name; never over a file that is there already.

    Raises FileExistsError, or FileNotFoundError where the folder for it is missing.
    """
    target = destination / recipe.path.name if destination.is_dir() else destination
    if target.exists():
        raise FileExistsError(17, "already exists, not overwritten; name another file", str(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(2, "no such folder", str(target.parent))
    shutil.copyfile(recipe.path, target)
    return target
